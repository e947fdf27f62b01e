"""What operators are told, in seconds and bytes, and what idle models may and may not do."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from client import chat, stream
from testbed import Installation

_MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}, {memory: 24GiB}]}
policy: {min_residency: 0s}
resources: {ram: 100GiB}
defaults: {engine: sim, gpus: [0], sim: {load_time: 200ms, wake_time: 50ms, tokens_per_second: 500}}
models:
  over: {vram: 10GiB, args: ["--vram", "15032385536"]}
  under: {vram: 20GiB, args: ["--vram", "10737418240"]}
  pair: {vram: 8GiB, gpus: [0, 1]}
  twin: {vram: 4GiB, gpus: 1}
  host: {gpus: 0}
  deep: {vram: 4GiB, sleep: {level: 2}}
  stubborn: {vram: 4GiB, args: ["--sleep-keeps-memory"]}
  slow: {vram: 4GiB, sim: {load_time: 20s}}
  idler: {vram: 6GiB, idle: {sleep_after: 500ms}}
  talker: {vram: 2GiB, idle: {sleep_after: 200ms, stop_after: 400ms}, sim: {load_time: 100ms, tokens_per_second: 10}}
  off: {vram: 2GiB, wake_on_request: false}
  rester: {vram: 2GiB, idle: {min_sleep: 3s}}
"""
_SECONDS = r"[\d.]+ s"


@pytest.fixture(scope="module")
def operated(installed: Installation) -> Iterator[Installation]:
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


@pytest.fixture(autouse=True)
def nothing_running(operated: Installation) -> None:
    operated.ctl("stop", "--all", "--force")


def _told(operated: Installation, *words: str) -> str:
    """What mmdctl says last."""
    return operated.ctl(*words).stdout.splitlines()[-1]


def _model(operated: Installation, name: str) -> dict[str, Any]:
    return next(model for model in operated.status()["models"] if model["name"] == name)


def _state(operated: Installation, name: str) -> object:
    return _model(operated, name)["state"]


def _logged(operated: Installation, unit: str) -> list[str]:
    """What the gateway's journal says of a unit: what it began and what came of it."""
    return [line for line in operated.journal("-u", "mmd-gateway.service").splitlines() if f"mmd-model-{unit}.service" in line]


@pytest.mark.parametrize(
    ("model", "awake", "freed", "held"),
    [
        ("over", "14.0 GiB", "13.3 GiB", "0.7 GiB"),  # declared too small
        ("under", "10.0 GiB", "9.5 GiB", "0.5 GiB"),  # and too large
        ("pair", "2 x 8.0 GiB", "2 x 7.6 GiB", "2 x 0.4 GiB"),
    ],
)
def test_what_was_measured_is_what_is_said(operated: Installation, model: str, awake: str, freed: str, held: str) -> None:
    assert re.fullmatch(rf"{model}: ready in {_SECONDS}, {awake}", _told(operated, "start", model))
    slept = _told(operated, "sleep", model)
    assert re.fullmatch(rf"{model}: slept in {_SECONDS}, freed {freed}, {held} still held", slept)
    assert re.fullmatch(rf"{model}: awake in {_SECONDS}, {awake}", _told(operated, "wake", model))
    assert re.fullmatch(rf"{model}: stopped in {_SECONDS}, freed {awake}", _told(operated, "stop", model))
    assert _told(operated, "stop", model) == f"{model}: is stopped already"


def test_a_sleeper_that_stops_frees_what_it_still_held(operated: Installation) -> None:
    operated.ctl("start", "over")
    operated.ctl("sleep", "over")
    assert re.fullmatch(rf"over: stopped in {_SECONDS}, freed 0.7 GiB", _told(operated, "stop", "over"))


def test_a_model_without_gpus_is_told_of_in_seconds(operated: Installation) -> None:
    assert re.fullmatch(rf"host: ready in {_SECONDS}", _told(operated, "start", "host"))
    assert re.fullmatch(rf"host: stopped in {_SECONDS}", _told(operated, "stop", "host"))


def test_each_instance_is_told_of(operated: Installation) -> None:
    operated.systemctl("start", "mmd-model-twin@0.service", "mmd-model-twin@1.service")
    operated.wait_until(lambda: len(_model(operated, "twin")["instances"]) == 2, 5)
    each = rf"slept in {_SECONDS}, freed 3.8 GiB, 0.2 GiB still held"
    assert re.fullmatch(f"twin: @0: {each}; @1: {each}", _told(operated, "sleep", "twin"))
    each = rf"stopped in {_SECONDS}, freed 0.2 GiB"
    assert re.fullmatch(f"twin: @0: {each}; @1: {each}", _told(operated, "stop", "twin"))


