"""Where things are: the system instance (root's /etc/mmd) and a user's own (`systemctl --user`), from the same code."""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from mmd.names import UnitName

__all__ = ["OWN_SOCKETS", "Scope", "ScopeKind"]


OWN_SOCKETS = frozenset(
    {"admin.sock", "gpu-probe.sock", "registrar.sock", "unit-broker.sock", "journal.sock", "fetch.sock", "relay.sock"}
)
"""Names in the runtime directory at which mmd's own programs listen, or are to: nothing that is configured may take one."""


class ScopeKind(StrEnum):
    SYSTEM = "system"
    USER = "user"


class Scope(NamedTuple):
    """The directories of one instance of mmd (file-hierarchy(7) for the user's)."""

    kind: ScopeKind
    config_dir: Path
    """mmd.yaml and models.d/"""
    runtime_dir: Path
    """admin.sock"""
    model_dir: Path
    """One directory per model unit: the engine's socket and the runner's report. The parent of RuntimeDirectory="""
    sim_dir: Path
    """The memory of the simulated GPUs"""
    state_dir: Path
    cache_dir: Path

    @property
    def config_file(self) -> Path:
        return self.config_dir / "mmd.yaml"

    @property
    def admin_socket(self) -> Path:
        return self.runtime_dir / "admin.sock"

    @property
    def port_dir(self) -> Path:
        """The only directory for Unix sockets of models' own ports. In a system instance root owns it: PID 1 removes what is in
        a socket's way and makes missing directories, which must not happen where anyone else has a say."""
        return self.runtime_dir / "ports"

    @property
    def probe_socket(self) -> Path:
        """Where systemd starts a GPU probe (mmd-gpu-probe.socket)."""
        return self.runtime_dir / "gpu-probe.sock"

    @property
    def registrar_socket(self) -> Path:
        """Where the gateway asks for a model to be added or removed (mmd-registrar.socket)."""
        return self.runtime_dir / "registrar.sock"

    @property
    def unit_broker_socket(self) -> Path | None:
        """Where systemd starts a broker that drives model units (mmd-unit-broker.socket); a user may drive their own."""
        return self.runtime_dir / "unit-broker.sock" if self.kind is ScopeKind.SYSTEM else None

    @property
    def journal_socket(self) -> Path | None:
        """Where systemd starts a reader of mmd's log (mmd-journal.socket); a user may read their own."""
        return self.runtime_dir / "journal.sock" if self.kind is ScopeKind.SYSTEM else None

    @property
    def hub_dir(self) -> Path:
        """Weights from a hub, HF_HOME of what fetches them. Every engine reads them."""
        return self.cache_dir / "huggingface"

    @property
    def fetch_dir(self) -> Path:
        """One directory per model whose weights are fetched, where it is told why that failed (mmd.hub)."""
        return self.model_dir.with_name("mmd-fetch")

    def model_cache_dir(self, unit_id: str, *, private: bool = False) -> Path:
        """What a model's engines may write and find again; a user's own engines share one.

        `private`: see mmd.names.model_user. What an engine of the same id has left before must not run with root's secrets.
        """
        return (
            self.cache_dir / ("private" if private else "models") / unit_id if self.kind is ScopeKind.SYSTEM else self.cache_dir
        )

    def unit_dir(self, unit: UnitName) -> Path:
        """The runtime directory of one model unit."""
        return self.model_dir / f"{unit.id}@{unit.placement}"

    @classmethod
    def system(cls) -> "Scope":
        return cls(
            kind=ScopeKind.SYSTEM,
            config_dir=Path("/etc/mmd"),
            runtime_dir=Path("/run/mmd"),
            model_dir=Path("/run/mmd-model"),
            sim_dir=Path("/run/mmd-sim"),
            state_dir=Path("/var/lib/mmd"),
            cache_dir=Path("/var/cache/mmd"),
        )

    @classmethod
    def user(cls, environment: Mapping[str, str] = os.environ) -> "Scope":
        """The caller's own instance, from HOME and the XDG variables (no NSS: a generator may not ask for it)."""
        home = Path(environment.get("HOME", "/"))
        runtime = Path(environment.get("XDG_RUNTIME_DIR", "/run/user/0"))
        return cls(
            kind=ScopeKind.USER,
            config_dir=Path(environment.get("XDG_CONFIG_HOME", home / ".config")) / "mmd",
            runtime_dir=runtime / "mmd",
            model_dir=runtime / "mmd-model",
            sim_dir=runtime / "mmd-sim",
            state_dir=Path(environment.get("XDG_STATE_HOME", home / ".local/state")) / "mmd",
            cache_dir=Path(environment.get("XDG_CACHE_HOME", home / ".cache")) / "mmd",
        )
