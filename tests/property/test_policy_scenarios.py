"""The policy by named example: each rule of scheduling.md, and each bug that the storms found."""

from world import GIB, Unit, World, config_of, sim

from mmd.config import Config, Evict, Idle
from mmd.names import Placement, UnitName
from mmd.policy.actions import Admit, Refusal, Refuse, Sleep, Start, Stop, Wake
from mmd.policy.events import Done, GpuSample, Measured, Observed, Phase, Pinned, Reconfigured, Sampled, Unreachable


def unit(model: str, *gpus: int) -> UnitName:
    return UnitName(model, Placement(gpus or (0,)))


def serve(world: World, model: str) -> UnitName:
    """Ask for a model, let it start (or wake) and finish the request: it is idle and ready afterwards."""
    request = world.arrive(model)
    for _ in range(10):
        if request in world.admitted:
            break
        for pending in list(world.pending):
            world.complete(pending)
    where = world.admitted[request]
    world.finish(request)
    return where


def last(world: World) -> object:
    return world.actions[-1]


def test_a_request_starts_its_model_once_and_all_waiters_are_admitted() -> None:
    world = World(config_of(sim("a", 14)), 24)
    first, second = world.arrive("a"), world.arrive("a")
    assert world.actions == [Start(unit("a"))]
    world.complete(unit("a"))
    assert world.actions[1:] == [Admit(first, unit("a")), Admit(second, unit("a"))]


def test_the_idle_resident_sleeps_before_the_next_starts() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    world.arrive("b")
    assert last(world) == Sleep(unit("a"), 1, int(0.05 * 14 * GIB))
    world.complete(unit("a"))
    assert last(world) == Start(unit("b"))


