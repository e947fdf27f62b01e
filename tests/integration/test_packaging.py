"""packaging/up, enter and down: on a machine with systemd (a testbed), and on one without (this one, in a private network)."""

import json
import os
import re
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from testbed import CHECKOUT, Installation, Testbed, downloads_layer, prepared_layer

UP, DOWN, ENTER = (CHECKOUT / "packaging" / name for name in ("up", "down", "enter"))
DEMO = CHECKOUT / "config" / "examples" / "demo.yaml"


def models(installation: Installation) -> list[str]:
    with urllib.request.urlopen(f"{installation.api}/v1/models", timeout=30) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def model_pids(testbed: Testbed) -> dict[str, str]:
    """The main process of each running model unit."""
    units = testbed.systemctl("list-units", "--no-legend", "--plain", "--state=active", "mmd-model-*")
    return {unit: testbed.show(unit, "MainPID") for unit in (line.split()[0] for line in units.splitlines())}


def test_a_second_run_changes_nothing_but_what_changed(installed: Installation) -> None:
    """The demonstration, then up twice more: first with nothing new, then with a new gateway unit while a model serves."""
    installed.configure(DEMO.read_text())
    first = installed.up("--demo")
    assert "answer" in first
    assert "OpenAI(base_url=" in first
    pids, gateway = model_pids(installed), installed.show("mmd-gateway.service", "MainPID")
    assert len(pids) == 1

    assert "unchanged" in installed.up()
    assert model_pids(installed) == pids
    assert installed.show("mmd-gateway.service", "MainPID") == gateway

    unit = "/usr/lib/systemd/system/mmd-gateway.service"
    installed.write(unit, installed.read(unit) + "# an older version\n")
    assert "restarted, the models go on" in installed.up()
    assert model_pids(installed) == pids
    assert installed.show("mmd-gateway.service", "MainPID") != gateway
    assert len(models(installed)) >= 2


def test_the_installed_relay_is_compiled(installed: Installation) -> None:
    models(installed)  # starts the gateway
    assert "relay compiled" in installed.journal("--unit=mmd-gateway.service", "--grep=ready: ")


def test_a_configuration_is_never_overwritten(installed: Installation) -> None:
    mine = "# mine\ngpus: {provider: sim, devices: [{memory: 24GiB}]}\n"
    installed.configure(mine)
    installed.up("--no-request")
    assert installed.read("/etc/mmd/mmd.yaml") == mine
    refused = installed.run(UP, "--demo", "--no-request", check=False, timeout_s=60)
    assert refused.returncode == 1
    assert "holds a configuration of yours" in refused.stdout
    assert installed.read("/etc/mmd/mmd.yaml") == mine


def test_a_broken_configuration_is_named(installed: Installation) -> None:
    good = installed.read("/etc/mmd/mmd.yaml")
    installed.systemctl("stop", "mmd-reload.path")
    installed.write("/etc/mmd/mmd.yaml", "gatewy: {}\n")
    refused = installed.run(UP, "--no-request", check=False, timeout_s=60)
    assert refused.returncode == 1
    assert "gatewy" in refused.stdout
    assert "next: correct /etc/mmd" in refused.stdout
    installed.write("/etc/mmd/mmd.yaml", good)
    installed.up("--no-request")


def test_a_changed_file_is_applied_by_itself(installed: Installation) -> None:
    installed.configure("gpus: {provider: sim, devices: [{memory: 24GiB}]}\n")
    installed.systemctl("start", "mmd-reload.path")
    assert models(installed) == []
    installed.write("/etc/mmd/models.d/new.yaml", "models: {newcomer: {engine: sim, vram: 1GiB}}\n")
    installed.wait_until(lambda: models(installed) == ["newcomer"])
    installed.path("/etc/mmd/models.d/new.yaml").unlink()
    installed.wait_until(lambda: models(installed) == [])


