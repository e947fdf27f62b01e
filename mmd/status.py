"""What the admin API says of the gateway, its GPUs and its models: the wire format between the gateway and mmdctl.

Sizes are bytes, durations seconds, times Unix seconds. Every class turns into JSON and back by `to_json` and `from_json`;
fields unknown to this version are dropped, so that an older mmdctl can read a newer gateway.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, TypeVar

_T = TypeVar("_T")

__all__ = [
    "EstimateStatus",
    "GatewayStatus",
    "GpuStatus",
    "InstanceStatus",
    "ModelState",
    "ModelStatus",
    "Progress",
    "QueuedStatus",
    "Reckoning",
    "RequestStatus",
    "ResourceStatus",
    "SleepStatus",
    "Status",
    "model_from_json",
]


class ModelState(StrEnum):
    """A model's state, as people see it (architecture.md, model states)."""

    PENDING = "pending"
    """Registered, and no engine has been ready with its definition yet."""
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SLEEPING = "sleeping"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"
    EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    version: str
    pid: int
    since: float
    listen: tuple[str, ...] = ()
    scope: str = "system"
    in_flight: int = 0
    waiting: int = 0
    workers: int = 1
    """Processes that relay."""
    systemd: str = "connected"
    """`connected`, or what is wrong."""
    reloaded: float | None = None
    problems: tuple[str, ...] = ()
    """What is wrong with the configuration, one message each; the last good one is in use."""
    warnings: tuple[str, ...] = ()
    """What the configuration in use permits, and is probably not meant: addresses that need no API key, secrets in `env`."""
    gpu_problem: str = ""
    """Why the GPUs cannot be read at present; what was last known of them is in use."""


@dataclass(frozen=True, slots=True)
class GpuStatus:
    index: int
    name: str
    uuid: str
    total_bytes: int
    budget_bytes: int
    """What models may use: total - reserve - foreign use."""
    reserved_bytes: int
    """What the scheduler has given to models: resident and about to be."""
    used_bytes: int | None = None
    """Measured, everybody's; None when the provider cannot measure."""


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """A named resource, `ram` included."""

    name: str
    budget: float | None
    """What models may use in all; None when that is not known, or unlimited."""
    reserved: float
    """What the scheduler has given to models."""
    free: float | None
    in_bytes: bool = False
    problem: str = ""
    """Why it cannot be read at present."""


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One unit of a model: what runs (or failed) on one placement."""

    unit: str
    placement: str
    state: ModelState
    since: float
    sleep_level: int = 0
    status: str = ""
    """The runner's STATUS line, such as `loading weights 45 %`."""
    vram_bytes: int = 0
    """Per GPU, in its present state."""
    in_flight: int = 0
    pid: int = 0
    stale: bool = False
    """Started from an older definition; replaced when it is next idle."""


@dataclass(frozen=True, slots=True)
class EstimateStatus:
    """GPU memory that a model is estimated to need, per GPU: `params` x `bytes_per_weight` / `gpus` of weights, and so on."""

    params: float
    precision: str
    bytes_per_weight: float
    gpus: int
    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class SleepStatus:
    """What a model costs while it sleeps, and until it is awake again."""

    level: int
    held_bytes: int
    """GPU memory, per GPU."""
    measured: bool
    """Whether that is what its last sleep left, not the engine's first guess."""
    host_bytes: int
    """Host memory beyond what it takes awake, reckoned."""
    wake_s: float
    wake_learned: bool


