"""A private real systemd for tests: packaging/lib/testbed, driven from Python.

Every testbed has a network namespace of its own (loopback only), so that ports never clash: each test may use 8000. A client in
the test process reaches it by `with testbed.network():`, which moves the calling thread there; the fixture `installed` does so
for a whole module, so its tests use `installed.api` like any client on the machine. What such a thread starts (threads,
processes) is in that network as well. Files of the testbed are read and written through /proc/PID/root.

The kernel's log is the host's: a generator's messages of other testbeds show up in `journal("-t", "mmd-generator")`, so look
for a name of your own in them.

The environment of /usr/lib/mmd takes a while to build; it is kept under build/ (`prepared_layer`), keyed by the fingerprint of
the sources, and copied into the files of each testbed.
"""

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

__all__ = ["CHECKOUT", "PROCESSES", "Installation", "Testbed", "downloads_layer", "named", "prepared_layer"]

CHECKOUT = Path(__file__).resolve().parents[2]
_TESTBED = CHECKOUT / "packaging" / "lib" / "testbed"
_LAYERS = CHECKOUT / "build" / "testbed"
_BUILD_LIMIT_S = 600.0
"""One installation with downloads, and the compiler on a busy machine."""
_KEEP_LAYERS_S = 1800.0
"""A layer that was not asked for in this long is in nobody's way when it goes: no test run takes that long."""


class Testbed:
    """One booted systemd. Root only. `close` (or `with`) leaves nothing behind."""

    __test__ = False  # pytest would collect it for its name

    def __init__(
        self,
        *,
        private_network: bool = True,
        layers: Sequence[Path] = (),
        binds: Sequence[str] = (),
        system: Path | None = None,
    ) -> None:
        """`binds`: what else of the host is visible, read-only, as HOST or HOST:INSIDE. `system`: the root of another system
        than the host's, whose systemd it is then."""
        self.name = f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        options = [word for bind in (str(CHECKOUT), *binds) for word in ("--bind-ro", bind)]
        options += ["--private-network"] if private_network else []
        for layer in layers:
            options += ["--layer", str(layer)]
        options += ["--root", str(system)] if system else []
        self._control("start", *options, timeout_s=60)
        self.pid = int(self._control("pid"))
        self.root = Path(f"/proc/{self.pid}/root")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._control("stop", timeout_s=60)

    def run(
        self,
        *argv: str | Path,
        user: str | None = None,
        check: bool = True,
        timeout_s: float = 30,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside and returns what it printed; a failing one raises, with that in the message."""
        command = [str(word) for word in argv]
        if env:
            command = ["env", *(f"{key}={value}" for key, value in env.items()), *command]
        if user is not None:
            command = ["runuser", "-u", user, "--", *command]
        done = subprocess.run(
            [_TESTBED, "enter", self.name, *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def path(self, path: str | Path) -> Path:
        """Where a file of the testbed is for this process."""
        return self.root / str(path).lstrip("/")

    def read(self, path: str | Path) -> str:
        return self.path(path).read_text()

    def write(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        """Writes a file inside, with its directories."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def systemctl(self, *argv: str, check: bool = True, timeout_s: float = 60) -> str:
        return self.run("systemctl", *argv, check=check, timeout_s=timeout_s).stdout

    def show(self, unit: str, key: str) -> str:
        """One property of a unit (org.freedesktop.systemd1(5)), as `systemctl show` prints it."""
        return self.systemctl("show", "--property", key, "--value", unit).strip()

    def journal(self, *argv: str) -> str:
        """Messages, one per line, without their prefix."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--quiet", "--output=cat", *argv).stdout

    def ps(self) -> list[str]:
        """The command lines of all processes inside."""
        return self.run("ps", "-e", "-o", "args=", "-ww").stdout.splitlines()

    def wait_until(self, predicate: Callable[[], object], timeout_s: float = 10, what: str = "") -> None:
        """Polls until `predicate` is true; raises when it is not within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not predicate():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s} s: {what or predicate}")
            time.sleep(0.05)

    @contextmanager
    def network(self) -> Iterator[None]:
        """Moves the calling thread into the testbed's network, and back."""
        with Path("/proc/thread-self/ns/net").open() as home, Path(f"/proc/{self.pid}/ns/net").open() as there:
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def _control(self, command: str, *argv: str, timeout_s: float = 20) -> str:
        done = subprocess.run(
            [_TESTBED, command, self.name, *argv], check=False, capture_output=True, text=True, timeout=timeout_s
        )
        if done.returncode != 0:
            raise AssertionError(f"testbed {command}: {done.stderr}")
        return done.stdout


PROCESSES = (1, 2) if os.environ.get("MMD_THOROUGH") else (2,)
"""Of the gateway (gateway.workers), for modules that run once for each. Unit tests cover one process; a real systemd adds what
lies between several. `tests/run --thorough` runs both."""


