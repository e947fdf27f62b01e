"""mmdctl check, config, reload, cat and logs: with real files, and a systemctl and journalctl that note what they are asked."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ctl_gateway import Gateway, example, serving

from mmd.ctl.client import Reloaded

MMDCTL = str(Path(sys.executable).with_name("mmdctl"))
GOOD = """\
gpus: {provider: sim, devices: [{memory: 24GiB}]}
profiles:
  small: {vram: 4GiB}
models:
  demo/idle: {id: idle, engine: sim, profile: small, aliases: [lazy]}
"""
SYSTEMCTL = """\
#!/bin/sh
echo "$*" >> "$MMD_TEST/asked"
echo "$*" >> "$MMD_TEST/everything"
case "$*" in
*daemon-reload*) touch "$MMD_TEST/reloaded" ;;
*"show --property=Id"*) if [ -e "$MMD_TEST/reloaded" ]; then cat "$MMD_TEST/after"; else cat "$MMD_TEST/before"; fi ;;
*"show --property=ActiveState"*) cat "$MMD_TEST/gateway" ;;
esac
"""
JOURNALCTL = """\
#!/bin/sh
case "$*" in
*--follow*_UID=*) cat "$MMD_TEST/entries" ;;
*) echo "$*" >> "$MMD_TEST/asked" ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A user's instance of mmd in a folder, with a systemctl that answers from files."""

    root: Path

    @property
    def config_dir(self) -> Path:
        return self.root / "config/mmd"

    @property
    def socket(self) -> Path:
        return self.root / "run/mmd/admin.sock"

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HOME": str(self.root),
            "XDG_CONFIG_HOME": str(self.root / "config"),
            "XDG_RUNTIME_DIR": str(self.root / "run"),
            "MMD_TEST": str(self.root),
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
        }
        return subprocess.run(
            [MMDCTL, "--user", *words], capture_output=True, text=True, timeout=30, env=environment, check=False
        )

    def asked(self) -> list[str]:
        """What systemctl was asked to change."""
        asked = (self.root / "asked").read_text().splitlines() if (self.root / "asked").exists() else []
        return [line for line in asked if "show" not in line]

    def sockets(self, file: str, *units: tuple[str, str, str, str]) -> None:
        blocks = [
            f"Id={unit}\nLoadState={load}\nActiveState={active}\n" + (f"Listen={listen} (Stream)\n" if listen else "")
            for unit, load, active, listen in units
        ]
        (self.root / file).write_text("\n".join(blocks))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    for folder in ("config/mmd/models.d", "run/mmd", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (machine.config_dir / "mmd.yaml").write_text(GOOD)
    for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "gateway").write_text("ActiveState=active\n")
    sockets = [
        ("mmd-gateway.socket", "loaded", "active", "127.0.0.1:8000"),
        ("mmd-admin.socket", "loaded", "active", "/run/mmd/admin.sock"),
        ("mmd-admin-tcp.socket", "not-found", "inactive", ""),
    ]
    machine.sockets("before", *sockets)
    machine.sockets("after", *sockets)
    return machine


