"""`mmdctl reload`: brings a changed configuration into use: it is checked, then systemd reads the units, then the gateway."""

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from mmd.config import Config
from mmd.ctl.client import Reloaded
from mmd.ctl.configuration import read
from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.scope import ScopeKind
from mmd.socket_units import port_socket_name

__all__ = ["bring_into_use", "is_active", "reload", "unit_states"]

_GATEWAY = "mmd-gateway.service"
_GATEWAY_SOCKET = "mmd-gateway.socket"
_SOCKETS = (_GATEWAY_SOCKET, "mmd-admin.socket", "mmd-admin-tcp.socket")
_PORTS = "mmd-port-*.socket"
"""The models' own ports. The gateway gets them while it runs, so they follow the configuration without anybody being asked."""
_SYSTEMCTL_TIMEOUT_S = 90.0
"""systemd's own bound for a job (DefaultTimeoutStartSec=, systemd-system.conf(5))."""


def reload(context: Context) -> Exit:
    """Checks the configuration and refuses a wrong one; else daemon-reload, and a reload of the gateway when it runs. Then the
    models' own ports are opened, moved and closed; of the other sockets it says what is to be done."""
    if context.scope.kind is ScopeKind.SYSTEM and os.geteuid() != 0:
        raise CtlError("only root may make systemd read the units again", hint=f"sudo {context.command('reload')}")
    loaded = read(context.scope)
    if loaded.problems:
        print("\n".join(map(str, loaded.problems)))
        raise CtlError("nothing was reloaded", hint="the configuration has problems; what was in use stays in use")
    changes, moved, gone = bring_into_use(context, loaded.config)
    print("\n".join(changes))
    if moved:
        print(f"{', '.join(moved)}: to listen where the configuration says now:")
        print(f"  {shlex.join((*context.systemctl, 'restart', *moved, _GATEWAY))}")
    if gone:
        print(f"{', '.join(gone)}: no longer in the configuration; to close it:")
        print(f"  {shlex.join((*context.systemctl, 'stop', *gone))}")
    return Exit.OK


@dataclass(frozen=True, slots=True)
class _Socket:
    """A socket unit: what its definition says, and whether it is open, perhaps at an earlier definition's addresses."""

    defined: bool = False
    active: bool = False
    listen: frozenset[str] = frozenset()

    def moved_from(self, before: "_Socket") -> bool:
        """Whether it was open, or is new, and its definition says other addresses than `before`."""
        return (before.active or not before.defined) and self.listen != before.listen


_NONE = _Socket()


def _is_port(unit: str) -> bool:
    return fnmatchcase(unit, _PORTS)


def _others(units: Iterable[str]) -> list[str]:
    return [unit for unit in units if not _is_port(unit)]


def _follow_ports(context: Context, sockets: Mapping[str, _Socket], moved: Sequence[str], gone: Sequence[str]) -> None:
    """Close what has moved or is gone before anything is opened: two models may have changed places. Nothing is opened while
    clients are not to connect at all (mmd-gateway.socket)."""
    closed = [unit for unit in (*moved, *gone) if _is_port(unit) and sockets[unit].active]
    if closed:
        _systemctl(context, "stop", *closed)
    if not sockets[_GATEWAY_SOCKET].active:
        return
    opened = [unit for unit, now in sockets.items() if _is_port(unit) and now.defined and (not now.active or unit in closed)]
    if opened:
        _systemctl(context, "start", *opened)


def _sockets(context: Context, ports: Sequence[str]) -> dict[str, _Socket]:
    text = _systemctl(context, "show", "--property=Id,LoadState,ActiveState,Listen", *_SOCKETS, *ports, _PORTS)
    sockets = {}
    for block in filter(None, text.strip().split("\n\n")):
        lines = frozenset(block.splitlines())
        unit = next(line.removeprefix("Id=") for line in lines if line.startswith("Id="))
        listen = frozenset(line for line in lines if line.startswith("Listen="))
        sockets[unit] = _Socket("LoadState=loaded" in lines, "ActiveState=active" in lines, listen)
    return sockets


def _reload_gateway(context: Context) -> list[str]:
    """Makes a running gateway read its configuration, and says what that changed.

    Through the admin API, which answers when it is done, with what changed. `systemctl reload` has a fresh process
    read it, and no answer: that is for a gateway whose admin socket cannot be reached."""
    if not is_active(context, _GATEWAY):
        return ["mmd-gateway is not running; it reads the configuration when it starts"]
    try:
        reloaded = context.client.reload()
    except CtlError as error:
        if error.exit_code is not Exit.UNREACHABLE:
            raise
        _systemctl(context, "reload", _GATEWAY)
        return [f"mmd-gateway was told to read the configuration; it cannot be asked what changed: {error.message}"]
    if reloaded.problems:
        print("\n".join(reloaded.problems))
        raise CtlError("mmd-gateway refused the configuration", hint="what was in use stays in use")
    return _changes(reloaded)


def bring_into_use(context: Context, config: Config) -> tuple[list[str], list[str], list[str]]:
    """Has systemd and the gateway read the files, which say `config`, and the models' ports follow: what that changed, in
    words, and which other sockets have moved or are gone."""
    # By name, as systemctl leaves inactive units out of what a pattern finds: new ones would be missed.
    ports = [port_socket_name(model) for model in config.models.values() if model.port is not None]
    before = _sockets(context, ports)
    _systemctl(context, "daemon-reload")
    after = _sockets(context, ports)
    changes = _reload_gateway(context)
    moved = [unit for unit, now in after.items() if now.defined and now.moved_from(before.get(unit, _NONE))]
    gone = [unit for unit, now in after.items() if not now.defined and now.active]
    _follow_ports(context, after, moved, gone)
    return changes, _others(moved), _others(gone)


def _changes(reloaded: Reloaded) -> list[str]:
    kinds = (("added", reloaded.added), ("changed", reloaded.changed), ("removed", reloaded.removed))
    lines = [f"{kind}: {', '.join(models)}" for kind, models in kinds if models]
    return lines or ["nothing has changed since mmd-gateway last read the configuration"]


def is_active(context: Context, unit: str) -> bool:
    """Whether systemd says that a unit is active."""
    return "ActiveState=active" in _systemctl(context, "show", "--property=ActiveState", unit).splitlines()


def unit_states(context: Context, kind: Literal["LoadState", "ActiveState"], units: Sequence[str]) -> list[str]:
    """The state of each unit: `loaded`, `not-found`, and so on, or `active`, `failed`, and so on."""
    return _systemctl(context, "show", f"--property={kind}", "--value", *units).split() if units else []


def _systemctl(context: Context, *words: str) -> str:
    """What systemctl prints; CtlError with what it complains about when it fails."""
    command = (*context.systemctl, *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMCTL_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise CtlError(f"{shlex.join(command)}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CtlError(f"cannot run {shlex.join(command)}: {error}") from error
    return done.stdout
