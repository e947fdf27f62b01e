"""Unit files for a configuration (pure): the sockets that clients connect to and one template unit per model.

A unit is complete: it shows exactly the command that runs, and nothing is written when a model starts. The instance name is the
placement (mmd.names), which the runner receives as `%i`.
"""

from _blake2 import blake2b  # hashlib would load OpenSSL: 5 ms of the generator's 60
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mmd.addresses import parse_address
from mmd.config import Config, EngineKind, Gpus, Listen, Model, Provider
from mmd.credentials import credential_lines, secret_options
from mmd.engines import engine
from mmd.engines.base import CommandContext
from mmd.errors import MmdError
from mmd.problem import Problem
from mmd.sandbox import sandbox
from mmd.scope import Scope, ScopeKind
from mmd.sizes import sized
from mmd.unitfile import Specified, assignment, command_line, escape

__all__ = [
    "SOCKETS_WANTS",
    "Units",
    "definition",
    "model_unit",
    "model_unit_name",
    "port_socket_name",
    "render_units",
    "socket_units",
]

SOCKETS_WANTS = "sockets.target.wants"
"""systemctl refuses to enable generated units, so the generator makes the links that `enable` would."""

_GATEWAY = "mmd-gateway.service"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GATEWAY_SOCKET = "mmd-gateway.socket"

_GATEWAY_ONLY = frozenset(
    [
        "aliases",
        "profile",
        "resources",
        "idle",
        "replicas",
        "wake_on_request",
        "pin",
        "preload",
        "priority",
        "concurrency",
        "queue_limit",
        "description",
        "url",
        "restart_on_connection_failure",
        "port",
        "port_protocol",
        "source",
        "line",
    ]
)
"""What a model's process does not depend on: a change of it is no reason to start the model anew."""

_SUPERVISION = """\
# Loading takes longer; the runner extends this for as long as there is progress.
TimeoutStartSec=2min
TimeoutStopSec=30s
# The runner reports only while the engine answers.
WatchdogSec=30s
# SIGTERM to the runner, which forwards it; SIGKILL to everything that is left.
KillMode=mixed
# Whether and when it comes back is the gateway's decision: it alone knows whether its memory is free. A sleeping model that
# systemd restarted would come back awake, on a GPU that has been given to another one.
Restart=no
# When memory is short, models go before the gateway, and as a whole.
OOMPolicy=stop
OOMScoreAdjust=500"""


class Units(NamedTuple):
    """What the generator writes."""

    files: Mapping[str, str] = MappingProxyType({})
    """Text by file name."""
    links: Mapping[str, str] = MappingProxyType({})
    """Target by the link's path, both relative to the output folder and the link."""
    problems: tuple[Problem, ...] = ()


def render_units(config: Config, *, scope: Scope, bin_dir: str) -> Units:
    """All units of a configuration. A model whose unit cannot be made is left out, with a problem."""
    files = dict(socket_units(config, scope))
    links = {f"{SOCKETS_WANTS}/{name}": f"../{name}" for name in files}
    problems = []
    for model in config.models.values():
        if model.engine is EngineKind.EXTERNAL:
            continue
        try:
            files[model_unit_name(model)] = model_unit(model, gpus=config.gpus, scope=scope, bin_dir=bin_dir)
        except MmdError as error:
            problems.append(Problem(model.source, model.line, f"models.{model.name}", error.message, error.hint))
    return Units(files, links, tuple(problems))


def model_unit_name(model: Model) -> str:
    """The file name of a model's template unit."""
    return f"mmd-model-{model.id}@.service"


def port_socket_name(model: Model) -> str:
    """The file name of the unit of a model's own port."""
    return f"mmd-port-{model.id}.socket"


def definition(model: Model, *, gpus: Gpus) -> str:
    """The fingerprint of what the user has said of a model's process: 16 hexadecimal digits, the same as in its unit's command.

    It is not that of the unit's text, nor do keys count that have their default: a later version of mmd may render the same
    definition otherwise, and upgrading must not replace models that run.
    """
    default = Model._field_defaults
    said = (f"{key}={value!r}" for key, value in zip(Model._fields, model, strict=True) if key not in _GATEWAY_ONLY
            and value != default.get(key))  # fmt: skip
    memory = [device.memory_bytes for device in gpus.devices]
    return blake2b("\n".join((*said, repr(memory))).encode(), digest_size=8).hexdigest()


def model_unit(model: Model, *, gpus: Gpus, scope: Scope, bin_dir: str) -> str:
    """The text of a model's template unit; MmdError when its engine cannot be started as configured."""
    return _ModelUnit(model, gpus, scope, bin_dir).text()


