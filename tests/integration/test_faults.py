"""What goes wrong on real machines: engines that break, a gateway that is killed, a bus that goes away, a bad configuration."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator

import pytest
from client import Answer, chat, stream
from testbed import Installation

_MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
models:
  good: {engine: sim, vram: 4GiB, sim: {load_time: 200ms, tokens_per_second: 500}}
  calm: {engine: sim, gpus: 0, sim: {load_time: 200ms, tokens_per_second: 20}}
  broken: {engine: sim, vram: 4GiB, args: ["--exit-during-load", "3"], sim: {load_time: 200ms}}
  sick: {engine: sim, vram: 4GiB, args: ["--never-healthy"], health: {timeout: 1s}, sim: {load_time: 100ms}}
  mortal: {engine: sim, vram: 4GiB, args: ["--die-after-requests", "2"], sim: {load_time: 200ms, tokens_per_second: 500}}
  stubborn: {engine: sim, vram: 4GiB, args: ["--sleep-keeps-memory"], sim: {load_time: 200ms}}
  slow: {engine: sim, vram: 4GiB, sim: {load_time: 4s, tokens_per_second: 500}}
  large: {engine: sim, vram: 22GiB, sim: {load_time: 200ms}}
"""


@pytest.fixture(scope="module")
def faulty(installed: Installation) -> Iterator[Installation]:
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


def _model(faulty: Installation, name: str) -> dict[str, object]:
    found: dict[str, object] = next(m for m in faulty.status()["models"] if m["name"] == name)
    return found


def test_an_engine_that_exits_during_its_start_is_a_503_with_its_last_words(faulty: Installation) -> None:
    answer = chat("broken")
    assert answer.status == 503
    message = answer.error["message"]
    assert "exited with status 3" in message
    assert len(message.splitlines()) > 1, "the engine's log lines follow"
    assert int(answer.headers["retry-after"]) >= 1
    again = chat("broken", timeout_s=1)
    assert again.status == 503
    assert "the next try is in" in again.error["message"]
    assert faulty.show("mmd-model-broken@0.service", "NRestarts") == "0", "the gateway decides when to try again"


def test_an_engine_that_never_becomes_healthy_is_given_up(faulty: Installation) -> None:
    begun = time.monotonic()
    answer = chat("sick")
    assert answer.status == 503
    assert "health" in answer.error["message"]
    assert time.monotonic() - begun < 15


