"""What the scheduler is told. Times are seconds of a monotonic clock and come with the event, never from inside."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from mmd.config import Config
from mmd.names import UnitName
from mmd.policy.actions import UnitAction
from mmd.policy.lesson import Lesson

__all__ = [
    "Arrived",
    "Cancelled",
    "Done",
    "Event",
    "Finished",
    "Gauged",
    "GpuSample",
    "Inherited",
    "Measured",
    "Observed",
    "Paused",
    "Phase",
    "Pinned",
    "Reconfigured",
    "Release",
    "Reset",
    "Returned",
    "Sampled",
    "Staffed",
    "Surveyed",
    "Tally",
    "Tick",
    "Unreachable",
    "Verify",
]


class Phase(StrEnum):
    """What a model unit is doing, as read from systemd and the engine."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Observed:
    """The state of a unit was read. A unit with an action pending is described by that action's `Done` alone."""

    unit: UnitName
    phase: Phase
    level: int = 0
    """Sleep level, when sleeping."""
    definition: str = ""
    """Fingerprint it was started with; "" when unknown."""
    reason: str = ""
    """Why it failed."""
    tail: tuple[str, ...] = ()
    """The engine's last log lines, when it failed."""
    out_of_memory: bool = False
    """It failed for want of GPU memory."""
    age_s: float = 0.0
    """How long ago it came into this state. Counts where the unit is seen for the first time: it was adopted."""
    start_s: float | None = None
    """How long its start took, by its runner; None while it is not ready, and when unknown."""


@dataclass(frozen=True, slots=True)
class Done:
    """The scheduler's `action` on `observed.unit` has ended; `observed` is what was read afterwards."""

    action: UnitAction
    observed: Observed
    ok: bool
    elapsed_s: float = 0.0
    held_bytes: int | None = None
    """GPU memory that it holds per GPU, measured after a start, wake or sleep; None when nothing can measure it."""
    freed_bytes: int | None = None
    """GPU memory that a sleep or stop freed per GPU, measured."""
    interrupted: bool = False
    """systemd was out of reach: nothing is known to be wrong with the model, and the action may be tried again."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request wants a model."""

    request: int
    model: str
    operator: bool = False
    """Asked for by an operator (`mmdctl start`): also wakes a model that requests may not wake, and lifts a back-off."""
    wait_s: float | None = None
    """How long it waits at most, if it does not want to wait for as long as gateway.wait_limit; 0: it starts nothing."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client of a waiting request has left."""

    request: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An admitted request has ended, in whatever way."""

    request: int


@dataclass(frozen=True, slots=True)
class Unreachable:
    """An admitted request found nobody listening at its instance, and goes back to the head of the queue."""

    request: int
    wait_s: float | None = None
    """As in Arrived."""


@dataclass(frozen=True, slots=True)
class Release:
    """Somebody, as a rule an operator, wants a unit stopped (`level` 0) or asleep; `force` does not wait for its requests."""

    unit: UnitName
    level: int = 0
    force: bool = False
    why: str = "asked for by an operator"


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget a model's failures."""

    model: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """An operator's word on whether a model may make room for others, whatever its configuration says."""

    model: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Verify:
    """Try a model's definition: start it once, as soon as there is memory that nobody has to give up (mmd.policy.trial)."""

    model: str


@dataclass(frozen=True, slots=True)
class Paused:
    """Whether decisions are somebody else's for now: what happens is learned, and nothing is done."""

    paused: bool


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the gateway before this one knew of a unit, and the requests that it still serves there."""

    unit: UnitName
    requests: tuple[int, ...] = ()
    """They end as all others do, by `Finished`."""
    idle_s: float | None = None
    """How long ago a request was last admitted or ended there."""


@dataclass(frozen=True, slots=True)
class Staffed:
    """The gateway has workers: what may be lent is lent to them."""


@dataclass(frozen=True, slots=True)
class Returned:
    """A unit's lease that was recalled has ended everywhere: nobody admits requests to it without asking."""

    unit: UnitName


@dataclass(frozen=True, slots=True)
class Tally:
    """What the gateway's workers did with a unit that was lent to them."""

    in_flight: int
    """Requests that they serve there now."""
    arrived: int = 0
    """Requests that they have admitted there since the last survey."""
    last_activity: float = 0.0
    """When they last admitted or ended one; 0: never."""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The workers' tallies were read, those of all units that they have to do with."""

    tallies: Mapping[UnitName, Tally]


@dataclass(frozen=True, slots=True)
class GpuSample:
    """A GPU as the provider sees it; `used_bytes` None when it cannot be measured."""

    index: int
    total_bytes: int
    used_bytes: int | None = None
    uuid: str = ""
    parent_uuid: str = ""
    """Of a slice (MIG): the divided GPU's."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The GPU memory that a unit's processes hold, on the GPU where they hold most."""

    unit: UnitName
    vram_bytes: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """GPU memory was measured."""

    gpus: tuple[GpuSample, ...]
    problem: str = ""
    """Why they cannot be read at present; the last good sample stays in force then."""


@dataclass(frozen=True, slots=True)
class Gauged:
    """How much of a resource is free at present, as its gauge says."""

    resource: str
    free: float
    """math.inf: nobody can tell, so it limits nothing."""


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """A configuration is in force; `definitions` holds the fingerprint that each model would be started with now."""

    config: Config
    definitions: Mapping[str, str]
    ram_bytes: float = 0
    """What models may have of the host's memory at most, used when the configuration does not set it."""
    lessons: Mapping[str, Lesson] = field(default_factory=dict)
    """What was learned of these definitions before, by model name."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; the scheduler's `deadline` has come."""


Event = (
    Arrived
    | Cancelled
    | Done
    | Finished
    | Gauged
    | Inherited
    | Measured
    | Observed
    | Paused
    | Pinned
    | Reconfigured
    | Release
    | Reset
    | Returned
    | Sampled
    | Staffed
    | Surveyed
    | Tick
    | Unreachable
    | Verify
)