def test_a_start_that_is_given_up_has_freed_nothing(operated: Installation) -> None:
    operated.ctl("start", "slow", "--no-wait")
    assert re.fullmatch(rf"slow: stopped in {_SECONDS}, freed 0.0 GiB", _told(operated, "stop", "slow"))
    assert _state(operated, "slow") == "pending", "it has not been ready yet"


def test_a_sleep_that_fails_says_why_and_what_was_done_instead(operated: Installation) -> None:
    operated.ctl("start", "stubborn")
    told = operated.ctl("sleep", "stubborn", check=False)
    assert told.returncode == 1
    failed = rf"stubborn: sleep failed after {_SECONDS}: .* says that it sleeps, but freed 0 MiB of 4096 MiB"
    assert re.match(rf"{failed}; stopped in {_SECONDS}, freed 4.0 GiB instead\n", told.stderr)


def test_a_sleep_that_host_memory_does_not_permit_goes_deeper_or_ends_in_a_stop(operated: Installation) -> None:
    operated.configure(_MODELS.replace("ram: 100GiB", "ram: 1GiB"))
    operated.ctl("start", "deep", "stubborn")
    told = _told(operated, "sleep", "deep", "--level", "1")
    slept = rf"deep: slept in {_SECONDS}, freed 3.9 GiB, 0.1 GiB still held"
    assert re.fullmatch(rf"{slept} \(at level 2, for want of host memory\)", told)
    told = operated.ctl("sleep", "stubborn", check=False).stderr
    assert re.match(rf"stubborn: there is no host memory for its sleep; stopped in {_SECONDS}, freed 4.0 GiB instead\n", told)
    operated.configure(_MODELS)


def test_what_nothing_can_measure_is_said_to_be_so(operated: Installation) -> None:
    operated.configure(_MODELS.replace("provider: sim", "provider: static"))
    assert re.fullmatch(rf"pair: ready in {_SECONDS}, 2 x 8.0 GiB \(not measured\)", _told(operated, "start", "pair"))
    slept = rf"pair: slept in {_SECONDS}, freed 2 x 7.6 GiB, 2 x 0.4 GiB still held \(not measured\)"
    assert re.fullmatch(slept, _told(operated, "sleep", "pair"))
    assert re.fullmatch(rf"pair: stopped in {_SECONDS}, freed 2 x 0.4 GiB \(not measured\)", _told(operated, "stop", "pair"))
    operated.configure(_MODELS)


def test_the_journal_says_the_same_of_sleeps_that_nobody_asked_for(operated: Installation) -> None:
    assert chat("idler").status == 200
    operated.wait_until(lambda: _state(operated, "idler") == "sleeping", 5, "idle.sleep_after")
    assert chat("over").status == 200
    assert chat("under").status == 200, "the other makes room"
    idle, evicted = _logged(operated, "idler@0"), _logged(operated, "over@0")
    assert re.fullmatch(rf"mmd-model-idler@0.service: slept in {_SECONDS}, freed 5.7 GiB, 0.3 GiB still held", idle[-1])
    assert re.fullmatch(rf"mmd-model-over@0.service: slept in {_SECONDS}, freed 13.3 GiB, 0.7 GiB still held", evicted[-1])
    assert idle[-2] == "sleep mmd-model-idler@0.service"


def test_a_model_that_requests_may_not_wake_answers_what_to_do(operated: Installation) -> None:
    assert chat("off").status == 200, "it may start on request"
    operated.ctl("sleep", "off")
    refused = chat("off")
    assert refused.status == 409
    assert "mmdctl wake off" in refused.error["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert _state(operated, "off") == "sleeping"
    operated.ctl("wake", "off")
    assert chat("off").status == 200


def test_a_request_waits_until_its_model_has_slept_long_enough(operated: Installation) -> None:
    assert chat("rester").status == 200
    operated.ctl("sleep", "rester")
    begun = time.monotonic()
    told = operated.ctl("start", "rester", "--no-wait").stdout
    assert "asleep for at least 3.0 s (idle.min_sleep)" in told
    assert _state(operated, "rester") == "sleeping"
    assert chat("rester").status == 200, "waited for, not refused"
    assert 1.5 < time.monotonic() - begun < 8


def test_idle_timers_leave_a_model_that_is_answering_alone(operated: Installation) -> None:
    begun = time.monotonic()
    lines = stream("talker", max_tokens=40)
    assert next(lines).startswith("data: ")
    seen = []
    while (talker := _model(operated, "talker"))["in_flight"]:
        seen.append(talker["state"])
    assert time.monotonic() - begun > 1, "several times as long as either timer"
    assert set(seen) == {"ready"}
    assert list(lines)[-2] == "data: [DONE]"
    operated.wait_until(lambda: _state(operated, "talker") == "stopped", 5, "afterwards they count")
    assert [line.split()[-2] for line in _logged(operated, "talker@0") if line.startswith(("sleep", "stop "))] == [
        "sleep",
        "stop",
    ]
