"""The one table of settings: key, kind, default, explanation. Everything else that knows the format is made from it: the
loader, the JSON Schema, `mmdctl config`, and the list of settings in mmd.yaml(5) (mmd.manual).

Defaults are written as in YAML; a test holds them against mmd.config, where they take effect.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmd import config, kinds
from mmd.config import EngineKind
from mmd.kinds import Kind
from mmd.sizes import BYTES_PER_WEIGHT

__all__ = ["DEFAULTS", "MODEL", "PROFILE", "TOP", "Entry", "Later", "Section", "Setting", "walk"]


class Setting(NamedTuple):
    """A key with a value."""

    key: str
    kind: Kind
    default: str
    """As in YAML; empty when there is none."""
    doc: str
    field: str = ""
    """Its name in mmd.config; the key when that is the same."""
    engines: frozenset[EngineKind] = frozenset(EngineKind)
    """The engines that it applies to."""


class Later(NamedTuple):
    """A key of the format that this version does not support; it is rejected by name, never ignored."""

    key: str
    doc: str
    only: Any = None
    """The one value that is fine, since it asks for nothing."""


class Section(NamedTuple):
    """A key with a mapping of keys."""

    key: str
    doc: str
    entries: Mapping[str, "Entry"]
    make: type[Any] | None = None
    """The class in mmd.config; None: its settings belong to the class around it."""
    others: Setting | None = None
    """For every other key, where people choose the names."""
    names: Kind | None = None
    engines: frozenset[EngineKind] = frozenset(EngineKind)


Entry = Setting | Later | Section


def _entries(*entries: Entry) -> dict[str, Entry]:
    return {entry.key: entry for entry in entries}


_ALL = frozenset(EngineKind)
_STARTED = _ALL - {EngineKind.EXTERNAL}
_SLEEPING = frozenset({EngineKind.VLLM, EngineKind.SIM})
_COMMAND = frozenset({EngineKind.COMMAND})
_PROGRAM = frozenset({EngineKind.COMMAND, EngineKind.VLLM})

_GATEWAY = Section(
    "gateway",
    "The endpoint that clients talk to.",
    _entries(
        Setting(
            "listen",
            kinds.listing(kinds.ADDRESS, at_least=1),
            '["127.0.0.1:8000"]',
            "Where the OpenAI API listens: TCP addresses or paths of Unix sockets (group mmd). IPv6 as [::1]:8000.",
        ),
        Setting(
            "admin_listen",
            kinds.listing(kinds.TCP_ADDRESS),
            '["127.0.0.1:8001"]',
            "Where the admin API and the dashboard listen over TCP, besides the Unix socket; [] means on the socket only.",
        ),
        Setting(
            "admin_auth",
            kinds.choice(config.AdminAuth, make=config.AdminAuth),
            "key",
            "Who may change things over admin_listen: key (without an admin key it is read-only) or open (everybody).",
        ),
        Later("cors_origins", "Web origins that browsers may call the API from."),
        Setting("request_log", kinds.BOOLEAN, "false", "Whether each request is logged, without its content."),
        Setting("max_body", kinds.SIZE, "64MiB", "The largest request body; a larger one gets 413.", "max_body_bytes"),
        Setting(
            "queue_limit",
            kinds.integer(0, 1_000_000),
            "512",
            "How many requests may wait for models, all models together; one more gets 503 with Retry-After.",
        ),
        Setting(
            "wait_limit",
            kinds.PERIOD,
            "10min",
            "How long a request waits for its model at most; then it gets 504.",
            "wait_limit_s",
        ),
        Setting(
            "loading_keepalive",
            kinds.PERIOD_OR_OFF,
            "15s",
            "A stream whose model is still loading gets its 200 and a comment line this often; off means it gets nothing until "
            "the model answers.",
            "loading_keepalive_s",
        ),
        Later("workers", "Relay processes.", only=1),
        Setting(
            "drain_timeout",
            kinds.DURATION,
            "5min",
            "How long requests in flight may go on when the gateway stops.",
            "drain_timeout_s",
        ),
    ),
    config.Gateway,
)

_GPUS = Section(
    "gpus",
    "The GPUs that models share.",
    _entries(
        Setting(
            "provider",
            kinds.choice(config.Provider, make=config.Provider),
            "auto",
            "Where the memory of GPUs is read: nvml (NVIDIA's driver), static (as declared in devices), sim (simulated, for "
            "the sim engine), or auto (nvml where there is a driver, else no GPU).",
        ),
        Setting("reserve", kinds.SIZE, "1GiB", "Memory that is kept free on each GPU.", "reserve_bytes"),
        Setting(
            "devices",
            kinds.listing(kinds.DEVICE),
            "[]",
            "With nvml or auto: use these GPUs only, by index or UUID. With static or sim: the GPUs that there are, such as "
            "[{memory: 24GiB}].",
        ),
    ),
    config.Gpus,
)

_RESOURCES = Section(
    "resources",
    "What models need besides GPUs. Any name may be declared with an amount; models claim shares of it in their own resources.",
    _entries(
        Setting(
            "ram",
            kinds.RAM,
            "auto",
            "Host memory for models that sleep at level 1 and for what models declare as ram; auto means what the host has.",
            "ram_bytes",
        ),
    ),
    config.Resources,
    Setting("NAME", kinds.RESOURCE_AMOUNT, "", "How much there is of the resource NAME."),
    kinds.RESOURCE_NAME,
)

_POLICY = Section(
    "policy",
    "Which model goes when another needs the room.",
    _entries(
        Setting(
            "evict",
            kinds.choice(config.Evict, make=config.Evict),
            "min_loss",
            "The victim: min_loss (cheapest to lose) or lru (idle longest).",
        ),
        Setting(
            "max_wait",
            kinds.DURATION,
            "60s",
            "When a request has waited this long, busy victims take no more requests, finish and make room.",
            "max_wait_s",
        ),
        Setting(
            "min_residency",
            kinds.DURATION,
            "10s",
            "How long a model stays after it has become ready, or twice the time that it took to come, if that is less.",
            "min_residency_s",
        ),
    ),
    config.Policy,
)

_IDLE = Section(
    "idle",
    "What happens to a model that nobody uses.",
    _entries(
        Setting(
            "sleep_after", kinds.PERIOD_OR_OFF, "off", "Put it to sleep after this long without a request.", "sleep_after_s"
        ),
        Setting("stop_after", kinds.PERIOD_OR_OFF, "off", "Stop it after this long without a request.", "stop_after_s"),
        Setting("min_sleep", kinds.DURATION, "0s", "Stay asleep for at least this long before it is stopped.", "min_sleep_s"),
    ),
    config.Idle,
    engines=_STARTED,
)

_HEALTH = Section(
    "health",
    "How mmd knows that the engine works.",
    _entries(
        Setting("path", kinds.HTTP_PATH, "/health", "GET this path; 200 means healthy."),
        Setting("interval", kinds.PERIOD, "50ms", "How often it is asked while it starts.", "interval_s"),
        Setting(
            "timeout",
            kinds.PERIOD,
            "10min",
            "How long a start may go on without any progress, in log lines or otherwise, before it has failed.",
            "timeout_s",
        ),
        Setting(
            "command",
            kinds.listing(kinds.WORD, at_least=1),
            "",
            "A program that checks instead of the path; exit status 0 means healthy. Knows the macros of command.",
            engines=_COMMAND,
        ),
    ),
    config.Health,
)

_LIMITS = Section(
    "limits",
    "Limits of the unit, see systemd.resource-control(5).",
    _entries(
        Setting("memory_max", kinds.POSITIVE_SIZE, "", "MemoryMax=: host memory that the engine may use.", "memory_max_bytes"),
        Setting("cpu_weight", kinds.integer(1, 10_000), "", "CPUWeight=: its share of the CPUs; 100 is everybody's default."),
    ),
    config.Limits,
    engines=_STARTED,
)

_SIM = Section(
    "sim",
    "The simulated engine.",
    _entries(
        Setting("load_time", kinds.DURATION, "2s", "How long it takes to start.", "load_time_s"),
        Setting("wake_time", kinds.DURATION, "200ms", "How long it takes to wake from level 1.", "wake_time_s"),
        Setting("tokens_per_second", kinds.number(0.001), "200", "How fast it answers."),
    ),
    config.Sim,
    engines=frozenset({EngineKind.SIM}),
)

MODEL = Section(
    "model",
    "A model. Its key is the name that clients send.",
    _entries(
        Setting("id", kinds.ID, "", "The name in its unit, mmd-model-ID@.service; default: made from the name."),
        Setting("aliases", kinds.listing(kinds.NAME), "[]", "Other names that clients may send."),
        Setting("profile", kinds.NAME, "", "The profile whose keys come before the model's own."),
        Setting(
            "engine",
            kinds.choice(EngineKind, make=EngineKind, later=("sglang", "llama.cpp", "container")),
            "vllm",
            "What serves it: vllm; command (any program with an OpenAI API); external (a server that somebody else runs); sim "
            "(simulated, for tests and demonstrations).",
        ),
        Setting("model", kinds.TEXT, "", "Hub id or path of the model; default: the name."),
        Setting("venv", kinds.PATH, "", "A Python environment; its bin directory goes first on PATH.", engines=_PROGRAM),
        Setting("args", kinds.listing(kinds.WORD), "[]", "More arguments for the engine.", engines=_STARTED),
        Setting(
            "env",
            kinds.mapping(kinds.VARIABLE_NAME, kinds.WORD),
            "{}",
            "Environment variables for the engine.",
            engines=_STARTED,
        ),
        Setting(
            "gpus",
            kinds.GPUS,
            "1",
            "How many GPUs it needs (the scheduler chooses), or which ones, by index or UUID; 0 means that it runs on the CPU.",
            engines=_STARTED,
        ),
        Setting(
            "vram",
            kinds.VRAM,
            "auto",
            "Memory that it takes on each of its GPUs while awake; auto means an estimate from params and precision.",
            "vram_bytes",
            _STARTED,
        ),
        Setting("params", kinds.COUNT, "", "How many parameters it has, such as 7.6B.", engines=_STARTED),
        Setting(
            "precision", kinds.choice(BYTES_PER_WEIGHT), "", "What a parameter is stored in; default: bf16.", engines=_STARTED
        ),
        Setting("ram", kinds.SIZE, "0", "Host memory that it needs while it runs.", "ram_bytes", _STARTED),
        Setting(
            "resources",
            kinds.mapping(kinds.RESOURCE_NAME, kinds.AMOUNT),
            "{}",
            "Amounts that it needs of the resources declared at the top.",
            engines=_STARTED,
        ),
        Section(
            "sleep",
            "Sleep keeps the process and gives the GPU's memory back.",
            _entries(
                Setting(
                    "level",
                    kinds.SLEEP_LEVEL,
                    "1",
                    "The deepest sleep that eviction and idling may use: 1 keeps the weights in host memory, 2 drops them, off "
                    "means that it is stopped instead.",
                    "sleep_level",
                ),
            ),
            engines=_SLEEPING,
        ),
        _IDLE,
        Setting("wake_on_request", kinds.BOOLEAN, "true", "Whether a request wakes or starts it.", engines=_STARTED),
        Setting("pin", kinds.BOOLEAN, "false", "Never evicted.", engines=_STARTED),
        Setting("preload", kinds.BOOLEAN, "false", "Started together with the gateway.", engines=_STARTED),
        Setting("priority", kinds.integer(-1000, 1000), "0", "Among waiting requests, higher comes first.", engines=_STARTED),
        Setting(
            "concurrency",
            kinds.integer(0, 1_000_000),
            "0",
            "How many requests it gets at a time, the others wait; 0 means no limit.",
        ),
        _HEALTH,
        Setting(
            "restart_on_connection_failure",
            kinds.BOOLEAN,
            "true",
            "Restart the engine once and try again when it cannot be reached and nothing was sent to the client yet.",
            engines=_STARTED,
        ),
        Later("port", "A port of its own."),
        Later("port_protocol", "What its own port speaks."),
        Later("lora", "LoRA adapters, each a model for clients."),
        Later("filters", "Changes to requests on their way."),
        _LIMITS,
        Setting("description", kinds.TEXT, '""', "For people."),
        Setting("url", kinds.TEXT, "", "A link to a page of the model's own; {host} stands for this machine."),
        Setting(
            "command",
            kinds.listing(kinds.WORD, at_least=1),
            "",
            "The program and its arguments. Macros: {port} {socket} {gpus} {model} {id}.",
            engines=_COMMAND,
        ),
        Setting("workdir", kinds.PATH, "", "The directory that it starts in.", engines=_PROGRAM),
        Setting(
            "listen",
            kinds.ENGINE_LISTEN,
            "tcp",
            "What the program listens on: tcp (a free port of loopback, see {port}), tcp:PORT, or unix (see {socket}).",
            engines=_COMMAND,
        ),
        Setting(
            "stop_command",
            kinds.listing(kinds.WORD),
            "[]",
            "Run to stop it, before SIGTERM. Knows the macros.",
            engines=_COMMAND,
        ),
        Setting("endpoint", kinds.URL, "", "Where the server is, http://host:port.", engines=frozenset({EngineKind.EXTERNAL})),
        _SIM,
    ),
    config.Model,
)


def _without(*keys: str) -> dict[str, Entry]:
    return {key: entry for key, entry in MODEL.entries.items() if key not in keys}


DEFAULTS = MODEL._replace(key="defaults", entries=_without("id", "aliases"), doc="Model keys that come under every model.")
"""A key that does not apply to a model's engine is skipped for that model."""

PROFILE = MODEL._replace(key="profile", entries=_without("id", "aliases", "profile"))

TOP = Section("", "The file.", _entries(_GATEWAY, _GPUS, _RESOURCES, _POLICY))
"""The sections besides `defaults`, `profiles` and `models`, which hold model keys."""


def walk(section: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """Every key below `section` with its path, sections before what is in them."""
    for entry in (*section.entries.values(), *((section.others,) if section.others else ())):
        yield (*path, entry.key), entry
        if isinstance(entry, Section):
            yield from walk(entry, (*path, entry.key))
