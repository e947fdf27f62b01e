"""The sandbox of model units: what an engine may not do (systemd.exec(5), Sandboxing).

Loading a model runs code that somebody published. So an engine gets no privileges, a read-only system, no other model's
socket, and no network beyond loopback unless it has to download its weights.
"""

from collections.abc import Iterator, Sequence

from mmd.config import EngineKind, Model
from mmd.scope import Scope, ScopeKind
from mmd.unitfile import Directive, comment, directives, path, path_word

__all__ = ["sandbox"]

_BELOW_HOME = ("\n/home/", "\n/root/", "=/home/", "=/root/")  # at the start of a word or line, or as an option's value

_ANYWHERE = directives("""
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
LimitNOFILE=65536
""")

_SYSTEM = directives("""
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
PrivateTmp=yes
PrivateMounts=yes
# In a user namespace of its own it cannot reach into another engine's process, although both have the same user.
PrivateUsers=yes
ProtectProc=invisible
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
# Together with ProtectKernelTunables= systemd 252 leaves /run writable, contrary to ProtectSystem=strict.
ReadOnlyPaths=/run
RestrictNamespaces=yes
""")
# MemoryDenyWriteExecute= is not there: engines compile kernels at run time. ProcSubset=pid neither: they read /proc/meminfo.

_NVIDIA = directives("""
# NVIDIA's devices and nothing else. ProtectClock= would add rtc to the list.
PrivateDevices=no
DevicePolicy=closed
DeviceAllow=char-nvidia rw
DeviceAllow=char-nvidiactl rw
DeviceAllow=char-nvidia-caps rw
DeviceAllow=char-nvidia-frontend rw
DeviceAllow=char-nvidia-uvm rw
DeviceAllow=char-drm rw
# Host memory that is pinned for copies to the GPU.
LimitMEMLOCK=infinity
""")

_NO_DEVICES = directives("""
PrivateDevices=yes
ProtectClock=yes
""")

_LOOPBACK = directives("""
IPAddressDeny=any
IPAddressAllow=localhost
""")


def sandbox(model: Model, *, scope: Scope, directory: str, uses_devices: bool, argv: Sequence[str]) -> Iterator[Directive]:
    """The directives. `directory` is the unit's runtime directory, with specifiers."""
    yield comment("The sandbox; `systemd-analyze security` rates it.")
    yield from _ANYWHERE
    if scope.kind is ScopeKind.USER:
        return  # a user's manager can neither mount nor filter addresses
    yield from _SYSTEM
    yield from _NVIDIA if uses_devices else _NO_DEVICES
    words = "\n".join(("", *argv, str(model.venv or ""), str(model.workdir or "")))
    if any(mark in words for mark in _BELOW_HOME):
        yield from (comment("The configuration names a path below it."), ("ProtectHome", "read-only"))
    else:
        yield "ProtectHome", "yes"
    yield comment("Of the engines' sockets it sees its own only.")
    yield "TemporaryFileSystem", f"{path(str(scope.model_dir), setting='scope')}:ro"
    yield "BindPaths", directory
    if model.engine is EngineKind.SIM:
        yield "ReadWritePaths", path_word(str(scope.sim_dir), prefix="-", setting="the simulation's folder")
    if model.engine is EngineKind.COMMAND and model.workdir is not None:
        yield "ReadWritePaths", path_word(str(model.workdir), prefix="-", setting="workdir")
    if _downloads(model):
        yield comment("It may have to download its weights, so its network is not limited to loopback.")
    else:
        yield from _LOOPBACK


def _downloads(model: Model) -> bool:
    """Whether its weights come from a hub rather than from a path."""
    return model.engine is EngineKind.VLLM and not (model.model or model.name).startswith("/")
