"""What the scheduler wants done. Every Start, Wake, Sleep and Stop is answered by exactly one `Done`."""

from dataclasses import dataclass, field
from enum import StrEnum

from mmd.names import UnitName

__all__ = ["Action", "Admit", "Lend", "Recall", "Refusal", "Refuse", "Sleep", "Start", "Stop", "UnitAction", "Wake"]


class Refusal(StrEnum):
    """Why a request is turned away."""

    UNKNOWN_MODEL = "unknown_model"
    QUEUE_FULL = "queue_full"
    MODEL_BUSY = "model_busy"
    NEVER_FITS = "never_fits"
    START_FAILED = "start_failed"
    BACKING_OFF = "backing_off"
    ASLEEP = "asleep"
    WAITED_TOO_LONG = "waited_too_long"
    REMOVED = "removed"
    STOPPED = "stopped"
    GPUS_UNREADABLE = "gpus_unreadable"


@dataclass(frozen=True, slots=True)
class Admit:
    """Forward the request to this instance now."""

    request: int
    unit: UnitName


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the request with an error."""

    request: int
    why: Refusal
    message: str
    retry_after_s: float | None = None
    """When trying again makes sense; None: not before somebody has changed something."""
    tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lend:
    """The gateway's workers may admit requests to this unit without asking."""

    unit: UnitName


@dataclass(frozen=True, slots=True)
class Recall:
    """They may not any more. Answered by exactly one `Returned`, once all of them know."""

    unit: UnitName


# `serial` tells actions apart that are otherwise alike: the `Done` of a start that was given up must not end the next one.


@dataclass(frozen=True, slots=True)
class Start:
    unit: UnitName
    serial: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Wake:
    unit: UnitName
    level: int
    """What it sleeps at."""
    serial: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Sleep:
    unit: UnitName
    level: int
    expected_bytes: int
    """What it should still hold per GPU afterwards, at most: the sleep is verified against it."""
    serial: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Stop:
    unit: UnitName
    serial: int = field(default=0, compare=False)


UnitAction = Start | Wake | Sleep | Stop
Action = Admit | Refuse | Lend | Recall | UnitAction
