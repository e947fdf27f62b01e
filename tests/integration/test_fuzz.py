"""Whatever clients send to the installed gateway, while others use it: it neither ends, leaks nor says that it failed."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random

import pytest
from attacks import Attack, Ending, attack
from client import chat, stream
from testbed import PROCESSES, Installation, named

_SEED = int(os.environ.get("MMD_FUZZ_SEED", "1"))
_ATTACKS = int(os.environ.get("MMD_FUZZ_ATTACKS", "500"))
_MODELS = """
gateway: {workers: WORKERS, loading_keepalive: 100ms}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
defaults: {engine: sim, sim: {load_time: 100ms, tokens_per_second: 500}}
models:
  a: {vram: 6GiB}
  b: {vram: 6GiB, concurrency: 2}
"""
_GATEWAY = "mmd-gateway.service"
_THREADS = 6
_SILENCE_S = 0.05
_GROWTH_MAX_KIB = 64 << 10
_DESCRIPTORS_MORE = 24
"""Kept connections to engines, and the like."""


@pytest.fixture(params=PROCESSES, ids=named)
def machine(installed: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    installed.configure(_MODELS.replace("WORKERS", str(request.param)))
    yield installed
    installed.stop_all()


def _carry_out(this: Attack) -> None:
    with socket.create_connection(("127.0.0.1", 8000), timeout=5) as connection, suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in this.pieces:
            connection.sendall(piece)
        if this.ending is Ending.FINISH:
            connection.shutdown(socket.SHUT_WR)
        if this.ending in (Ending.WAIT, Ending.FINISH):
            connection.settimeout(_SILENCE_S)
            while connection.recv(1 << 16):
                pass
        if this.ending is Ending.RESET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Crowd:
    """Threads, and what went wrong in them."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def add(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=guarded))
        self.threads[-1].start()


def _processes(machine: Installation) -> list[int]:
    """The gateway's, as seen from outside."""
    group = machine.show(_GATEWAY, "ControlGroup")
    return [int(pid) for pid in machine.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs").stdout.split()]


def _memory_kib(machine: Installation, pid: int) -> int:
    lines = machine.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _descriptors(machine: Installation, pid: int) -> int:
    return len(machine.run("ls", f"/proc/{pid}/fd").stdout.split())


@pytest.mark.timeout(240 + _ATTACKS // 5)
def test_whatever_clients_send(machine: Installation) -> None:
    for name in ("a", "b"):
        assert chat(name).status == 200
    pids, since = _processes(machine), time.time()
    _attack(Random(_SEED), _ATTACKS // 10)  # what is allocated once
    before = {pid: (_memory_kib(machine, pid), _descriptors(machine, pid)) for pid in pids}
    crowd, over = _Crowd(), threading.Event()

    def well_behaved(name: str) -> None:
        while not over.is_set():
            assert chat(name).status == 200
            assert list(stream(name))[-2:] == ["data: [DONE]", ""]

    for name in ("a", "b"):
        crowd.add(lambda name=name: well_behaved(name))  # type: ignore[misc]
    attackers = _Crowd()
    for number in range(_THREADS):
        attackers.add(lambda number=number: _attack(Random(_SEED * 1000 + number), _ATTACKS // _THREADS))  # type: ignore[misc]
    for each in attackers.threads:
        each.join()
    over.set()
    for each in crowd.threads:
        each.join()
    assert attackers.errors + crowd.errors == []
    machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == machine.status()["gateway"]["waiting"] == 0, 30)
    assert _processes(machine) == pids, "none has ended"
    said = machine.journal("-u", _GATEWAY, f"--since=@{int(since)}")
    assert "Traceback" not in said, said
    assert "internal error" not in said, said
    for pid, (memory_kib, descriptors) in before.items():
        assert _memory_kib(machine, pid) - memory_kib < _GROWTH_MAX_KIB
        machine.wait_until(lambda pid=pid, most=descriptors + _DESCRIPTORS_MORE: _descriptors(machine, pid) <= most)  # type: ignore[misc]


def _attack(random: Random, count: int) -> None:
    for _ in range(count):
        _carry_out(attack(random, random.choice(("a", "b"))))
