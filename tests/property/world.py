"""A small world for the scheduler: units that start, sleep, stop and crash as told, with the books kept independently."""

from dataclasses import dataclass, field, replace

from mmd.config import Config, EngineKind, Gateway, Gpus, Model, Policy
from mmd.names import UnitName
from mmd.policy import Scheduler
from mmd.policy.actions import Action, Admit, Lend, Recall, Refuse, Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.events import (
    Arrived,
    Cancelled,
    Done,
    Event,
    Finished,
    GpuSample,
    Observed,
    Phase,
    Reconfigured,
    Release,
    Returned,
    Sampled,
    Staffed,
    Surveyed,
    Tally,
    Tick,
)

GIB = 1 << 30
RESIDUAL = GIB // 2


def sim(name: str, vram_gib: int, **more: object) -> Model:
    return Model(name=name, id=name, engine=EngineKind.SIM, vram_bytes=vram_gib * GIB, **more)  # type: ignore[arg-type]


def config_of(*models: Model, **policy: float) -> Config:
    settings = {"max_wait_s": 60.0, "min_residency_s": 10.0, **policy}
    return Config(
        gateway=Gateway(queue_limit=50, wait_limit_s=600),
        gpus=Gpus(reserve_bytes=GIB),
        policy=Policy(**settings),  # type: ignore[arg-type]
        models={model.name: model for model in models},
    )


@dataclass
class Unit:
    """The truth about one unit, kept apart from the scheduler's idea of it."""

    phase: Phase
    level: int = 0
    serving: set[int] = field(default_factory=set)