def socket_units(config: Config, scope: Scope) -> Iterator[tuple[str, str]]:
    """The sockets that start the gateway, by file name."""
    system = scope.kind is ScopeKind.SYSTEM
    with_ports = [model for model in config.models.values() if model.port is not None]
    wants = ("# Whoever starts this one means the models' own ports as well.",) if with_ports else ()
    yield _socket(
        _GATEWAY_SOCKET,
        "mmd OpenAI API",
        scope,
        (*_client_socket(config.gateway.listen, system), "FileDescriptorName=mmd-api"),
        unit=(*wants, *(f"Wants={port_socket_name(model)}" for model in with_ports)),
    )
    admins = ("SocketMode=0660", "SocketGroup=mmd-admin") if system else ("SocketMode=0600",)
    admin = ("ListenStream=%t/mmd/admin.sock", "FileDescriptorName=mmd-admin", *admins)
    yield _socket("mmd-admin.socket", "mmd admin API", scope, admin)
    if config.gateway.admin_listen:
        tcp = (*map(_listen_stream, config.gateway.admin_listen), "FileDescriptorName=mmd-admin-tcp", "NoDelay=yes")
        yield _socket("mmd-admin-tcp.socket", "mmd admin API and dashboard over TCP", scope, tcp)
    for model in with_ports:
        assert model.port is not None
        yield _socket(
            port_socket_name(model),
            f"mmd port of {escape(model.name)}",
            scope,
            (*_client_socket((model.port,), system), f"FileDescriptorName=mmd-port-{model.id}"),
            unit=(f"PartOf={_GATEWAY_SOCKET}",),
            service=f"mmd-port@{model.id}.service",
            source=model.source,
        )


def _client_socket(addresses: Sequence[str], system: bool) -> Iterator[str]:
    """Where clients of models connect."""
    yield from map(_listen_stream, addresses)
    yield "# How many connections the kernel keeps while the gateway starts or restarts."
    yield "Backlog=1024"
    if any(not address.startswith("/") for address in addresses):
        yield from ("# A token is a small packet; it must not wait for the next one.", "NoDelay=yes")
    if any(address.startswith("/") for address in addresses):
        yield from ("SocketMode=0660", "SocketGroup=mmd") if system else ("SocketMode=0600",)


def _socket(
    name: str,
    description: str,
    scope: Scope,
    lines: Iterable[str],
    *,
    unit: Iterable[str] = (),
    service: str = _GATEWAY,
    source: Path | None = None,
) -> tuple[str, str]:
    source = source or scope.config_file
    text = "\n".join(
        (
            f"# Made by mmd-generator(8) of {source}: change it there, then `mmdctl reload`.",
            "[Unit]",
            f"Description={description}",
            "Documentation=man:mmd.yaml(5) man:mmd-gateway(8)",
            f"SourcePath={escape(str(source))}",
            *unit,
            "",
            "[Socket]",
            *lines,
            f"Service={service}",
            "",
        )
    )
    return name, text


def _listen_stream(text: str) -> str:
    address = parse_address(text)
    if address.port == 0:
        return f"ListenStream={escape(address.host)}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"ListenStream={host}:{address.port}"


