"""What the gateway tells of as it happens (GET /api/v1/events): one frozen dataclass per kind, the wire format as well.

Sizes are bytes, durations seconds, times Unix seconds. `message` is for people: the whole event in one line.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mmd.status import ModelState

__all__ = [
    "ActionBegun",
    "ActionEnded",
    "Event",
    "Evicted",
    "GatewayReplaced",
    "GatewayStarted",
    "GpusMeasured",
    "Missed",
    "ModelChanged",
    "QueueChanged",
    "Reloaded",
    "to_json",
    "without_private",
]


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model is in another state."""

    time: float
    message: str
    model: str
    before: ModelState
    state: ModelState
    type: Literal["model_changed"] = "model_changed"


@dataclass(frozen=True, slots=True)
class ActionBegun:
    """Something is being done to a unit."""

    time: float
    message: str
    model: str
    unit: str
    action: str
    """`start`, `wake`, `sleep` or `stop`."""
    why: str
    level: int = 0
    """Of sleep: the one that it goes to, or wakes from."""
    type: Literal["action_begun"] = "action_begun"


@dataclass(frozen=True, slots=True)
class ActionEnded:
    """It is done, or has failed."""

    time: float
    message: str
    model: str
    unit: str
    action: str
    ok: bool
    elapsed_s: float
    held_bytes: int | None = None
    """GPU memory that the unit holds since, per GPU, measured; null where nothing can measure it."""
    freed_bytes: int | None = None
    """GPU memory that a sleep or a stop freed, per GPU, measured."""
    type: Literal["action_ended"] = "action_ended"


@dataclass(frozen=True, slots=True)
class Evicted:
    """A model makes room for another one; what is done to its unit follows as an action."""

    time: float
    message: str
    model: str
    unit: str
    makes_room_for: str
    level: int = 0
    """The sleep level that it goes down to; 0: it is stopped."""
    type: Literal["evicted"] = "evicted"


@dataclass(frozen=True, slots=True)
class QueueChanged:
    """More or fewer requests wait; told twice a second at most."""

    time: float
    message: str
    waiting: Mapping[str, int]
    """By model name, those only that somebody waits for."""
    type: Literal["queue_changed"] = "queue_changed"


@dataclass(frozen=True, slots=True)
class GpusMeasured:
    """The memory in use has changed, or whether it can be measured; told once a second at most."""

    time: float
    message: str
    used_bytes: Mapping[str, int | None]
    """By GPU index; null: not measured."""
    problem: str = ""
    type: Literal["gpus_measured"] = "gpus_measured"


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The configuration was read again; with problems, the one before stays in use."""

    time: float
    message: str
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    type: Literal["reloaded"] = "reloaded"


@dataclass(frozen=True, slots=True)
class GatewayStarted:
    """This gateway decides from now on: it has started, or taken over from the one before it."""

    time: float
    message: str
    version: str
    pid: int
    type: Literal["gateway_started"] = "gateway_started"


@dataclass(frozen=True, slots=True)
class GatewayReplaced:
    """Another process decides from now on; the stream of events ends, and goes on there."""

    time: float
    message: str
    pid: int
    type: Literal["gateway_replaced"] = "gateway_replaced"


@dataclass(frozen=True, slots=True)
class Missed:
    """There were events that this stream does not have: they are too long ago, or the client did not keep up."""

    time: float
    message: str
    type: Literal["missed"] = "missed"


Event = (
    ModelChanged
    | ActionBegun
    | ActionEnded
    | Evicted
    | QueueChanged
    | GpusMeasured
    | Reloaded
    | GatewayStarted
    | GatewayReplaced
    | Missed
)


def without_private(event: Event) -> Event:
    """The event for somebody who may not see what is private: problems of a configuration repeat what is written in it."""
    if isinstance(event, Reloaded) and event.problems:
        message = f"the configuration has {len(event.problems)} problems"
        return replace(event, message=message, problems=("not shown without a key for administration",))
    return event


def to_json(event: Event) -> dict[str, Any]:
    return asdict(event)