def named(processes: int) -> str:
    return "alone" if processes == 1 else "workers"


class Installation(Testbed):
    """A testbed with mmd installed by packaging/up, no models yet, nothing running but the sockets."""

    api = "http://127.0.0.1:8000"
    """The OpenAI API, inside the testbed's network."""

    def __init__(self, *, binds: Sequence[str] = (), layers: Sequence[Path] = (), system: Path | None = None) -> None:
        super().__init__(layers=[prepared_layer(system), *layers], binds=binds, system=system)
        self.write("/etc/mmd/mmd.yaml", "gpus: {provider: sim, devices: [{memory: 24GiB}]}\n")
        try:
            self.up("--no-request")
        except BaseException:
            self.close()
            raise

    def up(self, *options: str, timeout_s: float = 120) -> str:
        return self.run(CHECKOUT / "packaging" / "up", *options, timeout_s=timeout_s).stdout

    def configure(self, yaml_text: str) -> None:
        """Replaces the configuration and brings it into use: new units, moved sockets, the gateway's own view of it.

        The watch on the file (mmd-reload.path) is off meanwhile, so that nothing is reloaded twice.
        """
        self.systemctl("stop", "mmd-reload.path", "mmd-reload-request.service", "mmd-reload.service")
        self.write("/etc/mmd/mmd.yaml", yaml_text)
        before = self._listens()
        self.ctl("reload")
        after = self._listens()
        gone = [unit for unit in before if unit not in after]
        moved = [unit for unit in after if unit in before and before[unit] != after[unit]]
        for action, units in (("stop", gone), ("restart", moved), ("start", sorted(after))):
            if units:
                self.systemctl(action, *units, check=action != "stop")  # `mmdctl reload` has closed ports of models already

    def ctl(self, *argv: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return self.run("/usr/bin/mmdctl", *argv, check=check, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """`mmdctl status --json`"""
        status: dict[str, Any] = json.loads(self.ctl("status", "--json").stdout)
        return status

    def stop_all(self) -> None:
        """Ends models and gateway and forgets failures; the sockets stay."""
        self.systemctl("stop", "mmd-model-*", "mmd-gateway.service", check=False)
        self.systemctl("reset-failed", check=False)

    def _listens(self) -> dict[str, str]:
        files = self.systemctl("list-unit-files", "--no-legend", "--plain", "mmd-*.socket")
        names = [line.split()[0] for line in files.splitlines()]
        return {name: self.show(name, "Listen") for name in names}


def prepared_layer(system: Path | None = None) -> Path:
    """A tree with /usr/lib/mmd of the present sources, built by packaging/up in a testbed of its own when it is not there yet.

    It starts from the latest other layer, so that only what changed is installed. `system`: for the system with this root,
    which has another Python.
    """
    folder = _layers(system)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        layers = sorted((path for path in folder.glob("layer-*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
        layer = folder / f"layer-{_fingerprint()}"
        downloads = downloads_layer(system)
        if layer not in layers or not downloads.is_dir():
            start = [*layers[-1:], downloads] if downloads.is_dir() else []
            with Testbed(private_network=False, layers=start, system=system) as testbed:
                # The host's network, for the downloads: no TCP port of it may be taken.
                testbed.write("/etc/mmd/mmd.yaml", "gateway: {listen: [/run/mmd/api.sock], admin_listen: []}\n")
                testbed.run(CHECKOUT / "packaging" / "up", "--no-request", timeout_s=_BUILD_LIMIT_S)
                _keep(testbed, "var/cache/mmd-downloads", downloads)
                _keep(testbed, "usr/lib/mmd", layer)
        os.utime(layer)
        for old in layers:
            if old != layer and time.time() - old.stat().st_mtime > _KEEP_LAYERS_S:
                shutil.rmtree(old)
    return layer


def downloads_layer(system: Path | None = None) -> Path:
    """The packages that packaging/up downloaded for `prepared_layer`, as a layer: with it, it installs without a network."""
    return _layers(system) / "downloads"


def _layers(system: Path | None) -> Path:
    return _LAYERS if system is None else system.parent / "testbed"


def _keep(testbed: Testbed, tree: str, layer: Path) -> None:
    """Copies a tree of a testbed into a layer, which is there as a whole or not at all."""
    unfinished = layer.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(testbed.path(tree), unfinished / tree, symlinks=True)
    shutil.rmtree(layer, ignore_errors=True)
    unfinished.rename(layer)


def _fingerprint() -> str:
    """What packaging/up itself goes by."""
    script = '. "$0/packaging/lib/environment.sh"; checkout=$0; source_fingerprint'
    return subprocess.run(["bash", "-euc", script, CHECKOUT], check=True, capture_output=True, text=True).stdout.strip()


def _set_namespace(descriptor: int) -> None:
    """setns(2) of the calling thread; Python has it from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
