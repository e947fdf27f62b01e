"""The journal: the command of `mmdctl logs`, and a reader of entries as they come.

Any process may write to the journal, with any fields that it likes: MMD_MODEL=, UNIT=, MMD_ROLE=. Only fields that begin with
an underscore are journald's own (systemd.journal-fields(7)). So an entry is of a unit if journald says so (_SYSTEMD_UNIT=), or
if PID 1 says something about the unit (UNIT=, and _PID=1). In a user's journal both come from processes of that user, as do the
units.

A match takes no globs. Past entries are found by journalctl's own expansion (--unit=, which matches trusted fields only).
Instances that start later have no match of their own: new entries are matched by what model units mark theirs with
(LogExtraFields=, systemd.exec(5)), and each is then checked by what cannot be forged.
"""

import asyncio
import contextlib
import json
import os
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from mmd.errors import MmdError
from mmd.names import UnitName

__all__ = ["CURSOR_PATTERN", "LINES_MAX", "JournalEntry", "JournalQuery", "command", "entries"]

# One entry of `-o json --all`. journald cuts a line of output at 48 KiB (LineMax=), which JSON may escape sixfold.
_MAX_ENTRY_BYTES: Final = 1 << 20

# What a process writes by itself, not line by line, may be longer.
_MAX_MESSAGE_CHARACTERS: Final = 48 << 10
_MAX_IDENTIFIER_CHARACTERS: Final = 200

_INFO: Final = 6

LINES_MAX: Final = 10_000
"""The most lines of the past that can be asked for at once."""

CURSOR_PATTERN: Final = r"[a-z]=[0-9a-f]{1,32}(;[a-z]=[0-9a-f]{1,32}){1,7}"
"""As journald makes cursors (sd_journal_get_cursor(3))."""

