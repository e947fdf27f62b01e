"""One unit of a model as the scheduler knows it, and the requests that wait for a model."""

from dataclasses import dataclass, field

from mmd.config import Model
from mmd.names import UnitName
from mmd.policy.actions import Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.events import Observed, Phase, Release
from mmd.policy.ledger import Key, asleep_amounts, awake_amounts, largest

__all__ = ["Claim", "Failures", "Instance", "Waiter"]


@dataclass(slots=True)
class Waiter:
    """A request in the queue of its model."""

    request: int
    model: str
    since: float
    operator: bool
    wait_s: float | None = None
    """How long it waits at most; None: as long as anybody may."""


@dataclass(slots=True)
class Claim:
    """Memory promised to a model that is about to start or wake, and the residents that must leave for it."""

    model: str
    unit: UnitName
    since: float
    need: dict[Key, float]
    """What the unit will hold beyond what it holds now."""
    victims: dict[UnitName, int]
    """Sleep level that each victim goes down to; 0: it stops."""
    beside: bool = False
    """It is for a further instance of a model that is up already."""


@dataclass(slots=True)
class Failures:
    """Failed starts and crashes of a model, one after the other."""

    count: int
    at: float
    retry_at: float
    reason: str
    tail: tuple[str, ...]
    crashed: bool = False
    """The last one was a crash of an engine that had been ready: its waiters go on waiting for the next try."""
    final: bool = False
    """No further start before a reset."""


@dataclass(slots=True)
class Instance:
    """A unit that holds memory, is about to, or failed. Stopped units are forgotten."""

    unit: UnitName
    model: Model | None
    """The definition that its memory is reckoned by; None for an orphan that no configuration of ours knew."""
    phase: Phase
    since: float
    vram_bytes: int = 0
    """Per GPU while awake: declared, estimated, or raised after it did not do."""
    level: int = 0
    definition: str = ""
    reason: str = ""
    tail: tuple[str, ...] = ()
    out_of_memory: bool = False
    """It failed for want of GPU memory."""
    pending: UnitAction | None = None
    in_flight: set[int] = field(default_factory=set)
    elsewhere: int = 0
    """Requests that the gateway's workers admitted to it by themselves and still serve (mmd.policy.leases)."""
    wanted: bool = False
    """Something is to be done with it as soon as it is not lent any more."""
    gate_open: bool = True
    """Closed: new requests queue instead of being admitted, so that it can drain."""
    ready_since: float | None = None
    """When it became ready in this run; waking up does not count. None: it has not been ready yet."""
    spared_until: float = 0.0
    """Adopted: no idle timer ends before this time, unless its last activity has become known."""
    last_activity: float = 0.0
    """When a request was last admitted or ended; 0: none that we know of."""
    held_bytes: int | None = None
    """Measured per GPU while asleep."""
    least_held_bytes: dict[int, int] = field(default_factory=dict)
    """The least that a sleep of this run left, by level: more means that something leaks."""
    release: Release | None = None
    retry_at: float = 0.0
    """After an action on it failed: not before this time again."""
    stale_since: float | None = None
    """Since when its definition differs from the configuration's (or its model is gone from it)."""
    retiring: bool = False
    """Stale for so long that it takes no further requests."""

    def observe(self, seen: Observed, now: float) -> None:
        """Take over what was read; a change of phase restarts `since`."""
        if seen.phase is not self.phase or seen.level != self.level:
            self.since = now
        self.phase, self.level = seen.phase, seen.level
        self.reason, self.tail, self.out_of_memory = seen.reason, seen.tail, seen.out_of_memory
        self.definition = seen.definition or self.definition

    @property
    def changing(self) -> bool:
        """Whether the memory of its GPUs is being changed: the lock on them is held."""
        return self.pending is not None or self.phase in (Phase.STARTING, Phase.STOPPING)

    @property
    def activating(self) -> bool:
        return isinstance(self.pending, Start | Wake) or (self.pending is None and self.phase is Phase.STARTING)

    @property
    def usable(self) -> bool:
        """Whether requests may be admitted to it now."""
        return self.phase is Phase.READY and self.pending is None and self.gate_open

    @property
    def load(self) -> int:
        """Requests in flight."""
        return len(self.in_flight) + self.elsewhere

    @property
    def idle_since(self) -> float:
        return max(self.since, self.last_activity)

    def holds(self) -> dict[Key, float]:
        """What it holds now, of each resource the larger side of a transition: waking takes GPU memory before host memory comes
        back, falling asleep the other way round."""
        if self.model is None or (self.phase in (Phase.STOPPED, Phase.FAILED) and self.pending is None):
            return {}
        awake = awake_amounts(self.model, self.unit.placement, self.vram_bytes)
        level = self.pending.level if isinstance(self.pending, Sleep) else self.level if self.phase is Phase.SLEEPING else 0
        if not level:
            return awake
        asleep = asleep_amounts(self.model, self.unit.placement, self.vram_bytes, level, held_bytes=self.held_bytes)
        return largest(awake, asleep) if isinstance(self.pending, Sleep | Wake) else asleep

    def holds_after(self, level: int, *, held_bytes: int | None = None) -> dict[Key, float]:
        """What it will hold once it sleeps at `level`, or has stopped (0)."""
        if self.model is None or level == 0:
            return {}
        return asleep_amounts(self.model, self.unit.placement, self.vram_bytes, level, held_bytes=held_bytes)

    def leaving_to(self) -> int | None:
        """The level that a pending action takes it down to (0: stopped), or None when it is not on its way out."""
        match self.pending:
            case Sleep(level=level):
                return level
            case Stop():
                return 0
        return 0 if self.phase is Phase.STOPPING else None