class World:
    """Carries out actions when told to, and checks the invariants of scheduling.md at every step."""

    def __init__(self, config: Config, *gpu_gib: int, ram_gib: int = 64, workers: bool = False) -> None:
        self.config = config
        self.ram = ram_gib * GIB
        self.total = [gib * GIB for gib in gpu_gib]
        self.now = 1000.0
        self.scheduler = Scheduler()
        self.units: dict[UnitName, Unit] = {}
        self.pending: dict[UnitName, UnitAction] = {}
        self.waiting: dict[int, str] = {}
        self.admitted: dict[int, UnitName] = {}
        self.lent: dict[UnitName, bool] = {}
        """Units that workers may admit requests to; whether they are asked to stop that, which they need not know yet."""
        self.elsewhere: dict[int, UnitName] = {}
        """Requests that workers serve, by negative numbers."""
        self._come: dict[UnitName, int] = {}
        """Requests that workers admitted since the last survey."""
        self.refused: dict[int, Refuse] = {}
        self.released: set[UnitName] = set()
        self.forced: set[UnitName] = set()
        self.trace: list[tuple[Event, float]] = []
        self.actions: list[Action] = []
        self._requests = 0
        self.post(Reconfigured(config, dict.fromkeys(config.models, "d1"), self.ram))
        if workers:
            self.post(Staffed())
        self.post(Sampled(tuple(GpuSample(i, total) for i, total in enumerate(self.total))))

    def post(self, event: Event) -> list[Action]:
        self.trace.append((event, self.now))
        actions = self.scheduler.handle(event, self.now)
        for action in actions:
            self._check(action)
        self.actions += actions
        return actions

    def _check(self, action: Action) -> None:
        match action:
            case Admit(request, unit):
                assert request in self.waiting, f"{action}: not waiting"
                assert self.units[unit].phase is Phase.READY, f"{action}: not ready"
                assert unit not in self.pending, f"{action}: {self.pending[unit]} is under way"
                del self.waiting[request]
                self.admitted[request] = unit
                self.units[unit].serving.add(request)
            case Refuse(request):
                assert request in self.waiting, f"{action}: not waiting"
                del self.waiting[request]
                self.refused[request] = action
            case Lend(unit):
                assert unit not in self.lent, f"{action}: it is lent already"
                assert self.units[unit].phase is Phase.READY, f"{action}: not ready"
                assert not self._model(unit).concurrency, f"{action}: nobody would count"
                self.lent[unit] = False
            case Recall(unit):
                assert self.lent[unit] is False, f"{action}: twice"
                self.lent[unit] = True
            case _:
                self._check_unit_action(action)

    def _check_unit_action(self, action: UnitAction) -> None:
        unit = action.unit
        cancels = isinstance(action, Stop) and isinstance(self.pending.get(unit), Start)
        assert unit not in self.pending or cancels, f"{action}: {self.pending.get(unit)} is under way"
        busy = self.units[unit].serving if unit in self.units else set()
        leaves = isinstance(action, Sleep | Stop)
        assert not (leaves and busy) or unit in self.forced, f"{action}: requests {busy} are in flight"
        assert not (leaves and unit in self.lent), f"{action}: workers may be sending requests to it"
        shared = [u for u in self.pending if u != unit and set(u.placement.gpus) & set(unit.placement.gpus)]
        assert not shared, f"{action}: {shared} change the same GPU"
        self.pending[unit] = action
        if isinstance(action, Sleep):
            assert self.used_ram() <= self.ram, f"{action}: sleepers hold {self.used_ram() / GIB} GiB of host memory"
        if isinstance(action, Start | Wake):
            if isinstance(action, Start):
                self.units[unit] = Unit(Phase.STARTING)
            replicas = [u for u in self.units if u.id == unit.id and self.units[u].phase in (Phase.STARTING, Phase.READY)]
            assert len(replicas) <= self._model(unit).replicas.max, f"{action}: one more than replicas.max"
            for gpu in unit.placement.gpus:
                used = self.used(gpu)
                assert used <= self.total[gpu] - GIB, f"{action}: GPU {gpu} holds {used / GIB} GiB"

    def used(self, gpu: int) -> int:
        """Bytes held on a GPU, transitions at their larger side."""
        return sum(self._holds(name, unit) for name, unit in self.units.items() if gpu in name.placement.gpus)

    def used_ram(self) -> int:
        """Bytes of host memory that sleepers at level 1 hold, those on their way there or back included."""
        return sum(self._keeps(name, unit) for name, unit in self.units.items())

    def _keeps(self, name: UnitName, unit: Unit) -> int:
        pending = self.pending.get(name)
        level = pending.level if isinstance(pending, Sleep) else unit.level if unit.phase is Phase.SLEEPING else 0
        return len(name.placement.gpus) * int(0.95 * (self._model(name).vram_bytes or 0)) if level == 1 else 0

    def _model(self, name: UnitName) -> Model:
        return next(m for m in self.config.models.values() if m.id == name.id)

    def _holds(self, name: UnitName, unit: Unit) -> int:
        model = self._model(name)
        if unit.phase is Phase.FAILED:
            return 0
        asleep = unit.phase is Phase.SLEEPING and not isinstance(self.pending.get(name), Wake)
        return RESIDUAL if asleep else model.vram_bytes or 0

    # What may happen.

    def arrive(self, model: str, *, operator: bool = False, wait_s: float | None = None) -> int:
        self._requests += 1
        self.waiting[self._requests] = model
        self.post(Arrived(self._requests, model, operator, wait_s))
        return self._requests

    def cancel(self, request: int) -> None:
        del self.waiting[request]
        self.post(Cancelled(request))

    def finish(self, request: int) -> None:
        unit = self.admitted.pop(request)
        if unit in self.units:
            self.units[unit].serving.discard(request)
        self.post(Finished(request))

    def admit_elsewhere(self, unit: UnitName) -> None:
        """A worker sends a request to a unit that is lent to it, whatever has become of it meanwhile."""
        self._requests += 1
        self._come[unit] = self._come.get(unit, 0) + 1
        if unit in self.units and self.units[unit].phase is Phase.READY:
            self.elsewhere[-self._requests] = unit
            self.units[unit].serving.add(-self._requests)

    def finish_elsewhere(self, request: int) -> None:
        unit = self.elsewhere.pop(request)
        if unit in self.units:
            self.units[unit].serving.discard(request)

    def survey(self) -> None:
        units = {*self.units, *self._come, *self.elsewhere.values()}
        come, self._come = self._come, {}
        serving = [*self.elsewhere.values()]
        self.post(Surveyed({unit: Tally(serving.count(unit), come.get(unit, 0), self.now) for unit in sorted(units)}))

    def give_back(self, unit: UnitName) -> None:
        """Workers have heard of the recall."""
        assert self.lent.pop(unit)
        self.survey()
        self.post(Returned(unit))

    def complete(self, unit: UnitName, *, ok: bool = True, keeps: bool = False, out_of_memory: bool = False,
                 elapsed_s: float = 30.0, held_bytes: int = RESIDUAL) -> None:  # fmt: skip
        """End the pending action of a unit. `keeps`: a sleep answers well but the memory does not come back."""
        action = self.pending.pop(unit)
        match action:
            case Start() | Wake():
                if ok:
                    self.units[unit].phase, self.units[unit].level = Phase.READY, 0
                else:
                    self.units[unit].phase = Phase.FAILED
            case Sleep(level=level):
                ok = ok and not keeps
                if ok:
                    self.units[unit].phase, self.units[unit].level = Phase.SLEEPING, level
                else:
                    self.forced.add(unit)
            case Stop():
                self.units.pop(unit, None)
                self.forced.discard(unit)
                self.released.discard(unit)
                ok = True
        held = held_bytes if isinstance(action, Sleep) and ok else None
        self.post(Done(action, replace(self._seen(unit), out_of_memory=out_of_memory), ok, elapsed_s, held))

    def _seen(self, name: UnitName) -> Observed:
        unit = self.units.get(name)
        if unit is None:
            return Observed(name, Phase.STOPPED)
        reason = "it broke" if unit.phase is Phase.FAILED else ""
        return Observed(name, unit.phase, unit.level, "d1", reason)

    def crash(self, name: UnitName) -> None:
        """A unit that has nothing pending dies for good."""
        unit = self.units[name]
        for request in sorted(unit.serving):
            self.finish(request) if request > 0 else self.finish_elsewhere(request)
        unit.phase = Phase.FAILED
        self.post(self._seen(name))

    def release(self, unit: UnitName, level: int, *, force: bool = False) -> None:
        if force:
            self.forced.add(unit)
        self.post(Release(unit, level, force))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with a Tick whenever the scheduler asked for one."""
        end = self.now + seconds
        while (at := self.scheduler.deadline(self.now)) is not None and at <= end:
            self.now = max(at, self.now) + 0.001
            self.post(Tick())
        self.now = max(end, self.now)

    def settle(self, rounds: int = 150) -> None:
        """Finish whatever is in flight or pending, again and again, until nobody waits."""
        for _ in range(rounds):
            for request in list(self.admitted):
                self.finish(request)
            for request in list(self.elsewhere):
                self.finish_elsewhere(request)
            self.survey()
            for unit in [unit for unit, recalled in self.lent.items() if recalled]:
                self.give_back(unit)
            for unit in list(self.pending):
                self.complete(unit)
            self.pass_time(1.0)
            if not self.waiting and not self.pending and not self.admitted:
                return
