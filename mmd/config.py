"""The configuration as frozen values: what the rest of mmd reads. The format is mmd.yaml(5); `mmd.load` makes these from it.

Sizes are bytes, durations are seconds. `None` for a duration means that the timer is off.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "AddedPorts",
    "AdminAuth",
    "Config",
    "Device",
    "EngineKind",
    "Evict",
    "Gateway",
    "Gauge",
    "Gpus",
    "Health",
    "Idle",
    "Limits",
    "Listen",
    "Model",
    "Policy",
    "PortProtocol",
    "Provider",
    "Replicas",
    "Resources",
    "Sim",
    "Timeouts",
]


class AdminAuth(StrEnum):
    """What the admin API asks for over TCP."""

    KEY = "key"
    """Where there are API keys, a key of the scope read or admin to look, and one of the scope admin for the rest."""
    READ = "read"
    """Nothing to look at what is not private, a key of the scope admin for the rest."""
    OPEN = "open"
    """Nothing."""


class AddedPorts(StrEnum):
    """Where a model that is added through the admin API may have its own port."""

    LOOPBACK = "loopback"
    ANY = "any"


class Provider(StrEnum):
    AUTO = "auto"
    NVML = "nvml"
    STATIC = "static"
    SIM = "sim"


class Evict(StrEnum):
    MIN_LOSS = "min_loss"
    LRU = "lru"


class EngineKind(StrEnum):
    VLLM = "vllm"
    SIM = "sim"
    COMMAND = "command"
    EXTERNAL = "external"


class Listen(StrEnum):
    """What a `command` engine listens on."""

    TCP = "tcp"
    UNIX = "unix"


class Timeouts(NamedTuple):
    """How long clients may be silent."""

    idle_s: float = 75.0
    request_s: float = 60.0
    body_rate_bytes: int = 16 << 10
    """A second, of a request's body once `request_s` has passed."""
    stalled_s: float = 300.0


class PortProtocol(StrEnum):
    """What a model's own port speaks."""

    HTTP = "http"
    TCP = "tcp"


class Gateway(NamedTuple):
    """The endpoint that clients talk to."""

    listen: tuple[str, ...] = ("127.0.0.1:8000",)
    admin_listen: tuple[str, ...] = ("127.0.0.1:8001",)
    admin_auth: AdminAuth = AdminAuth.KEY
    added_ports: AddedPorts = AddedPorts.LOOPBACK
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    """Names that lead here, besides those that the machine knows for its own."""
    request_log: bool = False
    max_body_bytes: int = 64 << 20
    max_buffered_bytes: int = 1 << 30
    """All bodies together that wait to be passed on."""
    max_head_bytes: int = 32 << 10
    connections_per_client: int | None = 256
    """By IP address; of a client behind one of `trusted_proxies`, requests under way."""
    trusted_proxies: tuple[str, ...] = ()
    """Networks (CIDR) of proxies whose X-Forwarded-For is believed."""
    timeouts: Timeouts = Timeouts()
    queue_limit: int = 512
    wait_limit_s: float = 600.0
    loading_keepalive_s: float | None = 15.0
    workers: int | None = None
    """Processes that relay; None: as the machine's cores suggest."""
    drain_timeout_s: float = 300.0


class Device(NamedTuple):
    """A GPU as configured: for `static` and `sim` its memory, for `nvml` which one."""

    memory_bytes: int | None = None
    selector: int | str | None = None
    """Index or UUID (nvml)."""


class Gpus(NamedTuple):
    """The GPUs that models share."""

    provider: Provider = Provider.AUTO
    reserve_bytes: int = 1 << 30
    devices: tuple[Device, ...] = ()


class Gauge(NamedTuple):
    """A command that prints how much of a resource is free, run every `interval_s`."""

    command: tuple[str, ...]
    interval_s: float = 1.0


class Resources(NamedTuple):
    """Budgets besides the GPUs, each name either among `amounts` or among `commands`.

    Amounts of resources, here and in models, are int where they were written as a size, in bytes, and float where as a number.
    """

    ram_bytes: int | None = None
    """None: what the host has, less what others use of it."""
    amounts: Mapping[str, float] = MappingProxyType({})
    commands: Mapping[str, Gauge] = MappingProxyType({})

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.amounts, *self.commands)


class Policy(NamedTuple):
    """Which model goes when another needs the room."""

    evict: Evict = Evict.MIN_LOSS
    max_wait_s: float = 60.0
    min_residency_s: float = 10.0


