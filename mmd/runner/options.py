"""The command line of mmd-runner. Parsed by hand: argparse would be a tenth of the runner's memory for one set of options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmd.config import EngineKind
from mmd.errors import MmdError
from mmd.names import Placement

_T = TypeVar("_T")

__all__ = ["Options", "parse"]


@dataclass(frozen=True, slots=True)
class Options:
    """See mmd-runner(8)."""

    model: str
    engine: EngineKind
    placement: Placement
    definition: str
    directory: Path
    command: tuple[str, ...]
    listen_tcp: bool
    """Whether the engine listens on TCP instead of `engine.sock`."""
    port: int | None
    """A fixed TCP port; None: a free one."""
    health_path: str
    health_interval_s: float
    health_timeout_s: float
    health_command: tuple[str, ...]
    stop_command: tuple[str, ...]
    vram_bytes: int | None
    gpu_memory_bytes: Mapping[int, int]
    warm_up: bool
    secrets: Mapping[str, Path]
    """By the name of a variable, and of a credential, the file that it comes from."""

    @property
    def socket(self) -> Path:
        return self.directory / "engine.sock"

    @property
    def id(self) -> str:
        """The unit id: the unit's directory is `<id>@<placement>`."""
        return self.directory.name.partition("@")[0]


_VALUES = (
    *("--model", "--engine", "--gpus", "--definition", "--directory", "--listen", "--health-path", "--health-interval"),
    *("--health-timeout", "--health-command", "--stop-command", "--vram", "--gpu-memory", "--secret"),
)
_REQUIRED = ("--model", "--engine", "--gpus", "--definition", "--directory")


def parse(argv: Sequence[str]) -> Options:
    """Options from arguments: everything after the first `--` is the engine's command. MmdError when something is wrong."""
    given, command, warm_up = _split(argv)
    for name in _REQUIRED:
        if name not in given:
            raise MmdError(f"{name} is missing")
    if not command:
        raise MmdError("no engine command", hint="give it after --")
    listen_tcp, port = _listen(given.get("--listen", ["unix"])[-1])
    return Options(
        model=given["--model"][-1],
        engine=_value("--engine", given, EngineKind, EngineKind.COMMAND),
        placement=Placement.parse(given["--gpus"][-1]),
        definition=given["--definition"][-1],
        directory=Path(given["--directory"][-1]),
        command=command,
        listen_tcp=listen_tcp,
        port=port,
        health_path=given.get("--health-path", ["/health"])[-1],
        health_interval_s=_value("--health-interval", given, float, 0.05),
        health_timeout_s=_value("--health-timeout", given, float, 600.0),
        health_command=tuple(given.get("--health-command", ())),
        stop_command=tuple(given.get("--stop-command", ())),
        vram_bytes=_value("--vram", given, int, 0) or None,
        gpu_memory_bytes=dict(_index_and_bytes(item) for item in given.get("--gpu-memory", ())),
        warm_up=warm_up,
        secrets=dict(_name_and_file(item) for item in given.get("--secret", ())),
    )


def _split(argv: Sequence[str]) -> tuple[dict[str, list[str]], tuple[str, ...], bool]:
    given: dict[str, list[str]] = {}
    warm_up = True
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":
            break
        if word == "--no-warm-up":
            warm_up = False
        elif name in _VALUES:
            found = value if equals else next(words, None)
            if found is None:
                raise MmdError(f"{name} needs a value")
            given.setdefault(name, []).append(found)
        else:
            raise MmdError(f"unknown argument {word!r}", hint="man mmd-runner")
    return given, tuple(words), warm_up


def _value(name: str, given: Mapping[str, list[str]], convert: Callable[[str], _T], default: _T) -> _T:
    if name not in given:
        return default
    text = given[name][-1]
    try:
        return convert(text)
    except ValueError:
        raise MmdError(f"{name}: {text!r} is not a valid value") from None


def _listen(text: str) -> tuple[bool, int | None]:
    kind, colon, port = text.partition(":")
    if text == "unix":
        return False, None
    if kind == "tcp" and (not colon or (port.isdecimal() and 0 < int(port) < 65536)):
        return True, int(port) if colon else None
    raise MmdError(f"--listen: {text!r} is none of unix, tcp, tcp:PORT")


def _index_and_bytes(text: str) -> tuple[int, int]:
    index, _, size = text.partition("=")
    if not (index.isdecimal() and size.isdecimal()):
        raise MmdError(f"--gpu-memory: {text!r} is not INDEX=BYTES")
    return int(index), int(size)


def _name_and_file(item: str) -> tuple[str, Path]:
    name, _, file = item.partition("=")
    if not (name and "/" not in name and file.startswith("/")):
        raise MmdError("--secret: a value is not NAME=/FILE")
    return name, Path(file)
