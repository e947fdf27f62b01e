"""What the admin API answers besides mmd.status: lists, and what came of what was asked for. Wire format, as there."""

from dataclasses import dataclass

import msgspec

from mmd.status import GpuStatus, ModelStatus, QueuedStatus, RequestStatus

__all__ = [
    "ApiKey",
    "Changes",
    "Checked",
    "Gpus",
    "Keys",
    "KeysTold",
    "Leaving",
    "LogLine",
    "Models",
    "Queue",
    "Registered",
    "Removed",
    "Requests",
    "WrongSetting",
]


@dataclass(frozen=True, slots=True)
class Models:
    models: tuple[ModelStatus, ...]


@dataclass(frozen=True, slots=True)
class Gpus:
    gpus: tuple[GpuStatus, ...]
    problem: str = ""
    """Why they cannot be read at present."""


@dataclass(frozen=True, slots=True)
class Queue:
    """The requests that wait for a model, model by model, the next one first."""

    queue: tuple[QueuedStatus, ...]


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests for models that are not over, the oldest first."""

    requests: tuple[RequestStatus, ...]


@dataclass(frozen=True, slots=True)
class WrongSetting:
    """One mistake in a configuration."""

    file: str
    line: int
    """From 1; 0 when the whole file is meant."""
    key: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in a configuration."""

    ok: bool
    models: int
    gpus: int
    """Those that it declares."""
    problems: tuple[WrongSetting, ...] = ()
    warnings: tuple[WrongSetting, ...] = ()
    """What is permitted and probably not meant; those that API keys do away with are listed in any case."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload changed, names of models; with problems nothing has."""

    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Registered:
    """Models that were added."""

    models: tuple[ModelStatus, ...]
    files: tuple[str, ...]
    """What defines them now."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A unit of a model that was removed, which stops when its requests are answered."""

    unit: str
    in_flight: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A model that was removed."""

    model: str
    files: tuple[str, ...]
    """Those that are gone."""
    leaving: tuple[Leaving, ...] = ()


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of an API key, see mmd-api-keys(5); what does not limit it is left out."""

    name: str
    scope: str
    models: tuple[str, ...] = ()
    rate: str = ""
    concurrency: int = 0
    created: str = ""


@dataclass(frozen=True, slots=True)
class Keys:
    """The API keys in force."""

    serial: int
    required: bool
    """Whether clients need one."""
    keys: tuple[ApiKey, ...]


@dataclass(frozen=True, slots=True)
class KeysTold:
    serial: int
    keys: int
    """How many there are."""


@dataclass(frozen=True, slots=True)
class LogLine:
    time: float
    message: str
    priority: int
    """0 (emergency) to 7 (debug), see syslog(3)."""
    model: str = ""
    """The unit id of the model that wrote it; "" of others."""
    unit: str = ""
    identifier: str = ""
    pid: int = 0
