"""A small world for the scheduler: units that start, sleep, stop and crash as told, with the books kept independently."""

from dataclasses import dataclass, field, replace

from mmd.config import Config, EngineKind, Gateway, Gpus, Model, Policy
from mmd.names import UnitName
from mmd.policy import Scheduler
from mmd.policy.actions import Action, Admit, Refuse, Sleep, Start, Stop, UnitAction, Wake
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
    Sampled,
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

    def __init__(self, config: Config, *gpu_gib: int, ram_gib: int = 64) -> None:
        self.config = config
        self.ram = ram_gib * GIB
        self.total = [gib * GIB for gib in gpu_gib]
        self.now = 1000.0
        self.scheduler = Scheduler()
        self.units: dict[UnitName, Unit] = {}
        self.pending: dict[UnitName, UnitAction] = {}
        self.waiting: dict[int, str] = {}
        self.admitted: dict[int, UnitName] = {}
        self.refused: dict[int, Refuse] = {}
        self.released: set[UnitName] = set()
        self.forced: set[UnitName] = set()
        self.trace: list[tuple[Event, float]] = []
        self.actions: list[Action] = []
        self._requests = 0
        self.post(Reconfigured(config, dict.fromkeys(config.models, "d1"), self.ram))
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
            case _:
                self._check_unit_action(action)

    def _check_unit_action(self, action: UnitAction) -> None:
        unit = action.unit
        cancels = isinstance(action, Stop) and isinstance(self.pending.get(unit), Start)
        assert unit not in self.pending or cancels, f"{action}: {self.pending.get(unit)} is under way"
        busy = self.units[unit].serving if unit in self.units else set()
        leaves = isinstance(action, Sleep | Stop)
        assert not (leaves and busy) or unit in self.forced, f"{action}: requests {busy} are in flight"
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

    def arrive(self, model: str, *, operator: bool = False) -> int:
        self._requests += 1
        self.waiting[self._requests] = model
        self.post(Arrived(self._requests, model, operator))
        return self._requests

    def cancel(self, request: int) -> None:
        del self.waiting[request]
        self.post(Cancelled(request))

    def finish(self, request: int) -> None:
        unit = self.admitted.pop(request)
        if unit in self.units:
            self.units[unit].serving.discard(request)
        self.post(Finished(request))

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
        for request in list(unit.serving):
            self.finish(request)
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
            for unit in list(self.pending):
                self.complete(unit)
            self.pass_time(1.0)
            if not self.waiting and not self.pending and not self.admitted:
                return