_FIELDS: Final = (
    *("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "_PID", "_UID"),
    *("_SYSTEMD_UNIT", "UNIT", "USER_UNIT", "_SYSTEMD_USER_UNIT"),
)

# What the units of mmd mark their entries with, or are in; anybody may say the former.
_MARKS_OF_ALL: Final = ("MMD_ROLE=model", "_SYSTEMD_SLICE=mmd.slice", "_SYSTEMD_SLICE=mmd-models.slice")


@dataclass(frozen=True, slots=True)
class JournalQuery:
    """Which entries are meant."""

    model: str | None = None
    """The unit id of a model; None: all units of mmd."""
    lines: int | None = None
    """The last so many of those that are there; None: all of them."""
    follow: bool = False
    """And all that come, for ever."""
    after: str = ""
    """A cursor: only what follows it, and all of that."""
    since: str = ""
    """A time as journalctl(1) takes it: only what is later."""
    begun: float = field(default_factory=time.time, compare=False)
    """Unix seconds: what is later counts as new."""

    @property
    def units(self) -> tuple[str, ...]:
        """Globs of the units' names. What fetches a model's weights speaks of that model."""
        return ("mmd-*",) if self.model is None else (f"mmd-model-{self.model}@*.service", f"mmd-fetch-{self.model}.service")

    def includes(self, unit: str) -> bool:
        """Whether a unit of this name is meant."""
        if self.model is None:
            return unit.startswith("mmd-")
        instance = unit.startswith(f"mmd-model-{self.model}@") and unit.endswith(".service")
        return instance or unit == f"mmd-fetch-{self.model}.service"


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
    """What the process calls itself: it may say what it likes."""
    pid: int
    cursor: str = ""
    """Where in the journal it is."""


def command(query: JournalQuery, *, user: bool) -> list[str]:
    """The journalctl command line for what is in the journal already."""
    argv = ["journalctl"]
    argv += [f"--lines={query.lines}"] if query.lines is not None and not query.after else []
    argv += [f"--since={query.since}"] if query.since else []
    argv += [f"--after-cursor={query.after}"] if query.after else []
    # Not --user: that reads journals split by user only, of which there are none when the journal is volatile.
    return [*argv, *(f"--{'user-' if user else ''}unit={glob}" for glob in query.units)]


async def entries(query: JournalQuery, *, user: bool) -> AsyncGenerator[JournalEntry, None]:
    """The entries of the system's units, or of the calling user's; for ever when they are followed.

    Close the generator (contextlib.aclosing) to end journalctl. An entry longer than 1 MiB is left out. MmdError when
    journalctl fails.
    """
    output = ("--quiet", "--output=json", f"--output-fields={','.join(_FIELDS)}", "--all")
    seen = set()  # what is found twice: what came after the query was made
    if query.lines != 0 or query.after:
        program, *arguments = command(query, user=user)
        async with aclosing(_run((program, *output, *arguments))) as found:
            async for raw in found:
                entry = _entry(raw, query, user=user)
                if entry is not None:
                    seen.update([entry.cursor] if entry.time >= query.begun else [])
                    yield entry
    if not query.follow:
        return
    follow = ("--follow", "--no-tail", f"--since=@{query.begun:.6f}")
    async with aclosing(_run(("journalctl", *output, *follow, *_coming(query, user=user)))) as found:
        async for raw in found:
            entry = _entry(raw, query, user=user)
            if entry is not None and entry.cursor not in seen:
                yield entry


def _coming(query: JournalQuery, *, user: bool) -> list[str]:
    """Matches of everything that may be meant, and of more."""
    if user:
        return [f"_UID={os.getuid()}"]
    marks = _MARKS_OF_ALL if query.model is None else (f"MMD_MODEL={query.model}",)
    return [word for mark in marks for word in (mark, "+")] + ["_PID=1"]


async def _run(argv: Sequence[str]) -> AsyncGenerator[dict[str, Any], None]:
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
            if isinstance(raw, dict):
                yield raw
        message = (await process.stderr.read()).decode(errors="replace").strip()
        if await process.wait() != 0:
            raise MmdError(f"journalctl: {message}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _entry(raw: Mapping[str, Any], query: JournalQuery, *, user: bool) -> JournalEntry | None:
    """The entry, if it is of a unit that is meant by what its writer cannot forge."""
    fields = {key: _field(value) for key, value in raw.items()}
    if user and fields.get("_UID") != str(os.getuid()):
        return None
    by = fields.get("_SYSTEMD_USER_UNIT" if user else "_SYSTEMD_UNIT", "")
    about = fields.get("USER_UNIT", "") if user else fields.get("UNIT", "") if fields.get("_PID") == "1" else ""
    unit = next(filter(query.includes, (about, by)), None)
    if unit is None:
        return None
    name = UnitName.parse(by)
    return JournalEntry(
        time=_number(fields.get("__REALTIME_TIMESTAMP"), 0) / 1e6,
        message=fields.get("MESSAGE", "")[:_MAX_MESSAGE_CHARACTERS],
        priority=min(_number(fields.get("PRIORITY"), _INFO), 7),
        model="" if name is None else name.id,
        unit=unit,
        identifier=fields.get("SYSLOG_IDENTIFIER", "")[:_MAX_IDENTIFIER_CHARACTERS],
        pid=_number(fields.get("_PID"), 0),
        cursor=fields.get("__CURSOR", ""),
    )


def _number(text: str | None, default: int) -> int:
    """A process may say anything of its PRIORITY=."""
    return int(text) if text is not None and len(text) <= 20 and text.isascii() and text.isdecimal() else default


def _field(value: Any) -> str:
    """A field of journalctl's JSON: a string, bytes as a list of numbers, or a list of values, of which the last is taken."""
    if isinstance(value, list):
        if not value:
            return ""
        return bytes(value).decode(errors="replace") if all(isinstance(item, int) for item in value) else _field(value[-1])
    return value if isinstance(value, str) else ""
