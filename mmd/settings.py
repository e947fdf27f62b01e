"""The one table of settings: key, kind, default, explanation. Everything else that knows the format is made from it: the
loader, the JSON Schema, `mmdctl config`, and the list of settings in mmd.yaml(5) (mmd.manual).

Defaults are written as in YAML; a test holds them against mmd.config, where they take effect. Those of a model are in
mmd.model_settings.
"""

from mmd import config, kinds
from mmd.amounts import RESOURCE
from mmd.networks import NETWORK
from mmd.origins import HOST_NAME, ORIGIN
from mmd.setting import Section, Setting, by_key

__all__ = ["TOP"]

_TIMEOUTS = Section(
    "timeouts",
    "How long clients may be silent. One that waits for an answer may wait.",
    by_key(
        Setting("idle", kinds.PERIOD, "75s", "A connection without a request is closed after this long.", "idle_s"),
        Setting(
            "request",
            kinds.PERIOD,
            "60s",
            "A request's head must be complete this long after its first byte, and of its body something must come this "
            "often, and all of it in time, see body_rate; else it gets 408.",
            "request_s",
        ),
        Setting(
            "body_rate",
            kinds.POSITIVE_SIZE,
            "16KiB",
            "How much of a request's body must have come for each second after the first ones, which are as many as request "
            "says; else it gets 408. So a body takes at most request and its length divided by this.",
            "body_rate_bytes",
        ),
        Setting(
            "stalled",
            kinds.PERIOD,
            "5min",
            "A client that reads nothing of its answer for this long is cut off, and its request at the engine with it. That "
            "holds for the last bytes of an answer, for streams, WebSockets and raw ports as well.",
            "stalled_s",
        ),
    ),
    config.Timeouts,
)

_GATEWAY = Section(
    "gateway",
    "The endpoint that clients talk to.",
    by_key(
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
            "Who may do what over admin_listen. key: where there are API keys, looking needs one of the scope read or admin; "
            "what is private (logs, requests, keys, the configuration) and changes need one of the scope admin. read: looking "
            "needs none. open: nothing needs one.",
        ),
        Setting(
            "added_ports",
            kinds.choice(config.AddedPorts, make=config.AddedPorts),
            "loopback",
            "What ports of their own models may have that are added through the admin API: loopback (from 1024 on, at loopback "
            "addresses, or a Unix socket) or any.",
        ),
        Setting(
            "cors_origins",
            kinds.listing(ORIGIN),
            "[]",
            "Web origins whose pages may call the API from a browser, such as https://app.example; * means all of them, but "
            "the admin API changes nothing for an origin that is not named.",
        ),
        Setting(
            "hosts",
            kinds.listing(HOST_NAME),
            "[]",
            "Names by which clients may ask for the gateway and for models' HTTP ports without an API key (Host), besides "
            "addresses, the machine's own names, localhost, host.docker.internal and host.containers.internal. Any other name "
            "is refused: a web page could have it lead here.",
        ),
        Setting("request_log", kinds.BOOLEAN, "false", "Whether each request is logged, without its content."),
        Setting("max_body", kinds.SIZE, "64MiB", "The largest request body; a larger one gets 413.", "max_body_bytes"),
        Setting(
            "max_buffered",
            kinds.SIZE,
            "1GiB",
            "How much the bodies of requests may take all together that are still coming, or wait for their model or the "
            "beginning of their answer; a request for which there is no room gets 503. With workers each has an equal share. "
            "There is room for one body of max_body in any case. One client (see connections_per_client; all on this machine "
            "are one) may have a quarter of it, or one body, and more only while a quarter stays free for the others.",
            "max_buffered_bytes",
        ),
        Setting(
            "max_head",
            kinds.SIZE,
            "32KiB",
            "The largest head of a request, 4KiB to 1MiB; a larger one gets 431.",
            "max_head_bytes",
        ),
        Setting(
            "connections_per_client",
            kinds.NUMBER_OR_OFF,
            "256",
            "How many connections one client may have over TCP, that is an IPv4 address or an IPv6 network of 64 bits; one "
            "more gets 429, at a raw port of a model a reset. Models' ports count for themselves; with workers each process "
            "has an equal share, rounded up. Clients on this machine and trusted_proxies have no limit; for clients behind the "
            "latter it bounds their requests under way.",
        ),
        Setting(
            "trusted_proxies",
            kinds.listing(NETWORK),
            "[]",
            "Networks of proxies, such as [10.0.0.5/32]. From their connections X-Forwarded-For tells the client that a "
            "request is from (the rightmost address that is none of them) to connections_per_client, max_buffered, the log and "
            "the list of requests, and engines get X-Forwarded-*, Forwarded and X-Real-IP as they come; from all others these "
            "fields are ignored and go to no engine.",
        ),
        _TIMEOUTS,
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
        Setting(
            "workers",
            kinds.WORKERS,
            "auto",
            "Processes that relay. With 1 the gateway does so itself; with more, they share its sockets and it decides. auto: "
            "one for every 8 CPU cores, 4 at most. A change takes effect without a gap.",
        ),
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
    by_key(
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
    "What models need besides GPUs. Any name may be declared, with an amount or a command that prints what is free; models "
    "claim shares of it in their own resources.",
    by_key(
        Setting(
            "ram",
            kinds.RAM,
            "auto",
            "Host memory for models that sleep at level 1 and for what models declare as ram; auto means what the host has, "
            "less what others use at present and a reserve of 5 % (at most 4GiB).",
            "ram_bytes",
        ),
    ),
    config.Resources,
    Setting("NAME", RESOURCE, "", "How much there is of NAME, or a command that prints how much of it is free, see RESOURCES."),
    kinds.RESOURCE_NAME,
)

_POLICY = Section(
    "policy",
    "Which model goes when another needs the room.",
    by_key(
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
            "How long a model stays after it has become ready, or as long as coming back takes it, if that is less.",
            "min_residency_s",
        ),
    ),
    config.Policy,
)

TOP = Section("", "The file.", by_key(_GATEWAY, _GPUS, _RESOURCES, _POLICY))
"""The sections besides `defaults`, `profiles` and `models`, which hold model keys."""