class Idle(NamedTuple):
    """What happens to a model that nobody uses."""

    sleep_after_s: float | None = None
    stop_after_s: float | None = None
    min_sleep_s: float = 0.0


class Health(NamedTuple):
    """How mmd knows that an engine works."""

    path: str = "/health"
    interval_s: float = 0.05
    timeout_s: float = 600.0
    """How long a start may go on without any progress."""
    command: tuple[str, ...] = ()
    """A `command` engine's own check, instead of the path; exit status 0 means healthy."""


class Replicas(NamedTuple):
    """How many instances a model may have, each on GPUs of its own."""

    min: int = 0
    """So many stand by without being asked for, as memory permits."""
    max: int = 1
    target_in_flight: int | None = None
    """Requests per instance above which another is worth having; None: the model's concurrency, else 16."""


class Limits(NamedTuple):
    """Limits of a model's unit, systemd.resource-control(5)."""

    memory_max_bytes: int | None = None
    cpu_weight: int | None = None


class Sim(NamedTuple):
    """How a simulated engine behaves."""

    load_time_s: float = 2.0
    wake_time_s: float = 0.2
    tokens_per_second: float = 200.0


class Filters(NamedTuple):
    """What is changed in requests to a model, at the top level of their JSON."""

    strip: tuple[str, ...] = ()
    set: Mapping[str, object] = MappingProxyType({})


class Model(NamedTuple):
    """One model, complete: `defaults` and its profile are merged in."""

    name: str
    id: str
    engine: EngineKind
    aliases: tuple[str, ...] = ()
    profile: str | None = None
    model: str = ""
    """Hub id or path; the name when nothing else is given."""
    venv: Path | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = MappingProxyType({})
    secrets: Mapping[str, Path] = MappingProxyType({})
    """Files that hold the values of variables."""
    gpus: int | tuple[int | str, ...] = 1
    """A count (the scheduler chooses) or explicit indexes or UUIDs; 0 means CPU."""
    vram_bytes: int | None = None
    """Per GPU while awake; None: estimate from `params` and `precision`."""
    params: float | None = None
    precision: str | None = None
    ram_bytes: int = 0
    resources: Mapping[str, float] = MappingProxyType({})
    sleep_level: int = 1
    """The deepest sleep that eviction and idling may use; 0 means off."""
    idle: Idle = Idle()
    replicas: Replicas = Replicas()
    wake_on_request: bool = True
    pin: bool = False
    preload: bool = False
    priority: int = 0
    concurrency: int = 0
    queue_limit: int | None = None
    """With `concurrency`: how many more may wait; None: as many as may for all models together."""
    health: Health = Health()
    restart_on_connection_failure: bool = True
    port: str | None = None
    """An address of its own, on which every request or connection is for it."""
    port_protocol: PortProtocol = PortProtocol.HTTP
    lora: Mapping[str, str] = MappingProxyType({})
    """Adapters: the name that clients send, and a path or hub id."""
    filters: Filters = Filters()
    limits: Limits = Limits()
    description: str = ""
    url: str | None = None
    command: tuple[str, ...] = ()
    workdir: Path | None = None
    listen: Listen = Listen.TCP
    listen_port: int | None = None
    """`listen: tcp:18188` fixes the port; None: a free one is chosen."""
    stop_command: tuple[str, ...] = ()
    endpoint: str | None = None
    sim: Sim = Sim()
    user: str | None = None
    """The system user that its engine runs as; None: one of its own, made when it is needed (mmd.names.model_user)."""
    source: Path = Path("mmd.yaml")
    """The file that defines it."""
    line: int = 0

    @property
    def is_private(self) -> bool:
        """Whether its definition holds what only root may give (mmd.model_settings.ROOT_ONLY)."""
        return self.user is not None or bool(self.secrets)

    @property
    def gpu_count(self) -> int:
        return self.gpus if isinstance(self.gpus, int) else len(self.gpus)


class Config(NamedTuple):
    """All of it."""

    gateway: Gateway = Gateway()
    gpus: Gpus = Gpus()
    resources: Resources = Resources()
    policy: Policy = Policy()
    models: Mapping[str, Model] = MappingProxyType({})
    """By name, in the order of the files."""

    def resolve(self, name: str) -> Model | None:
        """The model that a client means by `name`: a model's name, else an alias, or an adapter of it."""
        model = self.models.get(name)
        if model is not None:
            return model
        return next((m for m in self.models.values() if name in m.aliases or name in m.lora), None)
