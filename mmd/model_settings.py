"""The table of settings of a model, see mmd.settings."""

from mmd import config, kinds, variables
from mmd.amounts import AMOUNT
from mmd.config import EngineKind
from mmd.setting import Entry, Section, Setting, by_key
from mmd.sizes import BYTES_PER_WEIGHT

__all__ = ["DEFAULTS", "MODEL", "PROFILE", "ROOT_ONLY"]

ROOT_ONLY = frozenset({"secrets", "user"})
"""Model settings that only root may choose, for each model in mmd.yaml or models.d: the registrar refuses them (mmd.registry),
and neither defaults nor profiles hold them, since a model that was added by the gateway may name a profile."""

_ALL = frozenset(EngineKind)
_STARTED = _ALL - {EngineKind.EXTERNAL}
_SLEEPING = frozenset({EngineKind.VLLM, EngineKind.SIM})
_COMMAND = frozenset({EngineKind.COMMAND})
_PROGRAM = frozenset({EngineKind.COMMAND, EngineKind.VLLM})

_IDLE = Section(
    "idle",
    "What happens to a model that nobody uses.",
    by_key(
        Setting(
            "sleep_after", kinds.PERIOD_OR_OFF, "off", "Put it to sleep after this long without a request.", "sleep_after_s"
        ),
        Setting("stop_after", kinds.PERIOD_OR_OFF, "off", "Stop it after this long without a request.", "stop_after_s"),
        Setting("min_sleep", kinds.DURATION, "0s", "Stay asleep for at least this long: requests wait.", "min_sleep_s"),
    ),
    config.Idle,
    engines=_STARTED,
)

_REPLICAS = Section(
    "replicas",
    "How many instances it may have, each on GPUs of its own; requests go to the least loaded.",
    by_key(
        Setting(
            "min",
            kinds.integer(0, 64),
            "0",
            "So many are started with the gateway, come back after an eviction as soon as there is free memory, and are left "
            "alone by idle.",
        ),
        Setting(
            "max",
            kinds.integer(1, 64),
            "1",
            "While there are more than target_in_flight requests for each, another is started, until there are so many: in "
            "free memory, or in place of idle models that are asked for less.",
        ),
        Setting(
            "target_in_flight",
            kinds.integer(1, 1_000_000),
            "",
            "Requests, in flight or waiting, that each should have at most; default: the model's concurrency, else 16.",
        ),
    ),
    config.Replicas,
    engines=_STARTED,
)

_FILTERS = Section(
    "filters",
    "What is changed in the JSON of its requests, at the top level.",
    by_key(
        Setting("strip", kinds.listing(kinds.TEXT), "[]", "Fields that are left out."),
        Setting(
            "set", kinds.mapping(kinds.TEXT, kinds.ANY), "{}", "Fields and the value that they get, whatever the client sent."
        ),
    ),
    config.Filters,
)

_HEALTH = Section(
    "health",
    "How mmd knows that the engine works.",
    by_key(
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
    by_key(
        Setting("memory_max", kinds.POSITIVE_SIZE, "", "MemoryMax=: host memory that the engine may use.", "memory_max_bytes"),
        Setting("cpu_weight", kinds.integer(1, 10_000), "", "CPUWeight=: its share of the CPUs; 100 is everybody's default."),
    ),
    config.Limits,
    engines=_STARTED,
)

_SIM = Section(
    "sim",
    "The simulated engine, which answers what clients of vLLM, llama.cpp, OpenAI and Anthropic ask, without a model.",
    by_key(
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
    by_key(
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
            variables.ENVIRONMENT,
            "{}",
            "Environment variables for the engine. Every user of the machine can read them: see secrets.",
            engines=_STARTED,
        ),
        Setting(
            "secrets",
            variables.SECRETS,
            "{}",
            "Environment variables for the engine whose values nobody else can read: a file for each, which holds the value "
            "and may be readable by root alone. Not in defaults, profiles, or models added by the gateway.",
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
            kinds.mapping(kinds.RESOURCE_NAME, AMOUNT),
            "{}",
            "Amounts that it needs of the resources declared at the top.",
            engines=_STARTED,
        ),
        Section(
            "sleep",
            "Sleep keeps the process and gives the GPU's memory back.",
            by_key(
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
        _REPLICAS,
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
        Setting(
            "queue_limit",
            kinds.NUMBER_OR_OFF,
            "off",
            "With concurrency: how many requests more may wait for it; one more gets 429 with Retry-After. While it loads, as "
            "many as concurrency says may wait besides. off means that only gateway.queue_limit counts.",
        ),
        _HEALTH,
        Setting(
            "restart_on_connection_failure",
            kinds.BOOLEAN,
            "true",
            "Restart the engine once and try again when it cannot be reached and nothing was sent to the client yet.",
            engines=_STARTED,
        ),
        Setting(
            "port",
            kinds.ADDRESS,
            "",
            "A port of its own: a TCP address, or a Unix socket in /run/mmd/ports. Whatever is asked there is for this model.",
        ),
        Setting(
            "port_protocol",
            kinds.choice(config.PortProtocol, make=config.PortProtocol),
            "http",
            "What its own port speaks: http (the model is started by a request), or tcp (any protocol: it is started by a "
            "connection, and in use while bytes move).",
        ),
        Setting(
            "lora",
            kinds.mapping(kinds.TEXT, kinds.TEXT),
            "{}",
            "LoRA adapters by name: a path or hub id each. To clients each is a model of its own name.",
            engines=_SLEEPING,
        ),
        _FILTERS,
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
            "user",
            kinds.USER,
            "",
            "The system user that it runs as, which must exist; default: one of its own, made when it is first started.",
            engines=_STARTED,
        ),
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


DEFAULTS = MODEL._replace(
    key="defaults",
    entries=_without("id", "aliases", "port", "port_protocol", *ROOT_ONLY),
    doc="Model keys that come under every model.",
)
"""A key that does not apply to a model's engine is skipped for that model. Secrets are not among them, nor in profiles: whoever
may add a model that runs any program would get them."""

PROFILE = MODEL._replace(key="profile", entries=_without("id", "aliases", "profile", "port", *ROOT_ONLY))
