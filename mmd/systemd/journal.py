"""The journal: the command of `mmdctl logs`, and a reader of entries as they come.

Model units mark what their processes write with the fields MMD_MODEL, the model's unit id, and MMD_ROLE (LogExtraFields=,
systemd.exec(5)). systemd 252 does not mark its own lines about a unit ("Started ...", "Failed ..."): those carry UNIT=, or
USER_UNIT= from a user manager. A match takes no globs, so the instances that systemd has ever logged about are looked up first.
"""

import asyncio
import contextlib
import json
import os
import subprocess
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from fnmatch import filter as fnmatch_filter
from typing import Any, Final

from mmd.errors import MmdError
from mmd.names import UnitName

__all__ = ["ENTRY_FIELDS", "JournalEntry", "command", "entries"]

# One entry of `-o json --all`. journald cuts a line of output at 48 KiB (LineMax=), which JSON may escape sixfold.
_MAX_ENTRY_BYTES: Final = 1 << 20

_INFO: Final = 6

# Marks what mmd's own services write (LogExtraFields= of their units); models have a role of their own.
_OWN_ROLES: Final = ("MMD_ROLE=gateway", "MMD_ROLE=reload")

ENTRY_FIELDS: Final = (
    *("MESSAGE", "PRIORITY", "MMD_MODEL", "SYSLOG_IDENTIFIER", "_PID"),
    *("_SYSTEMD_UNIT", "UNIT", "USER_UNIT", "_SYSTEMD_USER_UNIT"),
)
"""What `entries` needs of a journal entry (journalctl --output-fields=)."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line of the journal (systemd.journal-fields(7))."""

    time: float
    """Unix seconds when journald received it."""
    message: str
    priority: int
    """0 (emergency) to 7 (debug)."""
    model: str
    """Unit id of the model whose process wrote it; empty for systemd's own lines."""
    unit: str
    """The unit that wrote it, or that systemd wrote it about."""
    identifier: str
    pid: int
    cursor: str = ""
    """Where in the journal it is."""


def command(
    model: str | None,
    unit_glob: str,
    *,
    user: bool = False,
    follow: bool = False,
    lines: int | None = None,
    since: str | None = None,
    after: str | None = None,
    output: str | None = None,
    fields: Sequence[str] = (),
    own: bool = False,
) -> list[str]:
    """The journalctl command line for a model's lines and systemd's lines about its units (`unit_glob`).

    `model` is a unit id; None: all models; `own`: and what mmd's own services write. `lines`, `since` and `output` are what
    journalctl(1) takes, `after` a cursor: all that follows it. MmdError when journalctl cannot be run.
    """
    argv = ["journalctl", *(["--follow"] if follow else [])]
    argv += [f"--lines={lines}"] if lines is not None else []
    argv += [f"--since={since}"] if since is not None else []
    argv += [f"--after-cursor={after}", "--lines=all"] if after is not None else []
    argv += [f"--output={output}"] if output is not None else []
    argv += [f"--output-fields={','.join(fields)}", "--all"] if fields else []
    # Not --user: that reads journals split by user only, of which there are none when the journal is volatile.
    owner = [f"_UID={os.getuid()}"] if user else []
    argv += [*owner, "MMD_ROLE=model" if model is None else f"MMD_MODEL={model}"]
    # A user manager marks nothing (systemd.exec(5), LogExtraFields= is for system services): there the unit tells.
    unit_fields = ("USER_UNIT", "_SYSTEMD_USER_UNIT") if user else ("UNIT",)
    units = sorted(fnmatch_filter(_values(unit_fields[0]), unit_glob))
    for unit_field in unit_fields if units else ():
        argv += ["+", *owner, *(f"{unit_field}={unit}" for unit in units)]
    argv += ["+", *owner, *_OWN_ROLES] if own else []
    return argv


async def entries(argv: Sequence[str]) -> AsyncGenerator[JournalEntry, None]:
    """The entries that `command(..., output="json", fields=ENTRY_FIELDS)` prints, for ever when it follows.

    Close the generator (contextlib.aclosing) to end journalctl. An entry longer than 1 MiB is left out. MmdError when
    journalctl fails.
    """
    try:
        process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, limit=_MAX_ENTRY_BYTES)
    except OSError as error:
        raise MmdError(f"cannot run {argv[0]}: {error.strerror}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        while True:
            try:
                line = await process.stdout.readline()
                if not line:
                    break
                raw = json.loads(line)
            except ValueError:  # longer than the limit: readline() has discarded some, and what is left of it is no JSON
                continue
            yield _entry(raw)
        message = (await process.stderr.read()).decode(errors="replace").strip()
        if await process.wait() != 0:
            raise MmdError(f"journalctl: {message}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _values(field: str) -> list[str]:
    """The distinct values that `field` has in the journal."""
    argv = ["journalctl", "--quiet", f"--field={field}"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        raise MmdError(f"cannot read the journal: {detail}", hint=" ".join(argv)) from error
    return done.stdout.splitlines()


def _entry(raw: dict[str, Any]) -> JournalEntry:
    fields = {key: _field(value) for key, value in raw.items()}
    return JournalEntry(
        time=int(fields["__REALTIME_TIMESTAMP"]) / 1e6,
        message=fields.get("MESSAGE", ""),
        priority=int(fields.get("PRIORITY", _INFO)),
        model=fields.get("MMD_MODEL") or _model(fields.get("_SYSTEMD_USER_UNIT", "")),
        unit=fields.get("UNIT") or fields.get("USER_UNIT") or fields.get("_SYSTEMD_UNIT", ""),
        identifier=fields.get("SYSLOG_IDENTIFIER", ""),
        pid=int(fields.get("_PID", 0)),
        cursor=fields.get("__CURSOR", ""),
    )


def _model(unit: str) -> str:
    """The unit id in the name of a user's model unit, whose lines need not be marked; "" for other units."""
    name = UnitName.parse(unit)
    return "" if name is None else name.id


def _field(value: Any) -> str:
    """A field of journalctl's JSON: a string, bytes as a list of numbers, or a list of values, of which the last is taken."""
    if isinstance(value, list):
        return bytes(value).decode(errors="replace") if all(isinstance(item, int) for item in value) else _field(value[-1])
    return value if isinstance(value, str) else ""
