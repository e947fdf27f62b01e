"""The scheduler's invariants (scheduling.md) under arbitrary events: arrivals, cancels, failures, crashes, time."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import World, config_of, sim

from mmd.config import Evict, Idle, Model, Replicas
from mmd.policy import Scheduler
from mmd.policy.actions import Refusal
from mmd.policy.events import Phase

MODELS = (
    sim("a", 14),
    sim("b", 16, sleep_level=2),
    sim("c", 9, idle=Idle(sleep_after_s=30, stop_after_s=120)),
    sim("d", 6, pin=True),
    sim("e", 12, sleep_level=0),
    sim("f", 5, concurrency=2),
    sim("g", 10, gpus=2),
    sim("h", 8, gpus=(1,), priority=5),
    sim("i", 7, wake_on_request=False, idle=Idle(sleep_after_s=5)),
    sim("j", 40),
    sim("k", 6, replicas=Replicas(max=2, target_in_flight=2)),
    sim("l", 7, replicas=Replicas(min=1, max=3, target_in_flight=1), idle=Idle(sleep_after_s=20)),
    sim("m", 11, preload=True, concurrency=1, replicas=Replicas(max=2)),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a World; its checks are the invariants."""

    @initialize(
        evict=st.sampled_from(Evict),
        gpus=st.sampled_from([(24,), (24, 24), (16, 24)]),
        ram_gib=st.sampled_from([0, 16, 32, 64]),
        workers=st.booleans(),
        models=st.lists(st.sampled_from(MODELS), min_size=2, max_size=7, unique_by=lambda m: m.name),
    )
    def begin(self, evict: Evict, gpus: tuple[int, ...], ram_gib: int, workers: bool, models: list[Model]) -> None:
        config = config_of(*models)
        config = config._replace(policy=config.policy._replace(evict=evict))
        self.world = World(config, *gpus, ram_gib=ram_gib, workers=workers)
        self.names = [model.name for model in models]

    @rule(data=st.data(), operator=st.booleans())
    def arrive(self, data: st.DataObject, operator: bool) -> None:
        self.world.arrive(data.draw(st.sampled_from(self.names)), operator=operator)

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.waiting))))

    @precondition(lambda self: self.world.admitted)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.world.finish(data.draw(st.sampled_from(sorted(self.world.admitted))))

    @precondition(lambda self: self.world.lent)
    @rule(data=st.data())
    def admit_elsewhere(self, data: st.DataObject) -> None:
        self.world.admit_elsewhere(data.draw(st.sampled_from(sorted(self.world.lent))))

    @precondition(lambda self: self.world.elsewhere)
    @rule(data=st.data())
    def finish_elsewhere(self, data: st.DataObject) -> None:
        self.world.finish_elsewhere(data.draw(st.sampled_from(sorted(self.world.elsewhere))))

    @precondition(lambda self: any(self.world.lent.values()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        recalled = [unit for unit, recalled in self.world.lent.items() if recalled]
        self.world.give_back(data.draw(st.sampled_from(sorted(recalled))))

    @precondition(lambda self: self.world.elsewhere)
    @rule()
    def survey(self) -> None:
        self.world.survey()

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), ok=st.integers(0, 5), keeps=st.integers(0, 5))
    def complete(self, data: st.DataObject, ok: int, keeps: int) -> None:
        self.world.complete(data.draw(st.sampled_from(sorted(self.world.pending))), ok=ok > 0, keeps=keeps == 0)

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        alive = [u for u in sorted(self.world.units) if u not in self.world.pending and self._alive(u)]
        if alive:
            self.world.crash(data.draw(st.sampled_from(alive)))

    def _alive(self, unit: object) -> bool:
        return self.world.units[unit].phase in (Phase.READY, Phase.SLEEPING)  # type: ignore[index]

    @rule(data=st.data(), level=st.sampled_from([0, 1]), force=st.booleans())
    def release(self, data: st.DataObject, level: int, force: bool) -> None:
        if self.world.units:
            self.world.release(data.draw(st.sampled_from(sorted(self.world.units))), level, force=force)

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0, 61.0, 300.0]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def every_request_is_somewhere(self) -> None:
        if hasattr(self, "world"):
            state = self.world.scheduler.state
            assert set(state.waiting) == set(self.world.waiting)
            assert set(state.admitted) == set(self.world.admitted)

    @invariant()
    def a_round_is_idempotent(self) -> None:
        """Without a new event or the passing of time there is nothing more to do: the scheduler does not spin."""
        if hasattr(self, "world"):
            assert self.world.scheduler._settle(self.world.now) == []

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        before = set(world.refused)
        world.settle()
        assert not world.waiting, f"still waiting after everything ended: {world.waiting}"
        late = [r for request, r in world.refused.items() if request not in before and r.why is Refusal.WAITED_TOO_LONG]
        assert not late or any(m.pin for m in world.config.models.values()), late
        replayed = Scheduler()
        actions = [action for event, now in world.trace for action in replayed.handle(event, now)]
        assert actions == world.actions, "the same events gave different actions"


SchedulerMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