def test_check_says_that_it_is_right(machine: Machine) -> None:
    assert machine.run("check").stdout == "ok: 1 model, 1 GPU\n"
    quiet = machine.run("check", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    found = json.loads(machine.run("check", "--json").stdout)
    assert found == {"ok": True, "models": 1, "gpus": 1, "problems": [], "warnings": []}


def test_check_warns_of_what_other_machines_reach_without_a_key(machine: Machine) -> None:
    (machine.config_dir / "mmd.yaml").write_text(
        "gateway:\n  listen: ['0.0.0.0:8000']\n"
        "models:\n  m: {engine: sim, gpus: 0, port: '[::]:9000'}\n"
        "  raw: {engine: sim, gpus: 0, port: '192.0.2.1:9001', port_protocol: tcp}\n"
    )
    result = machine.run("check")
    assert result.returncode == 0
    assert [line.split(": ")[2] for line in result.stderr.splitlines()] == [
        "gateway.listen.0",
        "models.m.port",
        "models.raw.port",
    ]
    assert "mmdctl keys add" in result.stderr
    assert len(json.loads(machine.run("check", "--json").stdout)["warnings"]) == 3
    assert machine.run("check", "--quiet").stderr == ""

    assert machine.run("keys", "add", "laptop").returncode == 0
    with_keys = machine.run("check")
    assert (with_keys.returncode, len(with_keys.stderr.splitlines())) == (0, 1)
    assert ": models.raw.port: " in with_keys.stderr  # where no key is ever asked for
    (machine.config_dir / "api-keys.yaml").write_text("neither: [this nor that")  # the gateway lets nobody in then
    assert len(machine.run("check").stderr.splitlines()) == 1


def test_check_names_file_line_and_key(machine: Machine, tmp_path: Path) -> None:
    draft = tmp_path / "draft.yaml"
    draft.write_text("models:\n  demo/a:\n    engine: sim\n    vrma: 4GiB\n")
    result = machine.run("check", str(draft))
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.startswith(f"{draft}:4: models.demo/a.vrma: ")
    assert "vram" in result.stdout
    (problem,) = json.loads(machine.run("check", str(draft), "--json", "--quiet").stdout)["problems"]
    assert (problem["file"], problem["line"], problem["key"]) == (str(draft), 4, "models.demo/a.vrma")
    missing = machine.run("check", str(tmp_path / "missing.yaml"))
    assert missing.returncode == 1
    assert "missing.yaml: cannot be read: No such file or directory" in missing.stdout


def test_check_reads_a_drop_in_with_the_files_around_it(machine: Machine) -> None:
    drop_in = machine.config_dir / "models.d/more.yaml"
    drop_in.write_text("models:\n  demo/b: {engine: sim, profile: small}\n")
    assert machine.run("check", str(drop_in)).stdout == "ok: 2 models, 1 GPU\n"
    assert machine.run("check", str(machine.config_dir)).stdout == "ok: 2 models, 1 GPU\n"
    (machine.config_dir / "models.d/other.yaml").write_text("models:\n  demo/c: {engine: simm}\n")
    assert machine.run("check", str(drop_in)).returncode == 0
    assert machine.run("check").returncode == 1


def test_config_prints_what_is_merged(machine: Machine) -> None:
    text = machine.run("config")
    assert text.returncode == 0
    assert "vram: 4GiB" in text.stdout
    model = json.loads(machine.run("config", "--json").stdout)["models"]["demo/idle"]
    assert (model["vram"], model["aliases"]) == ("4GiB", ["lazy"])
    with (machine.config_dir / "mmd.yaml").open("a") as file:
        file.write("  demo/bad: {engine: sim, vram: much}\n")
    partly = machine.run("config")
    assert partly.returncode == 1
    assert "demo/idle" in partly.stdout
    assert "demo/bad" in partly.stderr


def test_what_looks_secret_is_not_printed(machine: Machine) -> None:
    with (machine.config_dir / "mmd.yaml").open("a") as file:
        file.write("  demo/a: {engine: sim, vram: 1GiB, env: {MY_TOKEN: abcdefgh, OTHER: shown}}\n")
    assert json.loads(machine.run("config", "--json").stdout)["models"]["demo/a"]["env"] == {
        "MY_TOKEN": "(hidden)",
        "OTHER": "shown",
    }
    with (machine.config_dir / "mmd.yaml").open("a") as file:
        file.write("  demo/b: {engine: sim, vram: 1GiB, env: {MY_TOKEN: [abcdefgh]}, secrets: {A: abcdefgh}}\n")
    checked = machine.run("check")
    assert "models.demo/b.env.MY_TOKEN: must be text or a whole number" in checked.stdout
    assert "models.demo/b.secrets.A: must be the absolute path" in checked.stdout
    assert "abcdefgh" not in checked.stdout + checked.stderr


def test_reload_refuses_a_wrong_configuration_and_changes_nothing(machine: Machine) -> None:
    (machine.config_dir / "mmd.yaml").write_text("gatway: {}\n")
    result = machine.run("reload")
    assert result.returncode == 1
    assert "mmd.yaml:1: gatway: " in result.stdout
    assert "nothing was reloaded" in result.stderr
    assert machine.asked() == []


def test_reload_says_what_changed(machine: Machine) -> None:
    gateway = Gateway(example(time.time()), reloaded=Reloaded(changed=("demo/idle",), added=("demo/a", "demo/b")))
    with serving(gateway, machine.socket):
        result = machine.run("reload")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["added: demo/a, demo/b", "changed: demo/idle"]
    assert machine.asked() == ["--user daemon-reload"]
    assert gateway.asked == [("POST", "/api/v1/reload", None)]


def test_reload_names_the_sockets_that_listen_elsewhere_now(machine: Machine) -> None:
    machine.sockets(
        "before",
        ("mmd-gateway.socket", "loaded", "active", "127.0.0.1:8000"),
        ("mmd-admin.socket", "loaded", "active", "/run/mmd/admin.sock"),
        ("mmd-admin-tcp.socket", "loaded", "active", "127.0.0.1:8001"),
    )
    machine.sockets(
        "after",
        ("mmd-gateway.socket", "loaded", "active", "127.0.0.1:9000"),
        ("mmd-admin.socket", "loaded", "active", "/run/mmd/admin.sock"),
        ("mmd-admin-tcp.socket", "not-found", "active", "127.0.0.1:8001"),
    )
    with serving(Gateway(example(time.time())), machine.socket):
        lines = machine.run("reload").stdout.splitlines()
    assert lines[0] == "nothing has changed since mmd-gateway last read the configuration"
    assert "  systemctl --user restart mmd-gateway.socket mmd-gateway.service" in lines
    assert "  systemctl --user stop mmd-admin-tcp.socket" in lines


def test_reload_moves_the_ports_of_models(machine: Machine) -> None:
    others = [("mmd-gateway.socket", "loaded", "active", "127.0.0.1:8000"), ("mmd-admin.socket", "loaded", "active", "/a.sock")]
    machine.sockets(
        "before",
        *others,
        ("mmd-port-same.socket", "loaded", "active", "127.0.0.1:8080"),
        ("mmd-port-a.socket", "loaded", "active", "127.0.0.1:8081"),
        ("mmd-port-b.socket", "loaded", "active", "127.0.0.1:8082"),
        ("mmd-port-gone.socket", "loaded", "active", "127.0.0.1:8083"),
    )
    after = [
        ("mmd-port-same.socket", "loaded", "active", "127.0.0.1:8080"),
        ("mmd-port-a.socket", "loaded", "active", "127.0.0.1:8082"),
        ("mmd-port-b.socket", "loaded", "active", "127.0.0.1:8081"),
        ("mmd-port-gone.socket", "not-found", "active", "127.0.0.1:8083"),
        ("mmd-port-new.socket", "loaded", "inactive", "127.0.0.1:8084"),
    ]
    with (machine.config_dir / "mmd.yaml").open("a") as file:
        file.write('  new: {engine: sim, gpus: 0, port: "127.0.0.1:8084"}\n')
    machine.sockets("after", *others, *after)
    with serving(Gateway(example(time.time())), machine.socket):
        result = machine.run("reload")
        asked = machine.asked()
        (machine.root / "asked").unlink()
        machine.sockets("after", ("mmd-gateway.socket", "loaded", "inactive", "127.0.0.1:8000"), others[1], *after)
        assert machine.run("reload").returncode == 0
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1)
    shown = [line for line in (machine.root / "everything").read_text().splitlines() if "=Id" in line]
    assert shown, "asked for"
    assert all("mmd-port-new.socket" in line for line in shown), "a pattern does not find what is inactive"
    assert asked == [
        "--user daemon-reload",
        "--user stop mmd-port-a.socket mmd-port-b.socket mmd-port-gone.socket",
        "--user start mmd-port-a.socket mmd-port-b.socket mmd-port-new.socket",
    ]
    assert not [line for line in machine.asked() if "start" in line], "nobody is to connect"