@dataclass(frozen=True, slots=True)
class Reckoning:
    """What a model is reckoned with, and why. Sizes are per GPU."""

    vram_bytes: int
    """What the next start reserves."""
    start_s: float
    start_learned: bool
    """Whether that is how long its last start took, not a guess."""
    declared_bytes: int | None = None
    estimate: EstimateStatus | None = None
    """Where nothing is declared."""
    measured_bytes: int | None = None
    """The most that its processes were seen to hold awake."""
    raised_bytes: int | None = None
    """What it is reckoned with, at least, since it ran out of memory with less."""
    asleep: tuple[SleepStatus, ...] = ()
    """By level: those that eviction and idling may use, and those that were measured."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    name: str
    id: str
    engine: str
    state: ModelState
    aliases: tuple[str, ...] = ()
    description: str = ""
    url: str = ""
    """A link to a page of the model's own; `{host}` stands for this machine."""
    port: str = ""
    """Its own, where there is one."""
    port_protocol: str = ""
    """`http` or `tcp`, of its own port."""
    instances: tuple[InstanceStatus, ...] = ()
    vram_bytes: int = 0
    """Per GPU, awake: declared, else estimated. What has been learned is in `reckoning`."""
    gpus: int = 0
    revision: str = ""
    """The fingerprint of its definition as configured; none of a unit that is no longer configured."""
    reckoning: Reckoning | None = None
    """None of a server that mmd does not start, and of a unit that is no longer configured."""
    in_flight: int = 0
    waiting: int = 0
    requests: int = 0
    """Served since the gateway started."""
    pinned: bool = False
    last_activity: float | None = None
    reason: str = ""
    """Why it failed or cannot start."""
    tail: tuple[str, ...] = ()
    """The engine's last log lines before a failure."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def without_private(self) -> "ModelStatus":
        """For somebody who may not see what engines log."""
        return replace(self, tail=())


@dataclass(frozen=True, slots=True)
class Status:
    gateway: GatewayStatus
    gpus: tuple[GpuStatus, ...] = ()
    models: tuple[ModelStatus, ...] = ()
    resources: tuple[ResourceStatus, ...] = ()
    """Those that are declared; ram where some model needs or holds any."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def without_private(self) -> "Status":
        """For somebody who may see neither what engines log, nor what is written in the configuration."""
        hidden = (f"{len(self.gateway.problems)}, not shown without a key for administration",) if self.gateway.problems else ()
        models = tuple(model.without_private() for model in self.models)
        return replace(self, gateway=replace(self.gateway, problems=hidden, warnings=()), models=models)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Status":
        return cls(
            gateway=_read(GatewayStatus, raw["gateway"]),
            gpus=tuple(_read(GpuStatus, gpu) for gpu in raw["gpus"]),
            models=tuple(model_from_json(model) for model in raw["models"]),
            resources=tuple(_read(ResourceStatus, resource) for resource in raw.get("resources", ())),
        )


def model_from_json(raw: Mapping[str, Any]) -> ModelStatus:
    """A ModelStatus from its JSON form (the answer of GET /api/v1/models/{name})."""
    instances = tuple(
        _read(InstanceStatus, {**instance, "state": ModelState(instance["state"])}) for instance in raw["instances"]
    )
    found = {**raw, "state": ModelState(raw["state"]), "instances": instances, "reckoning": _reckoning(raw.get("reckoning"))}
    return _read(ModelStatus, found)


def _reckoning(raw: Mapping[str, Any] | None) -> Reckoning | None:
    if raw is None:
        return None
    estimate = None if raw["estimate"] is None else _read(EstimateStatus, raw["estimate"])
    return _read(Reckoning, {**raw, "estimate": estimate, "asleep": tuple(_read(SleepStatus, each) for each in raw["asleep"])})


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of the answer to an operation (start, verify, stop, restart, sleep, wake): newline-delimited JSON.

    Lines with `done` false tell how it goes; exactly one with `done` true ends the answer.
    """

    model: str
    state: ModelState
    message: str
    """For people: `loading weights 45 %`, `awake in 1.8 s, 14.2 GiB`."""
    done: bool = False
    ok: bool = True
    elapsed_s: float = 0.0
    vram_bytes: int | None = None
    """Held now, per GPU (last line)."""
    freed_bytes: int | None = None
    """By a sleep or a stop, measured, per GPU (last line); of several instances the most. None where nothing can measure it."""
    tail: tuple[str, ...] = ()
    """After a failed start: the engine's last log lines."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Progress":
        return _read(cls, {**raw, "state": ModelState(raw["state"])})


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A request for a model that is not over."""

    id: str
    """Of this gateway: what a cancel takes, and the answer's X-Request-Id where the client brought none of its own."""
    client_id: str
    """The client's own X-Request-Id; "" without one."""
    model: str
    method: str
    path: str
    state: str
    """`waiting` for its model, `sent` to the engine, or `answering`."""
    since: float
    stream: bool
    client: str
    """The client's address; `unix` on a Unix socket."""
    sent_bytes: int = 0
    """Of the answer, so far."""
    tokens: int | None = None
    """In the answer so far, where the engine tells while it streams."""
    key: str = ""
    """The name of the API key that it came with."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "RequestStatus":
        return _read(cls, raw)


@dataclass(frozen=True, slots=True)
class QueuedStatus:
    """A place in the queue of a model."""

    model: str
    position: int
    """From 1: the next one."""
    since: float
    waits_for: str
    """In words: `making room: qwen7b must leave`."""
    operator: bool = False
    """It is an operator who asks."""


def _read(cls: type[_T], raw: Mapping[str, Any]) -> _T:
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items() if key in known})
