"""The sandbox of model units: what an engine may not do (systemd.exec(5), Sandboxing).

Loading a model runs code that somebody published. So an engine gets no privileges, a user of its own, a read-only system, of
/run its own directory only, memory that no other engine sees, and no network beyond loopback: weights from a hub are fetched by
another unit before it starts (mmd.hub_unit).
"""

from collections.abc import Iterator, Sequence

from mmd.config import EngineKind, Model
from mmd.scope import Scope, ScopeKind
from mmd.unitfile import Block, Item, comment, path_word

__all__ = ["ANYWHERE", "ISOLATION", "NO_DEVICES", "sandbox"]

_BELOW_HOME = ("\n/home/", "\n/root/", "=/home/", "=/root/")  # at the start of a word or line, or as an option's value

ANYWHERE = Block("""
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

ISOLATION = Block("""
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
PrivateTmp=yes
PrivateMounts=yes
# Whatever is not its own belongs to nobody in there: no process of another user can be asked for, not even by root's number.
PrivateUsers=yes
# System V IPC and POSIX message queues of its own.
PrivateIPC=yes
ProtectProc=invisible
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictNamespaces=yes
""")
# MemoryDenyWriteExecute= is not there: engines compile kernels at run time. ProcSubset=pid neither: they read /proc/meminfo.

_PRIVATE = Block("""
# Shared memory of its own: systemd would bind the machine's /dev/shm even into a private /dev.
TemporaryFileSystem=/dev/shm:size=50%,mode=1777,nosuid,nodev
# Of /run it sees its own directory and the runner's way to systemd, sd_notify(3): no D-Bus, no journal, no socket of mmd, of
# another engine or of a container manager.
TemporaryFileSystem=/run:ro,mode=0755,nosuid,nodev
# Again, for a workdir that leads to /run.
TemporaryFileSystem=/run/mmd-model:ro,mode=0755,nosuid,nodev
BindPaths=/run/systemd/notify
""")

_NVIDIA = Block("""
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

NO_DEVICES = Block("""
PrivateDevices=yes
ProtectClock=yes
""")

_LOOPBACK = Block("""
IPAddressDeny=any
IPAddressAllow=localhost
""")


def sandbox(model: Model, *, scope: Scope, directory: str, uses_devices: bool, argv: Sequence[str]) -> Iterator[Item]:
    """The directives. `directory` is the unit's runtime directory, with specifiers."""
    yield comment("The sandbox; `systemd-analyze security` rates it.")
    yield ANYWHERE
    if scope.kind is ScopeKind.USER:
        return  # a user's manager can neither mount nor filter addresses
    yield ISOLATION
    yield _NVIDIA if uses_devices else NO_DEVICES
    words = "\n".join(("", *argv, str(model.venv or ""), str(model.workdir or "")))
    if any(mark in words for mark in _BELOW_HOME):
        yield from (comment("The configuration names a path below it."), ("ProtectHome", "read-only"))
    else:
        yield "ProtectHome", "yes"
    yield _PRIVATE
    yield "BindPaths", directory
    if model.engine is EngineKind.SIM:
        yield comment("The simulated GPUs' memory, which all simulated engines share.")
        yield "BindPaths", path_word(str(scope.sim_dir), prefix="-", setting="the simulation's folder")
    if model.engine is EngineKind.COMMAND and model.workdir is not None and model.user is not None:
        # Only root names a user. A workdir of a member of mmd-admin's, /run or a link to it, would take the place of what
        # hides /run: of two entries for one path systemd keeps this one.
        yield "ReadWritePaths", path_word(str(model.workdir), prefix="-", setting="workdir")
    yield _LOOPBACK
