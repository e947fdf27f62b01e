"""Unit files for a configuration (pure): one template unit per model, and the sockets of mmd.socket_units.

A unit is complete: it shows exactly the command that runs, and nothing is written when a model starts. The instance name is the
placement (mmd.names), which the runner receives as `%i`.
"""

from _blake2 import blake2b  # hashlib would load OpenSSL: 5 ms of the generator's 60
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mmd.config import Config, EngineKind, Gpus, Listen, Model, Provider
from mmd.credentials import credential_lines, secret_options
from mmd.engines import engine
from mmd.engines.base import CommandContext
from mmd.errors import MmdError
from mmd.hub_unit import cache_environment, fetch_unit, fetch_unit_name, wanted
from mmd.names import model_user
from mmd.problem import Problem
from mmd.sandbox import sandbox
from mmd.scope import Scope, ScopeKind
from mmd.sizes import sized
from mmd.socket_units import gateway_sockets, made_by, port_socket, source_path
from mmd.unitfile import Block, Item, Specified, assignment, command_line, comment, path, render, text

__all__ = [
    "SOCKETS_WANTS",
    "Units",
    "definition",
    "model_unit",
    "model_unit_name",
    "render_units",
]

SOCKETS_WANTS = "sockets.target.wants"
"""systemctl refuses to enable generated units, so the generator makes the links that `enable` would."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

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

_SUPERVISION = Block("""
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
OOMScoreAdjust=500
""")


_UNIT = Block("""
    Documentation=man:mmd.yaml(5) man:mmd-generator(8)
    # The gateway counts failures and backs off by itself.
    StartLimitIntervalSec=0
""")
_START = Block("""
    # The runner starts the engine as its child; ready means that the engine has answered.
    Type=notify
    NotifyAccess=main
""")


class Units(NamedTuple):
    """What the generator writes."""

    files: Mapping[str, str] = MappingProxyType({})
    """Text by file name."""
    links: Mapping[str, str] = MappingProxyType({})
    """Target by the link's path, both relative to the output folder and the link."""
    problems: tuple[Problem, ...] = ()


def render_units(config: Config, *, scope: Scope, bin_dir: str) -> Units:
    """All units of a configuration. A model whose unit cannot be made is left out, with a problem."""
    units: dict[str, str] = {}
    ports: dict[str, str] = {}
    with_ports, problems = [], []
    for model in config.models.values():
        try:
            # Both or neither: a port without its model would start nothing.
            port = [port_socket(model, scope)] if model.port is not None else []
            if model.engine is not EngineKind.EXTERNAL:
                fetch = fetch_unit(model, scope=scope, bin_dir=bin_dir)
                units[model_unit_name(model)] = model_unit(model, gpus=config.gpus, scope=scope, bin_dir=bin_dir)
                if fetch is not None:
                    units[fetch_unit_name(model.id)] = fetch
        except MmdError as error:
            problems.append(Problem(model.source, model.line, f"models.{model.name}", error.message, error.hint))
            continue
        if port:
            ports.update(port)
            with_ports.append(model)
    try:
        sockets = {**dict(gateway_sockets(config, scope, with_ports)), **ports}
    except MmdError as error:
        problems.append(Problem(scope.config_file, 0, "gateway", error.message, error.hint))
        sockets = ports
    links = {f"{SOCKETS_WANTS}/{name}": f"../{name}" for name in sockets}
    return Units({**sockets, **units}, links, tuple(problems))


def model_unit_name(model: Model) -> str:
    """The file name of a model's template unit."""
    return f"mmd-model-{model.id}@.service"


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


