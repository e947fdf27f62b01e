"""A hostile engine beside another one: what it tries is refused, whatever belongs to the other, to mmd or to the machine."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from testbed import Installation

PROGRAM = "/opt/attack/engines.py"
METADATA = "169.254.169.254"  # where clouds tell an instance its secrets
OUTSIDE = "192.0.2.1"  # TEST-NET-1, RFC 5737

CONFIG = f"""
gpus: {{provider: sim, devices: [{{memory: 24GiB}}]}}
defaults: {{engine: command, gpus: 0, listen: unix}}
models:
  victim: {{command: [/usr/bin/python3, {PROGRAM}, victim, "{{socket}}"]}}
  hostile: {{command: [/usr/bin/python3, {PROGRAM}, hostile, "{{socket}}", /opt/attack/targets.json]}}
  Org/Victim_with.a-long-name-that-does-not-fit: {{engine: sim}}
"""

SOCKETS = [
    *("/run/mmd-model/victim@cpu/engine.sock", "/run/mmd/admin.sock", "/run/mmd/registrar.sock", "/run/mmd/gpu-probe.sock"),
    *("/run/dbus/system_bus_socket", "/var/run/dbus/system_bus_socket", "/run/systemd/private"),
    *("/run/systemd/journal/socket", "/run/systemd/journal/stdout", "/run/systemd/journal/dev-log", "/dev/log"),
    *("/run/systemd/io.system.ManagedOOM", "/run/systemd/userdb/io.systemd.DynamicUser", "/run/docker.sock"),
]
FOLDERS = [
    *("/run", "/run/mmd-model", "/run/mmd-model/victim@cpu", "/run/mmd-sim", "/run/mmd-fetch", "/var/cache/mmd", "/etc/mmd"),
    *("/var/cache/mmd/models", "/var/cache/mmd/models/victim", "/var/cache/mmd/huggingface", "/opt/attack", "/usr/lib/mmd"),
]


def start(installed: Installation) -> dict[str, Any]:
    """Both engines running, the hostile one having tried everything."""
    installed.write(PROGRAM, Path(__file__).with_name("engines.py").read_text())
    installed.configure(CONFIG)
    installed.systemctl("start", "mmd-model-victim@cpu.service")
    cgroup = installed.show("mmd-model-victim@cpu.service", "ControlGroup")
    pids = installed.run("cat", f"/sys/fs/cgroup{cgroup}/cgroup.procs").stdout.split()
    assert len(pids) == 2, "the runner and the engine"
    with socket.create_server((METADATA, 80)), socket.create_server((OUTSIDE, 80)):
        targets = {
            "pids": [int(pid) for pid in pids],
            "read": ["/var/cache/mmd/models/victim", "/var/cache/mmd/models/victim/secret", "/dev/shm/secret", "/run/mmd-sim"],
            "connect": SOCKETS,
            "write": [f"{folder}/json.py" for folder in FOLDERS],
            "dial": [(METADATA, 80), (OUTSIDE, 80)],
        }
        installed.write("/opt/attack/targets.json", json.dumps(targets))
        installed.systemctl("start", "mmd-model-hostile@cpu.service")
    found: dict[str, Any] = json.loads(installed.read("/run/mmd-model/hostile@cpu/result.json"))
    return found


@pytest.fixture
def addressed(installed: Installation) -> Installation:
    """Two addresses of the network beyond loopback, at which somebody answers."""
    for address in (METADATA, OUTSIDE):
        installed.run("ip", "address", "replace", f"{address}/32", "dev", "lo")
    return installed


def test_a_hostile_engine_reaches_nothing_of_others(addressed: Installation) -> None:
    found = start(addressed)
    print(found["refused"])
    got = {what: result for what, result in found["refused"].items() if result.startswith("done")}
    assert got == {}
    assert found["shm"] == []
    assert len(found["processes"]) <= 2
    assert set(found["run"]) <= {
        *("/run/mmd-model", "/run/mmd-model/hostile@cpu", "/run/mmd-model/hostile@cpu/report.json"),
        *("/run/systemd", "/run/systemd/notify", "/run/systemd/incoming"),  # incoming: systemd's, for mounts, empty
    }
    assert found["own"].startswith("done")
    assert found["shm_own"].startswith("done")
    assert found["cwd"] == "/var/cache/mmd/models/hostile"
    assert addressed.show("mmd-model-victim@cpu.service", "ActiveState") == "active"
    addressed.stop_all()


def test_each_model_has_a_user_of_its_own(addressed: Installation) -> None:
    """Made when it first starts, also when several do at the same time; no local user gets at what it writes."""
    addressed.run("sh", "-c", "getent passwd | grep -o '^mmd-m-[^:]*' | xargs -r -n1 userdel")
    addressed.configure(CONFIG)
    with ThreadPoolExecutor() as pool:
        units = ("mmd-model-victim@cpu.service", "mmd-model-org-victim_with.a-long-name-that-does-not-fit@0.service")
        list(pool.map(lambda unit: addressed.systemctl("start", unit), units))
    names = {addressed.show(unit, "User") for unit in units}
    assert len(names) == 2
    uids = {int(addressed.run("id", "--user", name).stdout) for name in names}
    assert len(uids) == 2
    assert all(60578 <= uid <= 60879 for uid in uids)
    stat = addressed.run("stat", "--format=%a %U %G", "/run/mmd-model/victim@cpu", "/var/cache/mmd/models/victim").stdout
    assert stat.splitlines() == ["750 mmd-m-victim mmd-model", "700 mmd-m-victim mmd-model"]
    for path in ("/run/mmd-model/victim@cpu/engine.sock", "/var/cache/mmd/models/victim/secret"):
        assert addressed.run("test", "-e", path, user="eve", check=False).returncode != 0
        assert addressed.run("test", "-e", path).returncode == 0
    addressed.stop_all()


def test_a_user_that_is_not_there_is_named(addressed: Installation) -> None:
    addressed.configure(CONFIG.replace("models:", "models:\n  nobodys: {command: [/bin/true], user: nobodys}"))
    done = addressed.ctl("start", "nobodys", check=False)
    assert done.returncode != 0
    assert "the user that it runs as does not exist" in done.stdout + done.stderr
    addressed.stop_all()


def test_only_the_names_of_models_users_are_made(addressed: Installation) -> None:
    before = addressed.read("/etc/passwd")
    for name in ("evil", "mmd-m-", "mmd-m-Evil", "mmd-m-a.b", "mmd-m-" + "a" * 24):
        assert addressed.run("systemctl", "start", f"mmd-user@{name}.service", check=False).returncode != 0
    assert addressed.read("/etc/passwd") == before
    addressed.systemctl("reset-failed")


def test_members_of_mmd_admin_choose_no_user(addressed: Installation) -> None:
    for words in (["--set", "user=eve"], ["--set", "user=root"]):
        add = ["mmdctl", "add", "chosen", "--engine", "command", "--set", "command=[/bin/true]", *words]
        done = addressed.run(*add, user="mallory", check=False)
        assert done.returncode != 0
        assert "only root may set it" in done.stderr or "is not a system user for engines" in done.stderr, done.stderr
    assert not addressed.path("/etc/mmd/models.d/chosen.yaml").exists()
