"""A unit as systemd sees it, the outcome of a job, and the events of a connection to systemd."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["ActiveState", "Connected", "Disconnected", "Event", "JobResult", "UnitChanged", "UnitState"]


class ActiveState(StrEnum):
    """ActiveState of org.freedesktop.systemd1(5); `unknown` is a state that a newer systemd has and we do not know."""

    ACTIVE = "active"
    RELOADING = "reloading"
    REFRESHING = "refreshing"
    INACTIVE = "inactive"
    FAILED = "failed"
    ACTIVATING = "activating"
    DEACTIVATING = "deactivating"
    MAINTENANCE = "maintenance"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> "ActiveState":
        return cls.UNKNOWN


class JobResult(StrEnum):
    """How a job ended (the signal JobRemoved). A result unknown to us counts as failed.

    `done` does not mean that the unit runs: a failed Condition gives `done` as well. Read the unit after every job.
    """

    DONE = "done"
    CANCELED = "canceled"
    """Another job took its place: a stop that overtook a start."""
    TIMEOUT = "timeout"
    FAILED = "failed"
    DEPENDENCY = "dependency"
    SKIPPED = "skipped"
    INVALID = "invalid"
    ASSERT = "assert"
    UNSUPPORTED = "unsupported"
    COLLECTED = "collected"
    ONCE = "once"

    @classmethod
    def _missing_(cls, value: object) -> "JobResult":
        return cls.FAILED


@dataclass(frozen=True, slots=True)
class UnitState:
    """What systemd says of one service unit."""

    unit: str
    load_state: str
    """loaded, not-found, masked, error, bad-setting"""
    active_state: ActiveState
    sub_state: str
    """running, start, auto-restart, stop-sigterm, dead, failed, ..."""
    result: str
    """Result of the service: success, exit-code, signal, watchdog, timeout, start-limit-hit, oom-kill, resources, ..."""
    status_text: str
    """What the main process last sent as STATUS=."""
    invocation_id: str
    """32 hexadecimal digits, or empty when it was never started."""
    main_pid: int
    restarts: int
    """Automatic restarts since the last explicit start (NRestarts)."""
    exit_status: int
    """Exit status or signal of the last main process (ExecMainStatus)."""
    since: float
    """Unix seconds of the last change of state; 0 when there was none."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "UnitState":
        """The state that a D-Bus worker sent."""
        return cls(**{**raw, "active_state": ActiveState(raw["active_state"])})


@dataclass(frozen=True, slots=True)
class UnitChanged:
    """A model unit has changed; several changes in quick succession may arrive as one."""

    state: UnitState


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The D-Bus connection is gone; changes are being missed until Connected."""

    reason: str


@dataclass(frozen=True, slots=True)
class Connected:
    """The D-Bus connection is back. Whatever happened meanwhile was missed: read every unit again."""


Event = UnitChanged | Disconnected | Connected