def test_reload_without_a_gateway_or_without_its_socket(machine: Machine) -> None:
    unreachable = machine.run("reload")
    assert unreachable.returncode == 0
    assert "cannot be asked what changed" in unreachable.stdout
    assert machine.asked() == ["--user daemon-reload", "--user reload mmd-gateway.service"]
    (machine.root / "gateway").write_text("ActiveState=inactive\n")
    assert "mmd-gateway is not running" in machine.run("reload").stdout


def test_reload_passes_on_why_the_gateway_refuses(machine: Machine) -> None:
    with serving(Gateway(example(time.time()), reloaded=Reloaded(problems=("mmd.yaml:3: gone meanwhile",))), machine.socket):
        result = machine.run("reload")
    assert result.returncode == 1
    assert "mmd.yaml:3: gone meanwhile" in result.stdout


def test_cat_becomes_systemctl_cat_whether_the_gateway_runs_or_not(machine: Machine) -> None:
    for word in ("demo/idle", "lazy", "idle", "mmd-model-idle@.service"):
        assert machine.run("cat", word).returncode == 0
    assert machine.run("cat", "mmd-model-idle@0-1").returncode == 0
    assert machine.asked() == ["--user cat mmd-model-idle@.service"] * 4 + ["--user cat mmd-model-idle@0-1.service"]
    unknown = machine.run("cat", "demo/idel")
    assert unknown.returncode == 4
    assert "did you mean demo/idle?" in unknown.stderr


