"""What a runner tells the gateway: one small JSON file in the model unit's runtime directory.

systemd says whether a unit runs; this says what systemd cannot know: where the engine listens, which definition it was
started with, and why it failed. The runner is the only writer (atomically, by rename); the gateway reads it after the unit's
state has changed. A report counts only while its invocation is the unit's current InvocationID (systemd.exec(5)).
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from mmd.errors import MmdError

__all__ = ["REPORT_FILE", "FailureReason", "Report"]

REPORT_FILE = "report.json"


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

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `text` holds; MmdError when it is none."""
        try:
            raw = json.loads(text)
            failure = raw.pop("failure")
            tail = tuple(raw.pop("tail"))
            return cls(**raw, failure=FailureReason(failure) if failure else None, tail=tail)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MmdError(f"not a runner's report: {error}") from error

    @classmethod
    def read(cls, unit_dir: Path) -> "Report | None":
        """The report in a unit's runtime directory, or None when there is none (or none that can be read)."""
        try:
            return cls.from_json((unit_dir / REPORT_FILE).read_text())
        except (OSError, MmdError):
            return None
