"""A user's own mmd: `systemctl --user`, ~/.config/mmd, no broker, no root."""

import json
import subprocess

import pytest
from testbed import Installation

_MODELS = """
gateway: {listen: ["127.0.0.1:9000"], admin_listen: []}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
models:
  mine: {engine: sim, vram: 14GiB, secrets: {MY_TOKEN: /home/alice/token}, sim: {load_time: 200ms, tokens_per_second: 500}}
  also: {engine: sim, vram: 14GiB, sim: {load_time: 200ms, tokens_per_second: 500}}
"""


class _User:
    """Commands as a user with a session of their own."""

    def __init__(self, machine: Installation) -> None:
        self.machine = machine
        # The journal of this machine is volatile and so in one file: reading it takes the group (journald.conf(5), SplitMode=).
        machine.run("useradd", "--create-home", "--groups", "systemd-journal", "alice")
        self.uid = machine.run("id", "--user", "alice").stdout.strip()
        machine.systemctl("start", f"user@{self.uid}.service")

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        home = {"HOME": "/home/alice", "XDG_RUNTIME_DIR": f"/run/user/{self.uid}"}
        return self.machine.run(
            "runuser", "-u", "alice", "--", "env", *(f"{k}={v}" for k, v in home.items()), *argv, check=check
        )


@pytest.fixture(scope="module")
def alice(installed: Installation) -> _User:
    user = _User(installed)
    installed.write("/home/alice/.config/mmd/mmd.yaml", _MODELS)
    installed.write("/home/alice/token", "the-token-of-alice\n", 0o600)
    installed.run("chown", "-R", "alice:", "/home/alice/.config", "/home/alice/token")
    user.run("systemctl", "--user", "daemon-reload")
    user.run("systemctl", "--user", "start", "mmd-gateway.socket", "mmd-admin.socket")
    return user


def _chat(user: _User, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
    answer = user.run("curl", "-sS", "-d", body, "http://127.0.0.1:9000/v1/chat/completions").stdout
    content: str = json.loads(answer)["choices"][0]["message"]["content"]
    return content


def test_a_chat_request_starts_a_model_of_the_user(alice: _User) -> None:
    assert _chat(alice, "mine")
    assert alice.run("systemctl", "--user", "is-active", "mmd-model-mine@0.service").stdout.strip() == "active"
    owner = alice.run("ps", "-o", "user=", "-C", "mmd-runner").stdout.split()
    assert owner == ["alice"]


def test_a_secret_comes_from_a_file_of_the_user(alice: _User) -> None:
    runner = alice.run(
        "systemctl", "--user", "show", "--property=MainPID", "--value", "mmd-model-mine@0.service"
    ).stdout.strip()
    children = alice.machine.read(f"/proc/{runner}/task/{runner}/children").split()
    environments = [alice.machine.read(f"/proc/{pid}/environ") for pid in (runner, *children)]
    assert ["MY_TOKEN=the-token-of-alice" in each for each in environments] == [False, True]
    assert "the-token-of-alice" not in alice.run("systemctl", "--user", "show", "mmd-model-mine@0.service").stdout


def test_another_one_evicts_it_and_both_go_on(alice: _User) -> None:
    assert _chat(alice, "also")
    assert _chat(alice, "mine")
    status = json.loads(alice.run("mmdctl", "--user", "status", "--json").stdout)
    assert {m["name"]: m["state"] for m in status["models"]} == {"mine": "ready", "also": "sleeping"}


def test_the_gateway_may_restart_without_its_models(alice: _User) -> None:
    before = alice.run("systemctl", "--user", "show", "-p", "InvocationID", "mmd-model-mine@0.service").stdout
    alice.run("systemctl", "--user", "restart", "mmd-gateway.service")
    assert _chat(alice, "mine")
    assert alice.run("systemctl", "--user", "show", "-p", "InvocationID", "mmd-model-mine@0.service").stdout == before


def test_mmdctl_reads_logs_and_reloads(alice: _User) -> None:
    assert "Application startup complete" in alice.run("mmdctl", "--user", "logs", "mine").stdout
    assert alice.run("mmdctl", "--user", "reload").returncode == 0


def test_mmdctl_adds_and_removes_models_without_root(alice: _User) -> None:
    sim = ("--engine", "sim", "--gpus", "0", "--set", "sim={load_time: 100ms, tokens_per_second: 500}")
    added = alice.run("mmdctl", "--user", "add", "new", *sim).stdout
    assert "new: registered in /home/alice/.config/mmd/models.d/new.yaml" in added
    assert "new: verified: ready in" in added, "mmd-reload.path is not on here: mmdctl reloads by itself"
    assert _chat(alice, "new")
    alice.run("systemctl", "--user", "start", "mmd-reload.path")
    body = json.dumps({"name": "more", "engine": "sim", "gpus": 0})
    admin = f"/run/user/{alice.uid}/mmd/admin.sock"
    posted = alice.run("curl", "-sS", "--unix-socket", admin, "--json", body, "http://localhost/api/v1/models").stdout
    assert '"state":"pending"' in posted, "the gateway writes its own user's files by itself"
    for name in ("new", "more"):
        assert "nothing of it runs" in alice.run("mmdctl", "--user", "remove", name).stdout