class _ModelUnit(NamedTuple):
    """One model's template unit in the making."""

    model: Model
    gpus: Gpus
    scope: Scope
    bin_dir: str

    def text(self) -> str:
        name, source = model_unit_name(self.model), f"{self.model.source}:{self.model.line}"
        header = (f"{made_by(source)};", f"or add to it: `systemctl edit {name}`.")
        return render([("Unit", self._unit()), ("Service", self._service())], header=header)

    @property
    def _directory(self) -> str:
        """The runtime directory of the instance, with specifiers."""
        return f"%t/mmd-model/{self.model.id}@%i"

    @property
    def _home(self) -> Path:
        """The unit's CacheDirectory: all that it may write and finds again."""
        return self.scope.model_cache_dir(self.model.id, private=self.model.is_private)

    @property
    def _user_name(self) -> str:
        return self.model.user or model_user(self.model.id, private=self.model.is_private)

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
            cache_dir=str(self._home),
            sim_dir=str(self.scope.sim_dir),
            gpu_memory_bytes=self._gpu_memory,
        )

    def _unit(self) -> Iterator[Item]:
        yield from source_path(str(self.model.source))
        yield "Description", f"mmd model {text(self.model.name, setting='the name')} on %i"
        yield _UNIT
        yield from self._before()

    def _before(self) -> Iterator[Item]:
        """What has to be done before it starts."""
        if self.scope.kind is ScopeKind.SYSTEM and self.model.user is None:
            unit = f"mmd-user@{self._user_name}.service"
            yield from (("Requires", unit), ("After", unit))
        if wanted(self.model, self.scope):
            unit = fetch_unit_name(self.model.id)
            yield from (("Requires", unit), ("After", unit))

    def _service(self) -> Iterator[Item]:
        context = self._context()
        argv = engine(self.model.engine).command(sized(self.model), context)
        words = (*self._runner(context), "--", *argv)
        # First: whatever is wrong with what comes below, it is not root that runs it.
        yield from self._user()
        yield _START
        yield "ExecStart", command_line(words, specified=context.socket, setting="its command")
        yield from self._environment(context)
        yield from credential_lines(self.model.secrets)
        yield from self._process()
        yield from self._directories()
        yield _SUPERVISION
        yield from sandbox(
            self.model,
            scope=self.scope,
            directory=self._directory,
            uses_devices=self._uses_devices,
            argv=words,
        )

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

    def _environment(self, context: CommandContext) -> Iterator[Item]:
        model = self.model
        variables = {"PATH": f"{model.venv}/bin:{_PATH}" if model.venv else _PATH}
        if self.scope.kind is ScopeKind.SYSTEM:  # a user's own engines share the user's caches
            variables |= {
                "HOME": context.cache_dir,
                "XDG_CACHE_HOME": context.cache_dir,
                "XDG_CONFIG_HOME": f"{context.cache_dir}/config",
                "XDG_DATA_HOME": f"{context.cache_dir}/data",
                "VLLM_CACHE_ROOT": f"{context.cache_dir}/vllm",
                "TRITON_CACHE_DIR": f"{context.cache_dir}/triton",
                "TORCHINDUCTOR_CACHE_DIR": f"{context.cache_dir}/torchinductor",
                **cache_environment(model, self.scope, context.cache_dir),
            }
        variables |= engine(model.engine).environment(model, context)
        variables |= model.env
        for name, value in variables.items():
            yield "Environment", assignment(name, value, specified=context.socket, setting=f"env.{name}")

    def _user(self) -> Iterator[Item]:
        if self.scope.kind is ScopeKind.USER:
            return
        yield comment(
            "A user of its own: it owns what it writes. By the group the gateway, and nobody else, reaches its socket."
        )
        yield from (("User", self._user_name), ("Group", "mmd-model"))
        if self._uses_devices:
            yield from (comment("Who may open GPUs."), ("SupplementaryGroups", "video render"))

    def _process(self) -> Iterator[Item]:
        model = self.model
        if model.workdir is not None:
            yield "WorkingDirectory", path(str(model.workdir), setting="workdir")
        elif self.scope.kind is ScopeKind.SYSTEM:
            yield "WorkingDirectory", path(str(self._home), setting="the cache's folder")
        yield "Slice", "mmd-models.slice"
        if model.limits.memory_max_bytes is not None:
            yield "MemoryMax", str(model.limits.memory_max_bytes)
        if model.limits.cpu_weight is not None:
            yield "CPUWeight", str(model.limits.cpu_weight)
        yield from (("SyslogIdentifier", f"mmd-{model.id}"), ("SyslogLevelPrefix", "no"))
        yield "LogExtraFields", f"MMD_MODEL={model.id} MMD_ROLE=model"

    def _directories(self) -> Iterator[Item]:
        yield "RuntimeDirectory", f"mmd-model/{self.model.id}@%i"
        yield "RuntimeDirectoryMode", "0750"
        yield comment("The runner's report outlives it: the gateway reads there why a model failed.")
        yield "RuntimeDirectoryPreserve", "yes"
        if self.scope.kind is ScopeKind.SYSTEM:
            yield from (("CacheDirectory", f"mmd/{self._home.parent.name}/{self.model.id}"), ("CacheDirectoryMode", "0700"))
        else:
            yield "CacheDirectory", "mmd"
        yield comment("The gateway connects to the engine's socket as a member of the group.")
        yield "UMask", "0007"


def _expand(word: str, macros: Mapping[str, str]) -> str:
    for macro, value in macros.items():
        word = word.replace(macro, value)
    return word