def test_repeated_failures_end_in_failed_until_reset(faulty: Installation) -> None:
    deadline = time.monotonic() + 40
    while "reset" not in chat("broken").error["message"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert _model(faulty, "broken")["state"] == "failed"
    faulty.ctl("reset", "broken")
    assert _model(faulty, "broken")["state"] == "pending"
    faulty.stop_all()


def test_an_engine_that_dies_while_serving_fails_its_request_and_serves_the_next(faulty: Installation) -> None:
    """It serves two requests, the warm-up being the first, and dies of the third; whoever comes next gets a new one."""
    answers = [chat("mortal") for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 502, 200, 502]
    assert answers[1].error["code"] == "engine_failed"
    assert int(answers[1].headers["retry-after"]) >= 1


def test_a_killed_runner_comes_back(faulty: Installation) -> None:
    assert chat("good").status == 200
    faulty.systemctl("kill", "--signal=KILL", "--kill-whom=main", "mmd-model-good@0.service")
    # Until systemd has ended the engine as well, a request may reach it and be cut off: that one is answered with a 502.
    faulty.wait_until(lambda: faulty.show("mmd-model-good@0.service", "ActiveState") != "active", 5)
    assert chat("good").status == 200
    assert faulty.show("mmd-model-good@0.service", "ActiveState") == "active"


def test_a_sleep_that_frees_nothing_ends_in_a_stop(faulty: Installation) -> None:
    assert chat("stubborn").status == 200
    assert chat("large").status == 200, "no out-of-memory: the gateway saw that the memory did not come back"
    assert _model(faulty, "stubborn")["state"] == "stopped"
    faulty.stop_all()


def test_a_killed_gateway_loses_no_model_and_refuses_nobody(faulty: Installation) -> None:
    """kill -9 with models loaded, one asleep, and a request waiting."""
    assert chat("calm").status == 200
    assert chat("good").status == 200
    faulty.ctl("sleep", "good", "--level", "2")
    units = ["mmd-model-calm@cpu.service", "mmd-model-good@0.service"]
    before = [faulty.show(unit, "InvocationID") for unit in units]
    waiting = threading.Thread(target=_quietly, args=("slow",))
    waiting.start()
    faulty.wait_until(lambda: faulty.show("mmd-model-slow@0.service", "ActiveState") == "activating", 5)
    faulty.systemctl("kill", "--signal=KILL", "mmd-gateway.service")
    answers = [chat(name) for name in ("calm", "good", "slow")]
    waiting.join()
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert [faulty.show(unit, "InvocationID") for unit in units] == before, "re-adopted, not restarted"
    assert "\ufffd" not in answers[1].text
    assert faulty.show("mmd-model-slow@0.service", "NRestarts") == "0"


def _quietly(model: str) -> None:
    with contextlib.suppress(OSError):  # its connection died with the gateway
        chat(model)


@pytest.mark.timeout(180)
def test_fifty_restarts_under_load_fail_no_new_request(faulty: Installation) -> None:
    assert chat("good").status == 200
    failures: list[str] = []
    served = [0, 0]
    over = threading.Event()

    def load(number: int) -> None:
        while not over.is_set():
            try:
                answer = chat("good", timeout_s=20)
            except OSError as error:
                failures.append(repr(error))
            else:
                served[number] += 1
                if answer.status != 200:
                    failures.append(answer.text)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        faulty.systemctl("restart", "mmd-gateway.service")
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert min(served) >= 25


def test_a_stream_in_progress_survives_a_restart(faulty: Installation) -> None:
    lines = stream("calm", max_tokens=40)
    next(lines)
    faulty.systemctl("restart", "--no-block", "mmd-gateway.service")
    assert list(lines)[-2] == "data: [DONE]"


def test_dbus_daemon_restarted(faulty: Installation) -> None:
    assert chat("good").status == 200
    faulty.ctl("stop", "good")
    faulty.systemctl("kill", "--signal=KILL", "dbus.service")
    assert chat("good").status == 200
    assert faulty.status()["gateway"]["systemd"] == "connected"
    faulty.systemctl("daemon-reexec")
    faulty.ctl("stop", "good")
    assert chat("good").status == 200


def test_a_broken_configuration_changes_nothing_and_names_the_line(faulty: Installation) -> None:
    assert chat("good").status == 200
    before = faulty.show("mmd-model-good@0.service", "InvocationID")
    faulty.systemctl("stop", "mmd-reload.path")
    faulty.write("/etc/mmd/mmd.yaml", _MODELS.replace("good: {engine: sim, vram", "good: {engine: sim, vrma"))
    refused = faulty.ctl("reload", check=False)
    assert refused.returncode == 1
    assert re.search(r"mmd\.yaml:5: .*vrma.*vram", refused.stdout + refused.stderr)
    assert faulty.systemctl("reload", "mmd-gateway.service", check=False) == ""
    assert "vrma" in faulty.journal("-u", "mmd-gateway.service")
    assert chat("good").status == 200
    assert faulty.show("mmd-model-good@0.service", "InvocationID") == before
    faulty.configure(_MODELS)


def test_a_reload_touches_only_what_changed(faulty: Installation) -> None:
    assert chat("good").status == 200
    assert chat("calm").status == 200
    good, calm = "mmd-model-good@0.service", "mmd-model-calm@cpu.service"
    before = faulty.show(good, "InvocationID"), faulty.show(calm, "InvocationID")
    faulty.configure(_MODELS)
    assert (faulty.show(good, "InvocationID"), faulty.show(calm, "InvocationID")) == before, "the same configuration"
    faulty.configure(_MODELS.replace("tokens_per_second: 20}", "tokens_per_second: 40}"))
    assert chat("calm").status == 200
    faulty.wait_until(lambda: faulty.show(calm, "InvocationID") != before[1], 5, "calm was replaced")
    assert faulty.show(good, "InvocationID") == before[0]
    faulty.configure(_MODELS)


def test_a_removed_model_is_stopped(faulty: Installation) -> None:
    assert chat("good").status == 200
    without = "\n".join(line for line in _MODELS.splitlines() if "good:" not in line)
    faulty.configure(without)
    assert chat("good").status == 404
    faulty.wait_until(lambda: faulty.show("mmd-model-good@0.service", "ActiveState") == "inactive", 10)
    faulty.configure(_MODELS)


def test_a_second_up_while_serving_stops_no_model(faulty: Installation) -> None:
    assert chat("good").status == 200
    before = faulty.show("mmd-model-good@0.service", "InvocationID")
    answers: list[Answer] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            answers.append(chat("good"))

    thread = threading.Thread(target=load)
    thread.start()
    faulty.up("--no-request")
    over.set()
    thread.join()
    assert {answer.status for answer in answers} == {200}
    assert faulty.show("mmd-model-good@0.service", "InvocationID") == before


def test_the_gateway_down_is_said_in_useful_words(faulty: Installation) -> None:
    faulty.systemctl("stop", "mmd-admin.socket", "mmd-gateway.socket", "mmd-admin-tcp.socket", "mmd-gateway.service")
    told = faulty.ctl("status", check=False)
    assert told.returncode == 3
    assert "systemctl start mmd-gateway.socket" in told.stderr
    faulty.systemctl("start", "mmd-admin.socket", "mmd-gateway.socket", "mmd-admin-tcp.socket")