class _ModelUnit(NamedTuple):
    """One model's template unit in the making."""

    model: Model
    gpus: Gpus
    scope: Scope
    bin_dir: str

    def text(self) -> str:
        model = self.model
        return (
            f"# Made by mmd-generator(8) of {model.source}:{model.line}: change it there, then `mmdctl reload`;\n"
            f"# or add to it: `systemctl edit {model_unit_name(model)}`.\n"
            f"[Unit]\nSourcePath={escape(str(model.source))}\n" + "\n".join((*self._unit(), "", *self._service(), ""))
        )

    @property
    def _directory(self) -> str:
        """The runtime directory of the instance, with specifiers."""
        return f"%t/mmd-model/{self.model.id}@%i"

    @property
    def _gpu_memory(self) -> dict[int, int]:
        sizes = ((index, device.memory_bytes) for index, device in enumerate(self.gpus.devices))
        return {index: size for index, size in sizes if size is not None}

    @property
    def _uses_devices(self) -> bool:
        """Whether it opens real GPUs."""
        return self.model.gpu_count > 0 and self.model.engine is not EngineKind.SIM and self.gpus.provider is not Provider.SIM

    def _context(self) -> CommandContext:
        return CommandContext(
            socket=f"{self._directory}/engine.sock",
            bin_dir=self.bin_dir,
            cache_dir=str(self.scope.cache_dir),
            sim_dir=str(self.scope.sim_dir),
            gpu_memory_bytes=self._gpu_memory,
        )

    def _unit(self) -> list[str]:
        return [
            f"Description=mmd model {escape(self.model.name)} on %i",
            "Documentation=man:mmd.yaml(5) man:mmd-generator(8)",
            "# The gateway counts failures and backs off by itself.",
            "StartLimitIntervalSec=0",
        ]

    def _service(self) -> list[str]:
        context = self._context()
        argv = engine(self.model.engine).command(sized(self.model), context)
        words = (*self._runner(context), "--", *argv)
        return [
            "[Service]",
            "# The runner starts the engine as its child; ready means that the engine has answered.",
            "Type=notify",
            "NotifyAccess=main",
            f"ExecStart={command_line(words, specified=context.socket)}",
            *self._environment(context),
            *self._secrets(),
            *self._process(),
            *self._directories(),
            _SUPERVISION,
            *sandbox(
                self.model,
                scope=self.scope,
                directory=self._directory,
                uses_devices=self._uses_devices,
                argv=words,
            ),
        ]

    def _runner(self, context: CommandContext) -> Iterator[str]:
        """The runner's command line, mmd-runner(8)."""
        model, health = self.model, self.model.health
        yield f"{self.bin_dir}/mmd-runner"
        yield from ("--model", model.name)
        yield from ("--engine", str(model.engine))
        yield from ("--gpus", Specified("%i"))
        yield from ("--definition", definition(self.model, gpus=self.gpus))
        yield from ("--directory", Specified(self._directory))
        yield from ("--listen", self._listen())
        yield from ("--health-path", health.path)
        yield from ("--health-interval", f"{health.interval_s:g}")
        yield from ("--health-timeout", f"{health.timeout_s:g}")
        macros = {"{socket}": context.socket, "{model}": model.model or model.name, "{id}": model.id}
        for option, words in (("--health-command", health.command), ("--stop-command", model.stop_command)):
            for word in words:
                yield from (option, _expand(word, macros))
        yield from secret_options(model.secrets)
        vram = sized(model).vram_bytes
        if vram is not None and model.gpu_count:
            yield from ("--vram", str(vram))
        for index, memory_bytes in self._gpu_memory.items():
            yield from ("--gpu-memory", f"{index}={memory_bytes}")

    def _listen(self) -> str:
        if self.model.engine is not EngineKind.COMMAND:
            return str(Listen.UNIX if engine(self.model.engine).uses_socket else Listen.TCP)
        return f"{self.model.listen}:{self.model.listen_port}" if self.model.listen_port else str(self.model.listen)

    def _environment(self, context: CommandContext) -> Iterator[str]:
        model = self.model
        variables = {"PATH": f"{model.venv}/bin:{_PATH}" if model.venv else _PATH}
        if self.scope.kind is ScopeKind.SYSTEM:  # a user's own engines share the user's caches
            variables |= {
                "HOME": context.cache_dir,
                "XDG_CACHE_HOME": context.cache_dir,
                "HF_HOME": f"{context.cache_dir}/huggingface",
                "VLLM_CACHE_ROOT": f"{context.cache_dir}/vllm",
            }
        variables |= engine(model.engine).environment(model, context)
        variables |= model.env
        return (f"Environment={assignment(name, value, specified=context.socket)}" for name, value in variables.items())

    def _secrets(self) -> Iterator[str]:
        return credential_lines(self.model.secrets)

    def _process(self) -> Iterator[str]:
        model = self.model
        system = self.scope.kind is ScopeKind.SYSTEM
        if model.workdir or system:
            yield f"WorkingDirectory={escape(str(model.workdir or self.scope.cache_dir))}"
        if system:
            yield from (
                "# Not the gateway's user: that one may start units, engines may not.",
                "User=mmd-model",
                "Group=mmd-model",
            )
            if self._uses_devices:
                yield from ("# Who may open GPUs.", "SupplementaryGroups=video render")
        yield "Slice=mmd-models.slice"
        if model.limits.memory_max_bytes is not None:
            yield f"MemoryMax={model.limits.memory_max_bytes}"
        if model.limits.cpu_weight is not None:
            yield f"CPUWeight={model.limits.cpu_weight}"
        yield f"SyslogIdentifier=mmd-{model.id}"
        yield f"LogExtraFields=MMD_MODEL={model.id} MMD_ROLE=model"

    def _directories(self) -> Iterator[str]:
        yield f"RuntimeDirectory=mmd-model/{self.model.id}@%i"
        yield "RuntimeDirectoryMode=0750"
        yield "# The runner's report outlives it: the gateway reads there why a model failed."
        yield "RuntimeDirectoryPreserve=yes"
        yield "CacheDirectory=mmd"
        if self.scope.kind is ScopeKind.SYSTEM:
            yield "CacheDirectoryMode=0750"
        yield "# The gateway connects to the engine's socket as a member of the group."
        yield "UMask=0007"


def _expand(word: str, macros: Mapping[str, str]) -> str:
    for macro, value in macros.items():
        word = word.replace(macro, value)
    return word
