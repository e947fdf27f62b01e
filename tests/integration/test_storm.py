"""A storm on two simulated GPUs: requests, clients that leave, engines and gateway killed. No model may run out of memory."""

import contextlib
import random
import threading
import time
from collections import Counter

import pytest
from client import chat, stream
from testbed import Installation

_VRAM_GIB = {"a": 14, "b": 16, "c": 9, "d": 6, "e": 12, "f": 20}
_MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}, {memory: 24GiB}]}
policy: {min_residency: 200ms, max_wait: 3s}
defaults: {engine: sim, sim: {load_time: 300ms, wake_time: 100ms, tokens_per_second: 200}}
models:
""" + "".join(f"  {name}: {{vram: {gib}GiB}}\n" for name, gib in _VRAM_GIB.items())

_SEED = 7
_STORM_S = 20
_CLIENTS = 6


class _Storm:
    """Clients at random, each waiting for its answers; what they got."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.errors: list[str] = []

    def client(self, number: int) -> None:
        dice = random.Random(_SEED * 1000 + number)
        while not self.over.is_set():
            model, begun = dice.choice(sorted(_VRAM_GIB)), time.monotonic()
            try:
                if dice.random() < 0.2:
                    self._leave(model, dice)
                    continue
                answer = chat(model, timeout_s=60)
            except OSError:
                self.outcomes["cut"] += 1  # by the kill of the gateway
            else:
                self.outcomes[str(answer.status)] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
                if answer.status != 200:
                    self.errors.append(answer.error["message"])

    def _leave(self, model: str, dice: random.Random) -> None:
        with contextlib.suppress(OSError, AssertionError):
            lines = stream(model, max_tokens=50, timeout_s=dice.uniform(0.05, 1))
            next(lines)
        self.outcomes["left"] += 1


@pytest.mark.timeout(150)
def test_a_storm_of_requests_and_kills_never_runs_out_of_memory(installed: Installation) -> None:
    installed.configure(_MODELS)
    storm, dice = _Storm(), random.Random(_SEED)
    threads = [threading.Thread(target=storm.client, args=(number,)) for number in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _STORM_S
    while time.monotonic() < end:
        time.sleep(dice.uniform(0.5, 1.5))
        victim = dice.choice([*(f"mmd-model-{name}@*" for name in _VRAM_GIB), "mmd-gateway.service"])
        whom = dice.choice(["all", "main"])
        installed.systemctl("kill", "--signal=KILL", f"--kill-whom={whom}", victim, check=False)
    storm.over.set()
    for thread in threads:
        thread.join()
    journal = installed.journal("MMD_ROLE=model")
    assert "out of memory" not in journal.lower()
    assert storm.outcomes["200"] > 20, (storm.outcomes, storm.errors[-3:])
    assert all("killed" in error or "broke" in error or "nobody answers" in error for error in storm.errors), storm.errors
    assert storm.slowest_s < 40, f"no starvation past the bound; slowest {storm.slowest_s:.1f} s"
    for name in _VRAM_GIB:
        installed.ctl("reset", name)
        assert chat(name).status == 200, f"{name} works after the storm"
    assert all(gpu["used_bytes"] <= 24 << 30 for gpu in installed.status()["gpus"])
    installed.stop_all()