def test_a_model_that_may_not_sleep_is_stopped() -> None:
    world = World(config_of(sim("a", 14, sleep_level=0), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    world.arrive("b")
    assert last(world) == Stop(unit("a"))


def test_a_sleeper_wakes_where_it_is() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    serve(world, "b")
    world.pass_time(11)
    world.arrive("a")
    world.complete(unit("b"))
    assert last(world) == Wake(unit("a"), 1)


def test_a_fresh_resident_is_left_alone_for_min_residency() -> None:
    world = World(config_of(sim("a", 14, sleep_level=0), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(2)
    world.arrive("b")
    assert not world.pending
    world.pass_time(8.5)
    assert last(world) == Stop(unit("a"))


def test_a_busy_model_is_drained_only_after_max_wait() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    stream = world.arrive("a")
    world.arrive("b")
    world.pass_time(59)
    more = world.arrive("a")
    assert more in world.admitted, "within max_wait its own requests go on being admitted"
    world.pass_time(2)
    late = world.arrive("a")
    assert late in world.waiting, "beyond it the gate is closed"
    assert not world.pending
    world.finish(stream)
    world.finish(more)
    assert isinstance(last(world), Sleep)


def test_what_can_never_fit_is_refused_at_once_with_the_arithmetic() -> None:
    world = World(config_of(sim("huge", 40)), 24)
    request = world.arrive("huge")
    refusal = world.refused[request]
    assert refusal.why is Refusal.NEVER_FITS
    assert "needs 40.0 GiB on a GPU, and GPU 0, the best choice, has 24.0 GiB - 1.0 GiB reserve = 23.0 GiB" in refusal.message
    assert refusal.retry_after_s is None


def test_what_cannot_fit_beside_a_pinned_model_is_refused() -> None:
    world = World(config_of(sim("p", 10, pin=True), sim("b", 16)), 24)
    serve(world, "p")
    request = world.arrive("b")
    assert "10.0 GiB held by pinned models" in world.refused[request].message


def test_a_pinned_model_is_never_a_victim() -> None:
    world = World(config_of(sim("p", 6, pin=True), sim("a", 10), sim("b", 10)), 24)
    serve(world, "p")
    serve(world, "a")
    world.pass_time(11)
    world.arrive("b")
    assert isinstance(last(world), Sleep)
    assert last(world).unit == unit("a")  # type: ignore[attr-defined]


def _third(evict: Evict) -> UnitName:
    """Who leaves for c: a was used longer ago, but far more often than b."""
    config = config_of(sim("a", 10), sim("b", 10), sim("c", 10))
    world = World(config._replace(policy=config.policy._replace(evict=evict)), 24)
    for _ in range(20):
        serve(world, "a")
    world.pass_time(20)
    serve(world, "b")
    world.pass_time(20)
    world.arrive("c")
    return last(world).unit  # type: ignore[attr-defined,no-any-return]


def test_lru_evicts_the_least_recently_used_and_min_loss_the_least_wanted() -> None:
    assert _third(Evict.LRU) == unit("a")
    assert _third(Evict.MIN_LOSS) == unit("b")


def test_the_fullest_gpu_that_fits_is_taken() -> None:
    world = World(config_of(sim("a", 14), sim("b", 6)), 24, 24)
    serve(world, "a")
    assert serve(world, "b") == unit("b", 0), "so that the hole on the other stays large"


def test_a_model_on_two_gpus_reserves_both() -> None:
    world = World(config_of(sim("wide", 20, gpus=2), sim("a", 10)), 24, 24)
    assert serve(world, "wide") == unit("wide", 0, 1)
    world.pass_time(11)
    world.arrive("a")
    assert last(world).unit == unit("wide", 0, 1)  # type: ignore[attr-defined]


def test_independent_gpus_act_in_parallel_and_one_gpu_does_not() -> None:
    world = World(config_of(sim("a", 8, gpus=(0,)), sim("b", 8, gpus=(1,)), sim("c", 8, gpus=(0,))), 24, 24)
    for name in ("a", "b", "c"):
        world.arrive(name)
    assert set(world.pending) == {unit("a", 0), unit("b", 1)}
    world.complete(unit("a", 0))
    assert unit("c", 0) in world.pending


def test_clients_that_leave_while_room_is_made_cost_no_start() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    request = world.arrive("b")
    world.cancel(request)
    world.complete(unit("a"))
    assert not any(isinstance(action, Start) and action.unit == unit("b") for action in world.actions)


def test_failed_starts_back_off_and_end_in_failed_until_reset() -> None:
    world = World(config_of(sim("a", 14)), 24)
    for failures in range(1, 5):
        request = world.arrive("a")
        world.complete(unit("a"), ok=False)
        assert world.refused[request].why is Refusal.START_FAILED
        if failures < 4:
            assert world.refused[world.arrive("a")].why is Refusal.BACKING_OFF
            world.pass_time(2**failures + 0.1)
    final = world.refused[world.arrive("a")]
    assert "mmdctl reset a" in final.message
    assert final.retry_after_s is None
    request = world.arrive("a", operator=True)
    world.complete(unit("a"))
    assert request in world.admitted, "an operator's start lifts it"


def test_a_sleep_that_keeps_its_memory_ends_in_a_stop() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    world.arrive("b")
    world.complete(unit("a"), keeps=True)
    assert last(world) == Stop(unit("a"))
    world.complete(unit("a"))
    assert last(world) == Start(unit("b"))


def test_idle_counts_from_the_end_of_the_last_request_and_never_during_one() -> None:
    world = World(config_of(sim("a", 14, idle=Idle(sleep_after_s=30, stop_after_s=300))), 24)
    serve(world, "a")
    stream = world.arrive("a")
    world.pass_time(100)
    assert not world.pending
    world.finish(stream)
    world.pass_time(29)
    assert not world.pending
    world.pass_time(2)
    assert isinstance(last(world), Sleep)
    world.complete(unit("a"))
    world.pass_time(270)
    assert isinstance(last(world), Stop)


def test_a_client_that_leaves_during_the_load_does_not_shorten_the_idle_time() -> None:
    world = World(config_of(sim("a", 14, idle=Idle(sleep_after_s=30))), 24)
    request = world.arrive("a")
    world.cancel(request)
    world.pass_time(60)
    world.complete(unit("a"))
    world.pass_time(29)
    assert not world.pending
    world.pass_time(2)
    assert isinstance(last(world), Sleep)


def test_a_changed_definition_replaces_the_instance_when_it_is_idle() -> None:
    config = config_of(sim("a", 8), sim("b", 8))
    world = World(config, 24)
    serve(world, "a")
    serve(world, "b")
    stream = world.arrive("a")
    world.post(Reconfigured(config, {"a": "d2", "b": "d1"}, 64 * GIB))
    assert not world.pending, "nothing happens to b, and a is busy"
    world.finish(stream)
    world.pass_time(1)
    world.arrive("a")
    assert any(action == Stop(unit("a")) for action in world.actions)


def test_a_removed_model_is_drained_then_stopped_and_its_waiters_are_told() -> None:
    config = config_of(sim("a", 14), sim("b", 16))
    world = World(config, 24)
    serve(world, "a")
    stream = world.arrive("a")
    waiter = world.arrive("b")
    alone = Config(config.gateway, config.gpus, config.resources, config.policy, {})
    world.post(Reconfigured(alone, {}, 64 * GIB))
    assert world.refused[waiter].why is Refusal.REMOVED
    assert not world.pending
    world.finish(stream)
    world.pass_time(61)
    assert Stop(unit("a")) in world.actions


def test_foreign_use_shrinks_the_budget() -> None:
    world = World(config_of(sim("a", 14)), 24)
    world.post(Sampled((GpuSample(0, 24 * GIB, 12 * GIB),)))
    request = world.arrive("a")
    assert not world.pending
    world.post(Sampled((GpuSample(0, 24 * GIB, 1 * GIB),)))
    assert last(world) == Start(unit("a"))
    world.complete(unit("a"))
    assert request in world.admitted


def test_running_and_sleeping_units_are_adopted() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    world.units[unit("a")] = Unit(Phase.SLEEPING, 1)
    world.post(Observed(unit("a"), Phase.SLEEPING, 1, "d1"))
    world.arrive("a")
    assert last(world) == Wake(unit("a"), 1)


def adopt(world: World, model: str, age_s: float) -> None:
    """A model that became ready before the gateway came."""
    world.units[unit(model)] = Unit(Phase.READY)
    world.post(Observed(unit(model), Phase.READY, 0, "d1", age_s=age_s))


def test_idle_timers_of_an_adopted_model_count_from_when_it_became_ready() -> None:
    world = World(config_of(sim("a", 14, idle=Idle(sleep_after_s=60, stop_after_s=300))), 24)
    adopt(world, "a", 40)
    world.pass_time(19)
    assert not world.pending
    world.pass_time(2)
    assert isinstance(last(world), Sleep)
    world.complete(unit("a"))
    world.pass_time(238)
    assert not world.pending
    world.pass_time(2)
    assert last(world) == Stop(unit("a")), "300 s after it became ready"


def test_min_residency_of_an_adopted_model_counts_from_when_it_became_ready() -> None:
    world = World(config_of(sim("a", 14, sleep_level=0), sim("b", 16)), 24)
    adopt(world, "a", 4)
    world.arrive("b")
    world.pass_time(5)
    assert not world.pending
    world.pass_time(1.5)
    assert last(world) == Stop(unit("a"))


def test_an_adopted_model_is_not_idle_before_those_who_use_it_had_their_chance() -> None:
    world = World(config_of(sim("a", 14, idle=Idle(stop_after_s=3))), 24)
    adopt(world, "a", 5000)
    world.pass_time(4)
    assert not world.pending
    serve(world, "a")
    world.pass_time(2)
    assert not world.pending
    world.pass_time(2)
    assert last(world) == Stop(unit("a")), "from then on its last activity is known"
    world = World(config_of(sim("a", 14, idle=Idle(stop_after_s=300))), 24)
    adopt(world, "a", 5000)
    world.pass_time(11)
    assert last(world) == Stop(unit("a"))


def test_nobody_listening_means_restart_and_the_request_goes_first() -> None:
    world = World(config_of(sim("a", 14)), 24)
    request = world.arrive("a")
    world.complete(unit("a"))
    world.units[unit("a")].serving.discard(request)
    world.waiting[request] = "a"
    del world.admitted[request]
    world.post(Unreachable(request))
    assert last(world) == Stop(unit("a"))
    world.complete(unit("a"))
    assert last(world) == Start(unit("a"))
    world.complete(unit("a"))
    assert request in world.admitted


def test_an_operator_may_stop_a_model_that_is_loading() -> None:
    world = World(config_of(sim("a", 14)), 24)
    request = world.arrive("a")
    world.release(unit("a"), 0)
    assert last(world) == Stop(unit("a"))
    assert world.refused[request].why is Refusal.STOPPED


def test_a_model_that_does_not_wake_on_request_says_so() -> None:
    world = World(config_of(sim("a", 14, wake_on_request=False)), 24)
    serve(world, "a")
    world.release(unit("a"), 1)
    world.complete(unit("a"))
    refusal = world.refused[world.arrive("a")]
    assert refusal.why is Refusal.ASLEEP
    assert "mmdctl wake a" in refusal.message
    world.arrive("a", operator=True)
    assert last(world) == Wake(unit("a"), 1)


def test_the_queue_is_bounded() -> None:
    world = World(config_of(sim("a", 14)), 24)
    for _ in range(50):
        world.arrive("a")
    refusal = world.refused[world.arrive("a")]
    assert refusal.why is Refusal.QUEUE_FULL
    assert refusal.retry_after_s


def test_a_request_waits_for_wait_limit_at_most() -> None:
    world = World(config_of(sim("a", 14)), 24)
    request = world.arrive("a")
    world.pass_time(601)
    assert isinstance(world.refused[request], Refuse)
    assert world.refused[request].why is Refusal.WAITED_TOO_LONG


def test_a_start_that_systemd_did_not_hear_of_is_no_failure_of_the_model() -> None:
    world = World(config_of(sim("a", 14)), 24)
    request = world.arrive("a")
    action = world.pending.pop(unit("a"))
    del world.units[unit("a")]
    world.post(Done(action, Observed(unit("a"), Phase.STOPPED, reason="disconnected"), ok=False, interrupted=True))
    assert last(world) == Start(unit("a"))
    world.complete(unit("a"))
    assert request in world.admitted


def test_a_crashed_engine_is_started_again_at_once_and_a_crash_loop_ends_in_failed() -> None:
    world = World(config_of(sim("a", 14)), 24)
    for crashes in range(1, 4):
        serve(world, "a")
        world.crash(unit("a"))
        waiter = world.arrive("a")
        assert waiter in world.waiting, "it is not refused, but waits for the next try"
        assert bool(world.pending) == (crashes == 1), "the first time at once, then after a while"
        world.pass_time(2.0**crashes + 0.1)
        world.complete(unit("a"))
        world.finish(waiter)
    world.crash(unit("a"))
    assert "mmdctl reset a" in world.refused[world.arrive("a")].message


def test_a_model_that_comes_up_by_hand_while_room_is_made_for_it_is_used_as_it_is() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    request = world.arrive("b")
    assert isinstance(last(world), Sleep), "room is being made"
    world.units[unit("b")] = Unit(Phase.READY)
    world.post(Observed(unit("b"), Phase.READY, 0, "d1"))
    world.complete(unit("a"))
    assert request in world.admitted
    assert Start(unit("b")) not in world.actions


def test_nobody_listening_and_the_model_removed_meanwhile_is_an_answer_not_a_hang() -> None:
    config = config_of(sim("a", 14))
    world = World(config, 24)
    request = world.arrive("a")
    world.complete(unit("a"))
    world.post(Reconfigured(Config(config.gateway, config.gpus, config.resources, config.policy, {}), {}, 64 * GIB))
    world.units[unit("a")].serving.discard(request)
    world.waiting[request] = "a"
    del world.admitted[request]
    world.post(Unreachable(request))
    assert world.refused[request].why is Refusal.REMOVED


def test_a_ready_model_is_not_refused_because_others_fill_the_queue() -> None:
    world = World(config_of(sim("a", 8), sim("b", 8)), 24)
    serve(world, "a")
    for _ in range(50):
        world.arrive("b")
    assert world.arrive("a") in world.admitted


def test_gpus_that_cannot_be_read_are_said_to_be_so() -> None:
    world = World(config_of(sim("a", 14)), 24)
    world.scheduler.state.gpus.clear()
    world.post(Sampled((), "the GPU probe did not answer"))
    refusal = world.refused[world.arrive("a")]
    assert refusal.why is Refusal.GPUS_UNREADABLE
    assert refusal.retry_after_s
    assert "did not answer" in refusal.message


def test_a_crash_that_systemd_reports_as_stopping_first_is_a_crash_all_the_same() -> None:
    world = World(config_of(sim("a", 14)), 24)
    serve(world, "a")
    world.post(Observed(unit("a"), Phase.STOPPING, 0, "d1"))
    world.crash(unit("a"))
    request = world.arrive("a")
    assert isinstance(last(world), Start), "at once, since it had been ready"
    world.complete(unit("a"))
    assert request in world.admitted


def test_a_start_that_runs_out_of_memory_is_tried_once_more_with_more_room() -> None:
    world = World(config_of(sim("a", 12), sim("b", 10)), 24)
    serve(world, "b")
    world.pass_time(11)
    request = world.arrive("a")
    assert last(world) == Start(unit("a")), "by what is declared it fits beside b"
    world.complete(unit("a"), ok=False, out_of_memory=True)
    assert request in world.waiting
    assert isinstance(last(world), Sleep), "with 15 % more it does not: b leaves"
    world.complete(unit("b"))
    assert last(world) == Start(unit("a"))
    world.complete(unit("a"), ok=False, out_of_memory=True)
    assert world.refused[request].why is Refusal.START_FAILED


def test_the_model_whose_waiters_are_served_soonest_per_second_of_work_goes_first() -> None:
    world = World(config_of(sim("busy", 16), sim("one", 16), sim("three", 16)), 24)
    serve(world, "busy")
    stream = world.arrive("busy")
    world.arrive("one")
    for _ in range(3):
        world.arrive("three")
    world.pass_time(11)
    world.finish(stream)
    world.complete(unit("busy"))
    assert last(world) == Start(unit("three")), "it asked later, but three wait for it"


def test_whoever_has_waited_for_max_wait_goes_first() -> None:
    world = World(config_of(sim("busy", 16), sim("one", 16), sim("three", 16)), 24)
    serve(world, "busy")
    stream = world.arrive("busy")
    world.arrive("one")
    world.pass_time(30)
    for _ in range(3):
        world.arrive("three")
    world.pass_time(31)
    world.finish(stream)
    world.complete(unit("busy"))
    assert last(world) == Start(unit("one"))


def test_a_sleeper_whose_place_a_pinned_model_has_taken_moves() -> None:
    world = World(config_of(sim("a", 14, gpus=1), sim("p", 12, pin=True, gpus=(0,))), 24, 24)
    serve(world, "a")
    world.release(unit("a"), 1)
    world.complete(unit("a"))
    serve(world, "p")
    world.pass_time(11)
    request = world.arrive("a")
    world.pass_time(61)
    assert last(world) == Stop(unit("a"))
    world.complete(unit("a"))
    assert last(world) == Start(unit("a", 1))
    world.complete(unit("a", 1))
    assert request in world.admitted


def test_an_instance_that_holds_more_than_declared_is_reckoned_with_that_from_then_on() -> None:
    config = config_of(sim("a", 12), sim("b", 10))
    world = World(config, 24)
    serve(world, "a")
    world.post(Measured(unit("a"), 14 * GIB))
    world.pass_time(11)
    world.arrive("b")
    assert isinstance(last(world), Sleep), "12 + 10 would fit, 14 + 10 does not"
    lesson = world.scheduler.state.lessons["a"]
    assert lesson.peak_bytes == 14 * GIB
    world.post(Reconfigured(config, {"a": "d2", "b": "d1"}, 64 * GIB))
    assert world.scheduler.state.lessons["a"].peak_bytes == 0, "of another definition nothing is known"
    world.post(Reconfigured(config, {"a": "d3", "b": "d1"}, 64 * GIB, {"a": lesson}))
    assert world.scheduler.state.lessons["a"] == lesson, "unless it was run before"


def test_what_has_run_once_is_never_reckoned_too_large_for_its_gpu() -> None:
    world = World(config_of(sim("a", 23)), 24)
    serve(world, "a")
    world.post(Measured(unit("a"), 24 * GIB))
    world.release(unit("a"), 0)
    world.complete(unit("a"))
    world.arrive("a")
    assert last(world) == Start(unit("a"))


def test_what_comes_back_quickly_may_go_quickly() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.release(unit("a"), 1)
    world.complete(unit("a"))
    first = world.arrive("a")
    world.complete(unit("a"), elapsed_s=1.5)
    world.finish(first)
    world.arrive("b")
    assert not world.pending
    world.pass_time(1.4)
    assert not world.pending
    world.pass_time(0.2)
    assert isinstance(last(world), Sleep), "after the 1.5 s that it takes to wake, not after min_residency's 10"


def test_an_operator_pins_and_unpins_at_run_time() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    world.post(Pinned("a", pinned=True))
    request = world.arrive("b")
    assert "held by pinned models" in world.refused[request].message
    world.post(Pinned("a", pinned=False))
    world.arrive("b")
    assert isinstance(last(world), Sleep)


def test_an_operators_word_goes_before_the_configuration() -> None:
    world = World(config_of(sim("a", 14, pin=True), sim("b", 16)), 24)
    serve(world, "a")
    world.pass_time(11)
    world.post(Pinned("a", pinned=False))
    world.arrive("b")
    assert last(world) == Sleep(unit("a"), 1, int(0.05 * 14 * GIB))


def test_a_victim_that_is_pinned_while_it_drains_stays() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16), max_wait_s=1), 24)
    serve(world, "a")
    busy = world.arrive("a")
    world.pass_time(20)
    request = world.arrive("b")
    world.pass_time(2)
    state = world.scheduler.state
    assert not state.instances[unit("a")].gate_open, "it is the victim, and drains"
    world.post(Pinned("a", pinned=True))
    assert "held by pinned models" in world.refused[request].message
    world.finish(busy)
    assert state.instances[unit("a")].gate_open
    assert state.instances[unit("a")].phase is Phase.READY
