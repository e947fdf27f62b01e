"""mmd-generator(8): runs at boot and at every daemon-reload, and turns the configuration into units (systemd.generator(7)).

It has 60 ms for 100 models, since booting waits for it. Hence no argparse, nothing imported that is not needed every time, and
named tuples where the rest of mmd has dataclasses: making one takes a quarter of the time, and `import dataclasses` 7 ms.
"""

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmd.errors import MmdError
from mmd.load import load
from mmd.problem import Problem
from mmd.scope import Scope, ScopeKind
from mmd.units import SOCKETS_WANTS, Units, render_units

__all__ = ["main"]

_USAGE = """\
usage: mmd-generator [--user] [--config-dir DIR] --dry-run
       mmd-generator [--user] [--config-dir DIR] --output DIR
       mmd-generator [--user] NORMAL-DIR [EARLY-DIR LATE-DIR]
Writes systemd units for the models in mmd.yaml, see mmd-generator(8)."""

_LOG_MAX = 8
"""Of more problems only the number is logged: /dev/kmsg takes ten messages in five seconds (kernel.printk_ratelimit)."""

_KMSG = Path("/dev/kmsg")
_ERROR = "<3>"  # sd-daemon(3), SD_ERR


class _Arguments(NamedTuple):
    """The command line."""

    user: bool = False
    dry_run: bool = False
    by_systemd: bool = False
    """Called with the folders of systemd.generator(7)."""
    output: Path | None = None
    config_dir: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """The program. 0: all is well; 1: there are problems, but every good unit was written; 2: it was called wrongly."""
    gc.disable()  # this process is gone before there is anything to collect
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--help"]:
        print(_USAGE)
        return 0
    try:
        arguments = _parse(words)
    except MmdError as error:
        print(f"mmd-generator: {error}\n{_USAGE}", file=sys.stderr)
        return 2
    user = arguments.user or os.environ.get("SYSTEMD_SCOPE") == "user"
    scope = Scope.user() if user else Scope.system()
    if arguments.config_dir is not None:
        scope = scope._replace(config_dir=arguments.config_dir)
    if scope.kind is ScopeKind.USER and arguments.by_systemd and not scope.config_file.exists():
        return 0  # a user who has no mmd of their own
    loaded = load(scope)
    units = render_units(loaded.config, scope=scope, bin_dir=os.path.dirname(sys.executable))  # noqa: PTH120 - a string
    problems = (*loaded.problems, *units.problems)
    if arguments.output is None:
        _print(units)
    else:
        problems = (*problems, *_write(units, arguments.output))
    _log(problems, by_systemd=arguments.by_systemd)
    gc.freeze()  # or the interpreter looks through everything once more at its end, a tenth of the time
    return 1 if problems else 0


def _parse(words: list[str]) -> _Arguments:
    arguments = _Arguments()
    folders: list[str] = []
    rest = iter(words)
    for word in rest:
        option, separator, value = word.partition("=")
        if word == "--user":
            arguments = arguments._replace(user=True)
        elif word == "--dry-run":
            arguments = arguments._replace(dry_run=True)
        elif option in ("--output", "--config-dir"):
            folder = value if separator else next(rest, "")
            if not folder:
                raise MmdError(f"{option} needs a folder")
            field = {"--output": "output", "--config-dir": "config_dir"}[option]
            arguments = arguments._replace(**{field: Path(folder)})  # type: ignore[arg-type]
        elif word.startswith("-"):
            raise MmdError(f"unknown option {word}")
        else:
            folders.append(word)
    if [arguments.dry_run, arguments.output is not None, bool(folders)].count(True) != 1 or len(folders) not in (0, 1, 3):
        raise MmdError("give --dry-run, --output DIR, or the folders of systemd.generator(7)")
    return arguments._replace(output=Path(folders[0]), by_systemd=True) if folders else arguments


def _print(units: Units) -> None:
    for name, text in units.files.items():
        print(f"# /{name}\n{text}")
    for link, target in units.links.items():
        print(f"# /{link} -> {target}")


def _write(units: Units, folder: Path) -> list[Problem]:
    """Writes the units; a unit that cannot be written does not keep the others from it."""
    problems = []
    for name in ("", SOCKETS_WANTS):
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return [Problem(folder / name, 0, "", f"cannot be made: {error.strerror}")]
    for name, text in units.files.items():
        try:
            (folder / name).write_bytes(text.encode())
        except OSError as error:
            problems.append(Problem(folder / name, 0, "", f"cannot be written: {error.strerror}"))
    for name, target in units.links.items():
        try:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
        except OSError as error:
            problems.append(Problem(folder / name, 0, "", f"cannot be linked: {error.strerror}"))
    return problems


def _log(problems: Sequence[Problem], *, by_systemd: bool) -> None:
    """To the kernel's log when systemd runs it (there may be no journal yet), else to standard error."""
    if by_systemd and "SYSTEMD_SCOPE" in os.environ:
        lines = [str(problem) for problem in problems[:_LOG_MAX]]
        if len(problems) > _LOG_MAX:
            lines.append(f"{len(problems) - _LOG_MAX} more problems: see mmdctl check")
        try:
            with _KMSG.open("w", buffering=1) as kmsg:
                for line in lines:
                    kmsg.write(f"{_ERROR}mmd-generator[{os.getpid()}]: {line}\n")
        except OSError:  # a user's generator may not, and a container may have none
            pass
        else:
            return
    for problem in problems:
        print(f"mmd-generator: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
