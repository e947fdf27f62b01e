"""Sizes are learned: what an engine really holds counts, across restarts of the gateway, until its definition changes."""

import re
from collections.abc import Iterator

import pytest
from client import chat
from testbed import Installation

_GIB = 1 << 30
_MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
resources: {ram: 100GiB}
defaults: {engine: sim, sim: {load_time: 200ms, wake_time: 50ms, tokens_per_second: 500}}
models:
  over: {vram: 10GiB, args: ["--vram", "15032385536"]}
  other: {vram: 11GiB}
  guess: {params: 2B, sim: {load_time: 1200ms, wake_time: 50ms}}
"""


@pytest.fixture(scope="module")
def learning(installed: Installation) -> Iterator[Installation]:
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


def _held(learning: Installation, name: str) -> int:
    model = next(model for model in learning.status()["models"] if model["name"] == name)
    return max((instance["vram_bytes"] for instance in model["instances"]), default=0)


def test_what_an_engine_really_holds_is_what_it_is_reckoned_with(learning: Installation) -> None:
    assert chat("over").status == 200
    learning.wait_until(lambda: _held(learning, "over") == 14 * _GIB, 5, "14 GiB were measured, not the declared 10")


def _shown(learning: Installation, name: str) -> dict[str, str]:
    lines = (line.strip().partition(": ") for line in learning.ctl("show", name).stdout.splitlines())
    return {title: words for title, _, words in reversed(list(lines))}


def test_show_tells_what_is_reckoned_with_and_why(learning: Installation) -> None:
    before = _shown(learning, "guess")
    estimate = "2 B x 2 bytes (bf16) = 3.7 GiB weights + 1.0 GiB KV cache + 1.7 GiB overhead = 6.4 GiB"
    assert (before["VRAM"], before["Estimated"], before["Start"]) == ("6.4 GiB while awake", estimate, "60 s (guessed)")
    assert before["Asleep"] == "0.3 GiB (guessed) at level 1, and 6.1 GiB of host memory; awake in 3.8 s (guessed)"
    learning.ctl("start", "guess")
    learning.ctl("sleep", "guess")
    learning.ctl("wake", "guess")
    after = _shown(learning, "guess")
    assert after["Measured"] == "6.4 GiB at most, so 6.4 GiB is reserved"
    assert re.fullmatch(r"[\d.]+ s \(learned\)", after["Start"])
    asleep = r"0.3 GiB \(measured\) at level 1, and 6.1 GiB of host memory; awake in [\d.]+ s \(learned\)"
    assert re.fullmatch(asleep, after["Asleep"])
    learning.ctl("stop", "guess")
    over = _shown(learning, "over")
    assert (over["Declared"], over["Measured"]) == ("10.0 GiB", "14.0 GiB at most, so 14.0 GiB is reserved")


def test_the_next_gateway_knows_it_too_and_makes_room_before_it_starts(learning: Installation) -> None:
    learning.ctl("stop", "over")
    learning.systemctl("restart", "mmd-gateway.service")
    assert chat("other").status == 200
    assert chat("over").status == 200
    assert _held(learning, "other") < _GIB, "10 + 11 GiB would have fitted, 14 + 11 does not: it sleeps"
    assert "out of memory" not in learning.journal("MMD_ROLE=model").lower()


def test_a_start_that_runs_out_of_memory_is_tried_once_more_with_more_room(learning: Installation) -> None:
    learning.stop_all()
    learning.run("rm", "-f", "/var/lib/mmd/lessons.sqlite")
    assert chat("other").status == 200
    assert chat("over").status == 200, "the first try failed beside the other, the second had it sleep"
    assert "out of memory" in learning.journal("MMD_MODEL=over").lower()
    assert learning.status()["gateway"]["problems"] == []


def test_what_was_learned_of_another_definition_is_forgotten(learning: Installation) -> None:
    learning.ctl("stop", "--all")
    learning.configure(_MODELS.replace('args: ["--vram", "15032385536"]', "description: well declared"))
    assert chat("other").status == 200
    assert chat("over").status == 200
    assert _held(learning, "other") == 11 * _GIB, "10 + 11 GiB fit"
