"""What every command of mmdctl needs: the instance it speaks to, and where it writes."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from mmd.ctl.client import Client
from mmd.ctl.terminal import Terminal
from mmd.scope import Scope, ScopeKind

__all__ = ["Context"]


@dataclass(frozen=True, slots=True)
class Context:
    scope: Scope
    socket: Path
    terminal: Terminal

    @property
    def client(self) -> Client:
        return Client(self.socket, self.scope.kind)

    @property
    def systemctl(self) -> tuple[str, ...]:
        return ("systemctl", "--user") if self.scope.kind is ScopeKind.USER else ("systemctl",)

    def command(self, *words: str) -> str:
        """The mmdctl command line with `words`, for this instance, as a person types it."""
        own = ("--user",) if self.scope.kind is ScopeKind.USER else ()
        return shlex.join(("mmdctl", *own, *words))
