"""A storm on two simulated GPUs and a host with little memory: twelve models, requests, clients that leave, engines and gateway
killed. No model may run out of memory, no request may get lost, nobody may starve."""

import contextlib
import random
import threading
import time
from collections import Counter

import pytest
from client import chat, stream
from testbed import Installation

_GIB = 1 << 30
_RAM_GIB = 40
# Every way to be placed and to leave: both GPUs at once, pinned, never asleep, down to level 2, replicas, idle timers.
_MODELS = {
    "a": "{vram: 14GiB}",
    "b": "{vram: 16GiB, sleep: {level: 2}}",
    "c": "{vram: 9GiB, replicas: {max: 2, target_in_flight: 2}}",
    "d": "{vram: 6GiB, concurrency: 1, replicas: {max: 2}}",
    "e": "{vram: 12GiB, sleep: {level: off}}",
    "f": "{vram: 22GiB}",
    "g": "{vram: 10GiB, gpus: 2}",
    "h": "{vram: 3GiB, pin: true}",
    "i": "{vram: 5GiB, idle: {sleep_after: 500ms, stop_after: 2s}}",
    "j": "{vram: 7GiB, priority: 5}",
    "k": "{vram: 18GiB, resources: {license: 1}}",
    "l": "{vram: 11GiB, resources: {license: 1}, gpus: [1]}",
}
_CONFIGURATION = f"""
gpus: {{provider: sim, devices: [{{memory: 24GiB}}, {{memory: 24GiB}}]}}
resources: {{ram: {_RAM_GIB}GiB, license: 1}}
policy: {{min_residency: 200ms, max_wait: 3s}}
defaults:
  engine: sim
  sim: {{load_time: 300ms, wake_time: 100ms, tokens_per_second: 200}}
  args: ["--host-memory", "{_RAM_GIB * _GIB}", "--sleep-time", "0.05"]
models:
""" + "".join(f"  {name}: {model}\n" for name, model in _MODELS.items())

_SEED = 7
_CLIENTS = 8
_LIMIT_S = 60.0
"""max_wait, and for each of the models that may be ahead on a GPU its drain and its swap on a busy machine."""


class _Storm:
    """Clients at random, each waiting for its answers; what they got."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        dice = random.Random(_SEED * 1000 + number)
        while not self.over.is_set():
            model, begun = dice.choice(sorted(_MODELS)), time.monotonic()
            with self._lock:
                self.sent += 1
            outcome = self._leave(model, dice) if dice.random() < 0.2 else self._ask(model)
            with self._lock:
                self.outcomes[outcome] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)

    def _ask(self, model: str) -> str:
        try:
            answer = chat(model, timeout_s=2 * _LIMIT_S)
        except TimeoutError:
            return "lost"
        except OSError:
            return "cut"  # by the kill of the gateway
        if answer.status != 200:
            self.errors.append(answer.error["message"])
        return str(answer.status)

    def _leave(self, model: str, dice: random.Random) -> str:
        with contextlib.suppress(OSError, AssertionError):
            lines = stream(model, max_tokens=50, timeout_s=dice.uniform(0.05, 1))
            next(lines)
        return "left"


def _kill_something(installed: Installation, dice: random.Random) -> None:
    workers = installed.run("pgrep", "--full", "mmd.gateway.workers", check=False).stdout.split()
    victim = dice.choice([*(f"mmd-model-{name}@*" for name in _MODELS), "mmd-gateway.service", *workers])
    if victim in workers:
        installed.run("kill", "-KILL", victim, check=False)
    else:
        whom = dice.choice(["all", "main"])
        installed.systemctl("kill", "--signal=KILL", f"--kill-whom={whom}", victim, check=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("workers", "storm_s"), [(1, 60), (3, 30)])
def test_a_storm_of_requests_and_kills_never_runs_out_of_memory(installed: Installation, workers: int, storm_s: int) -> None:
    installed.configure(f"gateway: {{workers: {workers}}}\n{_CONFIGURATION}")
    storm, dice = _Storm(), random.Random(_SEED)
    threads = [threading.Thread(target=storm.client, args=(number,)) for number in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + storm_s
    while time.monotonic() < end:
        time.sleep(dice.uniform(1, 3))
        _kill_something(installed, dice)
    storm.over.set()
    for thread in threads:
        thread.join()
    print(f"{storm.outcomes}, slowest {storm.slowest_s:.1f} s; {Counter(storm.errors).most_common(5)}")
    assert "out of memory" not in installed.journal("MMD_ROLE=model").lower()
    assert "Traceback" not in installed.journal("MMD_ROLE=gateway")
    assert storm.outcomes.total() == storm.sent
    assert not storm.outcomes["lost"]
    assert storm.outcomes["200"] > storm_s, (storm.outcomes, storm.errors[-3:])
    assert all("killed" in error or "broke" in error or "nobody answers" in error for error in storm.errors), storm.errors
    assert storm.slowest_s < _LIMIT_S, f"no starvation past the bound; slowest {storm.slowest_s:.1f} s"
    for name in _MODELS:
        installed.ctl("reset", name)
        assert chat(name).status == 200, f"{name} works after the storm"
    assert all(gpu["used_bytes"] <= 24 * _GIB for gpu in installed.status()["gpus"])
    installed.stop_all()