def test_an_upgrade_takes_the_polkit_rule_away(installed: Installation) -> None:
    """The one of 0.1.0, by which user mmd could become root on systemd 257; and models go on being started."""
    rule = "/usr/share/polkit-1/rules.d/50-mmd.rules"
    installed.configure("gpus: {provider: sim, devices: [{memory: 24GiB}]}\nmodels: {m: {engine: sim, vram: 1GiB}}\n")
    installed.write(rule, "polkit.addRule(function (action, subject) {});\n")
    installed.write("/usr/lib/mmd.manifest", installed.read("/usr/lib/mmd.manifest") + rule + "\n")
    installed.systemctl("disable", "--now", "mmd-unit-broker.socket")
    installed.up("--no-request")
    assert not installed.path(rule).exists()
    installed.ctl("start", "m")
    installed.ctl("stop", "m")


def test_enter_on_a_machine_with_systemd_just_runs(installed: Installation) -> None:
    done = installed.run(ENTER, "sh", "-c", "cat; exit 7", check=False, input="through")
    assert (done.returncode, done.stdout) == (7, "through")


def test_wrong_options_are_usage_errors(booted: Testbed) -> None:
    for program in (UP, DOWN):
        done = booted.run(program, "--bogus", check=False)
        assert done.returncode == 64
        assert "unknown option --bogus" in done.stderr
        assert booted.run(program, "--help").stdout.startswith("usage: packaging/")


def test_nothing_installed_depends_on_the_checkout(installed: Installation) -> None:
    for place in ("/usr/lib/mmd/bin", "/usr/lib/systemd/system-generators/mmd-generator", "/usr/lib/systemd/system"):
        found = installed.run("grep", "-rlF", "--include=*mmd*", f"{CHECKOUT}/", place, check=False)
        assert found.stdout == ""
    assert "/usr/lib/mmd.new" not in installed.read("/usr/lib/mmd/bin/mmdctl")


