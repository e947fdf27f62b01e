"""What a runner tells the gateway: one small JSON file in the model unit's runtime directory.

systemd says whether a unit runs; this says what systemd cannot know: where the engine listens, which definition it was
started with, and why it failed. The runner is the only writer (atomically, by rename); the gateway reads it after the unit's
state has changed. A report counts only while its invocation is the unit's current InvocationID (systemd.exec(5)).

The directory belongs to the engine's user, so a hostile engine may write the file as well: what is read is bounded, of the
type that it should be, and can be shown and encoded. Of `endpoint` the gateway believes a port number at most
(mmd.gateway.engine_socket).
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from mmd.errors import MmdError
from mmd.foreign_file import open_directory, read_file
from mmd.shortage import is_shortage

__all__ = ["REPORT_FILE", "FailureReason", "Report"]

REPORT_FILE = "report.json"

_FILE_MAX_BYTES: Final = 256 << 10
"""40 lines of 1,000 characters (mmd.runner.output), each escaped as JSON with six bytes, fit."""
_TAIL_LINES_MAX: Final = 40
_TEXT_MAX: Final = 1000
"""Characters of a message, and of a line of the tail."""
_NAME_MAX: Final = 200
_SECONDS_MAX: Final = 1e9
_INVOCATION: Final = re.compile(r"[0-9a-f]{32}|", re.ASCII)  # none where the runner was started by hand
_UNSHOWABLE: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")
"""Control characters but tabs, half surrogates, line separators, and what turns the direction of text."""
_LOOPBACK: Final = re.compile(r"http://127\.0\.0\.1:([0-9]{1,5})", re.ASCII)


class FailureReason(StrEnum):
    EXITED = "exited"
    """The engine exited before it was ready."""
    OUT_OF_MEMORY = "out_of_memory"
    """It exited, and said that memory was short."""
    UNHEALTHY = "unhealthy"
    """It made no progress towards health within health.timeout, or refused the warm-up request."""
    DIED = "died"
    """It exited after it had been ready."""
    STALLED = "stalled"
    """It stopped answering its health check after it had been ready."""


@dataclass(frozen=True, slots=True)
class Report:
    """The state of one invocation of a runner."""

    invocation: str
    """INVOCATION_ID, 32 hexadecimal digits."""
    definition: str
    """Fingerprint of the unit definition that this invocation was started from."""
    endpoint: str
    """`unix:/path` or `http://host:port`."""
    ready: bool = False
    load_s: float = 0.0
    """From the engine's exec to its first answer that it is healthy."""
    warm_up_s: float = 0.0
    failure: FailureReason | None = None
    message: str = ""
    """One sentence on the failure, such as `vllm exited with status 1 while loading`."""
    tail: tuple[str, ...] = ()
    """The engine's last log lines before the failure, oldest first."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def port(self) -> int | None:
        """The port of loopback that it names; None when it names none."""
        found = _LOOPBACK.fullmatch(self.endpoint)
        port = int(found[1]) if found else 0
        return port if 0 < port < 1 << 16 else None

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """The report that `text` holds; MmdError when it is none. Fields that are not known are of a later version."""
        try:
            raw = json.loads(text)
            failure = raw["failure"]
            report = cls(
                invocation=_text(raw["invocation"], _NAME_MAX),
                definition=_text(raw["definition"], _NAME_MAX),
                endpoint=_text(raw["endpoint"], _TEXT_MAX),
                ready=raw["ready"] is True,
                load_s=_seconds(raw["load_s"]),
                warm_up_s=_seconds(raw["warm_up_s"]),
                failure=None if failure is None else FailureReason(failure),
                message=_text(raw["message"], _TEXT_MAX),
                tail=_tail(raw["tail"]),
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise MmdError(f"not a runner's report: {type(error).__name__}: {str(error)[:200]!a}") from error
        if not _INVOCATION.fullmatch(report.invocation):
            raise MmdError("not a runner's report: its invocation is none")
        return report

    @classmethod
    def read(cls, unit_dir: Path) -> "Report | None":
        """The report in a unit's runtime directory, or None when there is none (or none that can be read). Never waits.

        OSError when this process is short of descriptors or memory, which says nothing about the report."""
        try:
            directory, owner = open_directory(unit_dir)
            try:
                return cls.from_json(read_file(REPORT_FILE, limit_bytes=_FILE_MAX_BYTES, directory=directory, owner=owner))
            finally:
                os.close(directory)
        except OSError as error:
            if is_shortage(error):
                raise
            return None
        except MmdError:
            return None


def _text(value: object, limit: int) -> str:
    """Text that any encoding and terminal takes: no half surrogates, no control characters; ValueError, TypeError."""
    if not isinstance(value, str):
        raise TypeError("a text is none")
    cut = value if len(value) <= limit else f"{value[: limit - 3]}..."
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", cut)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a time is no number")
    seconds = float(value)
    if not (math.isfinite(seconds) and 0 <= seconds <= _SECONDS_MAX):
        raise ValueError("a time is out of range")
    return seconds


def _tail(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("the tail is no list")
    return tuple(_text(line, _TEXT_MAX) for line in value[-_TAIL_LINES_MAX:])