def test_logs_becomes_journalctl(machine: Machine) -> None:
    for words in (["lazy", "-n", "5"], ["--gateway", "-f", "--since", "10 min ago"], []):
        assert machine.run("logs", *words).returncode == 0
    assert machine.asked() == [
        "--lines=5 --user-unit=mmd-model-idle@*.service --user-unit=mmd-fetch-idle.service",
        "--user-unit=mmd-gateway.service --follow --since=10 min ago",
        "--user-unit=mmd-*",
    ]
    assert machine.run("logs", "nothing").returncode == 4


def test_logs_that_are_followed_are_checked_and_printed_without_escape_sequences(machine: Machine) -> None:
    own = {"_UID": str(os.getuid()), "__REALTIME_TIMESTAMP": "0", "_PID": "7", "SYSLOG_IDENTIFIER": "mmd-idle\x1b[2J"}
    entries = [
        {**own, "__CURSOR": "1", "_SYSTEMD_USER_UNIT": "mmd-model-idle@0.service", "MESSAGE": "loading\x1b]0;x\x07\nmore"},
        {**own, "__CURSOR": "2", "_SYSTEMD_USER_UNIT": "mmd-model-idle2@0.service", "MESSAGE": "forged", "MMD_MODEL": "idle"},
        {**own, "__CURSOR": "3", "_SYSTEMD_USER_UNIT": "mmd-model-idle@1.service", "MESSAGE": "started later"},
    ]
    (machine.root / "entries").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    done = machine.run("logs", "lazy", "-f")
    assert done.returncode == 0
    said = [line.partition(" mmd-idle")[2] for line in done.stdout.splitlines()]
    assert said == [
        "\\x1b[2J[7]: loading\\x1b]0;x\\x07",
        "\\x1b[2J[7]: more",
        "\\x1b[2J[7]: started later",
    ]
    (past,) = machine.asked()
    assert "--lines=10" in past.split()