@pytest.fixture(scope="module")
def changeable(root_only: None) -> Iterator[Installation]:
    """An installation beside a copy of the checkout, /root/mmd, and what packaging/up once downloaded. It has no network."""
    prepared_layer()
    with Installation(layers=[downloads_layer()]) as installation:
        installation.run("mkdir", "/root/mmd")
        for name in ("mmd", "packaging", "units", "config", "man", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
            installation.run("cp", "-R", CHECKOUT / name, "/root/mmd")
        yield installation


def up_of_the_copy(installation: Installation, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"MMD_COMPILE": "0", **environment}
    return installation.run("/root/mmd/packaging/up", "--no-request", check=False, timeout_s=110, env=environment)


_PROBE = """
import os, pathlib
interfaces = [line.split(":")[0].strip() for line in pathlib.Path("/proc/net/dev").read_text().splitlines()[2:]]
roots = ("/usr/lib/mmd.new", "/etc", "/usr/lib/mmd", "/var/cache/mmd-downloads")
writable = [path for path in roots if os.access(path, os.W_OK)]
pathlib.Path("mmd/probe.py").write_text(f"FOUND = {os.getuid()}, {interfaces}, {writable}, {dict(os.environ)}\\n")
"""


def test_what_builds_is_neither_root_nor_online(changeable: Installation) -> None:
    """setup.py records who executes it, and with what: in a module, which is then installed."""
    setup = changeable.read("/root/mmd/setup.py")
    changeable.write("/root/mmd/setup.py", setup + _PROBE)
    address = """http://user:"$HOME`'\\%h@127.0.0.1:9/simple"""
    done = up_of_the_copy(changeable, PIP_INDEX_URL=address)
    changeable.write("/root/mmd/setup.py", setup)
    assert done.returncode == 0, done.stdout
    found = changeable.run(
        "/usr/lib/mmd/bin/python", "-Ic", "import json, mmd.probe; print(json.dumps(mmd.probe.FOUND))"
    ).stdout
    uid, interfaces, writable, environment = json.loads(found)
    assert uid >= 61184, "of DynamicUser=, systemd.exec(5)"
    assert interfaces == ["lo"]
    assert writable == []
    assert environment["MMD_COMPILE"] == "0"
    assert environment["PIP_INDEX_URL"] == address
    for path in ("/var/cache/mmd-build", "/var/cache/private/mmd-build", "/usr/lib/mmd.new", "/usr/lib/mmd/input"):
        assert not changeable.path(path).exists()


@pytest.mark.parametrize("lock", ["run", "sdist"])
def test_another_hash_in_a_lock_installs_nothing(changeable: Installation, lock: str) -> None:
    """As if the index, here the downloads, held other files than those that were locked."""
    before = changeable.read("/usr/lib/mmd/fingerprint")
    path = f"/root/mmd/packaging/locks/{lock}.txt"
    text = changeable.read(path)
    changeable.write(path, re.sub("sha256:[0-9a-f]{8}", "sha256:00000000", text))
    done = up_of_the_copy(changeable, PIP_NO_INDEX="1", PIP_FIND_LINKS="/var/cache/mmd-downloads")
    changeable.write(path, text)
    assert done.returncode == 1, done.stdout
    assert "DOES NOT MATCH THE HASHES of packaging/locks" in done.stdout
    assert changeable.read("/usr/lib/mmd/fingerprint") == before
    assert not changeable.path("/usr/lib/mmd.new").exists()
    assert "mmd-gateway 0.1.0" in changeable.ctl("version").stdout


def test_root_compares_hashes_itself(changeable: Installation) -> None:
    """A file that was changed after its download is not unpacked, although it lies where only locked ones do."""
    (wheel,) = changeable.path("/var/cache/mmd-downloads").glob("aiohttp-*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    changeable.run("rm", "/usr/lib/mmd/locks")  # so that all is installed again
    changeable.write("/root/mmd/mmd/another.py", "")
    before = changeable.read("/usr/lib/mmd/fingerprint")
    done = up_of_the_copy(changeable)
    assert done.returncode == 1
    assert "DOES NOT MATCH THE HASHES of packaging/locks" in done.stdout
    assert changeable.read("/usr/lib/mmd/fingerprint") == before
    assert not changeable.path("/var/cache/mmd-downloads/complete").exists(), "the next run downloads again"


def test_down_removes_what_up_installed(root_only: None) -> None:
    prepared_layer()
    with Installation(layers=[downloads_layer()]) as installation, installation.network():
        installation.configure(DEMO.read_text())
        installation.up()
        assert "\nmmd-m-" in installation.read("/etc/passwd")
        files = [*installation.read("/usr/lib/mmd.manifest").splitlines(), "/usr/lib/mmd", "/usr/lib/mmd.manifest"]
        files += ["/var/cache/mmd-downloads"]
        files += ["/run/mmd", "/run/mmd-model", "/run/mmd-fetch", "/run/mmd-sim", "/run/mmd-gateway", "/usr/share/doc/mmd"]
        installation.run(DOWN, timeout_s=60)
        assert [file for file in files if os.path.lexists(installation.path(file))] == []
        assert installation.systemctl("list-units", "--all", "--no-legend", "mmd-*", "mmd.slice") == ""
        assert installation.read("/etc/mmd/mmd.yaml") == DEMO.read_text()

        installation.run(DOWN, "--purge", timeout_s=60)
        assert [line for line in installation.read("/etc/passwd").splitlines() if line.startswith("mmd")] == []
        assert [line for line in installation.read("/etc/group").splitlines() if line.startswith("mmd")] == []
        assert [path for path in ("/etc/mmd", "/var/lib/mmd", "/var/cache/mmd") if installation.path(path).exists()] == []
        installation.run(DOWN, "--purge", timeout_s=60)
        assert installation.systemctl("--failed", "--no-legend") == ""


def test_an_upgrade_from_one_user_for_all_engines(root_only: None) -> None:
    """Version 0.1.0: what runs goes on and is driven on; weights stay, readable for all; a token stays out of sight."""
    unit, hub = "mmd-model-old@0.service", "/var/cache/mmd/huggingface"
    with Installation() as installation, installation.network():
        installation.run("useradd", "--system", "--gid", "mmd-model", "--no-create-home", "mmd-model")
        installation.write(f"{hub}/hub/models--a--b/blobs/x", "weights", mode=0o660)
        installation.write(f"{hub}/token", "secret", mode=0o600)
        installation.run("ln", "-s", "/etc/shadow", f"{hub}/hub/models--a--b/link")
        installation.run("chmod", "-R", "o=", "/var/cache/mmd")
        for folder in ("/var/cache/mmd", "/run/mmd-model", "/run/mmd-sim"):
            installation.run("chown", "-R", "mmd-model:mmd-model", folder)
        drop_in = f"/etc/systemd/system/{unit.replace('@0', '@')}.d/old.conf"
        installation.write(drop_in, "[Service]\nUser=mmd-model\nCacheDirectory=\nCacheDirectory=mmd\nWorkingDirectory=/\n")
        installation.configure("gpus: {provider: sim, devices: [{memory: 24GiB}]}\nmodels: {old: {engine: sim, vram: 1GiB}}\n")
        installation.ctl("start", "old")
        pids = model_pids(installation)
        assert installation.run("ps", "-o", "user=", "-p", pids[unit]).stdout.strip() == "mmd-model"

        installation.path(drop_in).unlink()
        installation.up("--no-request")
        assert model_pids(installation) == pids
        installation.ctl("sleep", "old")
        installation.ctl("wake", "old")
        assert model_pids(installation) == pids
        stat = installation.run("stat", "--format=%a %U", "/var/cache/mmd", f"{hub}/hub/models--a--b/blobs/x", f"{hub}/token")
        assert stat.stdout.splitlines() == ["755 root", "644 mmd-fetch", "600 mmd-fetch"]
        assert installation.run("stat", "--format=%a %U", "/etc/shadow").stdout == "640 root\n"
        installation.ctl("stop", "old")
        installation.ctl("start", "old")
        pid = model_pids(installation)[unit]
        assert installation.run("ps", "-o", "user=", "-p", pid).stdout.strip() == "mmd-m-old"


def test_programs_take_nothing_from_their_callers_environment(installed: Installation) -> None:
    for program in ("mmdctl", "mmd-gateway", "mmd-runner", "mmd-sim"):
        assert installed.read(f"/usr/lib/mmd/bin/{program}").startswith("#!/usr/lib/mmd/bin/python")
        assert installed.read(f"/usr/lib/mmd/bin/{program}").splitlines()[0].endswith(" -I")
    planted = {"PYTHONPATH": "/tmp/planted"}
    installed.write("/tmp/planted/json.py", "raise SystemExit('planted')")
    assert installed.run("/usr/bin/mmdctl", "--version", env=planted).returncode == 0


@pytest.fixture
def without_systemd(root_only: None, tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """The environment of `up` for this machine, with a state directory of its own."""
    state = Path(f"/run/mmd-testbed-{uuid.uuid4().hex[:8]}")
    environment = {**os.environ, "MMD_TESTBED": str(state), "MMD_TESTBED_LAYER": str(prepared_layer())}
    yield environment
    subprocess.run([DOWN], check=True, env=environment, capture_output=True, timeout=60)
    assert not state.exists()


@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="PID 1 is systemd here")
def test_private_systemd_shares_the_network(without_systemd: Mapping[str, str]) -> None:
    """In a network namespace of its own, so that port 8000 is free; the demonstration answers on that network's loopback."""
    script = """
        python3 - <<'PYTHON'
import fcntl, socket, struct
request = struct.pack("16sh14x", b"lo", 1)  # netdevice(7): SIOCSIFFLAGS, IFF_UP
fcntl.ioctl(socket.socket(), 0x8914, request)
PYTHON
        "$1/up" --demo && "$1/up" --demo && python3 -c '
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:8000/v1/models", timeout=30).status)'
        echo through | "$1/enter" sh -c 'cat; exit 7'
        echo "exit status $?"
        "$1/down" && "$1/down" && ! "$1/enter" true
    """
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script, "-", UP.parent],
        check=False,
        env=without_systemd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("answer") == 2
    assert "\n200\n" in done.stdout
    assert "through\nexit status 7\n" in done.stdout
    assert "packaging/enter mmdctl status" in done.stdout


def test_testbeds_have_networks_of_their_own(booted: Testbed) -> None:
    with booted.network(), socket.create_server(("127.0.0.1", 8000)), Testbed() as other, other.network():
        socket.create_server(("127.0.0.1", 8000)).close()
