"""API keys on an installed system: the file, who sees it, and how it comes to the gateway as systemd's credential."""

import re
from collections.abc import Iterator

import pytest
from testbed import CHECKOUT, Installation

from mmd.keys import KeyRing

FILE = "/etc/mmd/api-keys.yaml"
GATEWAY = "mmd-gateway.service"


@pytest.fixture
def clean(installed: Installation) -> Iterator[Installation]:
    """No keys, and no gateway that knows any."""
    installed.systemctl("stop", GATEWAY)
    installed.path(FILE).unlink(missing_ok=True)
    yield installed
    installed.path(FILE).unlink(missing_ok=True)
    installed.stop_all()


def credential(installed: Installation) -> str:
    """What a running gateway has got: read as its user, in its mount namespace, by the path in its environment."""
    pid = installed.show(GATEWAY, "MainPID")
    environment = installed.read(f"/proc/{pid}/environ").split("\0")
    (folder,) = (
        entry.removeprefix("CREDENTIALS_DIRECTORY=") for entry in environment if entry.startswith("CREDENTIALS_DIRECTORY=")
    )
    inside = ("nsenter", f"--target={pid}", "--mount", "--", "runuser", "-u", "mmd", "--", "cat", f"{folder}/api-keys.yaml")
    return installed.run(*inside).stdout


def test_without_a_file_the_gateway_starts_and_asks_for_no_keys(clean: Installation) -> None:
    clean.systemctl("start", GATEWAY)
    assert credential(clean) == "serial: 0"
    assert not KeyRing.parse(credential(clean)).required
    assert "redential" not in clean.journal("-u", GATEWAY)


def test_a_key_reaches_the_gateway_and_nobody_else(clean: Installation) -> None:
    secret = clean.run("mmdctl", "keys", "add", "ci", "--models", "demo/*").stdout.strip()
    assert re.fullmatch(r"mmd-[A-Za-z0-9_-]{43}", secret)
    assert clean.run("stat", "--format=%a %U %G", FILE).stdout == "600 root root\n"
    clean.systemctl("restart", GATEWAY)
    (key,) = KeyRing.parse(credential(clean)).keys
    assert KeyRing.parse(credential(clean)).find(secret.encode()) == key
    for user in ("mmd", "mmd-model", "nobody"):
        for file in (FILE, f"/run/credentials/{GATEWAY}/api-keys.yaml"):
            read = clean.run("cat", file, user=user, check=False)
            assert (read.returncode == 0) == (user == "mmd" and file != FILE)
    seen = clean.journal() + clean.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'").stdout
    assert "CREDENTIALS_DIRECTORY=" in seen
    assert secret not in seen
    assert key.sha256.hex() not in seen
    clean.run("mmdctl", "keys", "revoke", "ci")
    clean.systemctl("restart", GATEWAY)
    assert KeyRing.parse(credential(clean)) == KeyRing((), 2)


def test_a_drop_in_makes_the_file_necessary(clean: Installation) -> None:
    drop_in = "/run/systemd/system/mmd-gateway.service.d/keys.conf"
    clean.write(drop_in, "[Service]\nSetCredential=\nRestart=no\n")
    clean.systemctl("daemon-reload")
    try:
        clean.systemctl("start", GATEWAY, check=False)
        assert clean.show(GATEWAY, "Result") == "exit-code"
        assert "Failed to set up credentials" in clean.journal("-u", GATEWAY, "-n", "20")
        clean.run("mmdctl", "keys", "add", "ci")
        clean.systemctl("start", GATEWAY)
        assert KeyRing.parse(credential(clean)).required
    finally:
        clean.path(drop_in).unlink()
        clean.systemctl("daemon-reload")


def test_who_is_not_root_is_told_what_to_type(clean: Installation) -> None:
    for words in (("add", "ci", "--models", "demo/*"), ("revoke", "ci")):
        done = clean.run("mmdctl", "keys", *words, user="nobody", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "only root may see and change the API keys" in done.stderr
    assert (
        "sudo mmdctl keys add ci --models 'demo/*'"
        in clean.run("mmdctl", "keys", "add", "ci", "--models", "demo/*", user="nobody", check=False).stderr
    )
    clean.run("mmdctl", "keys", "add", "ci")
    assert "sudo mmdctl keys list" in clean.run("mmdctl", "keys", "list", user="nobody", check=False).stderr


def test_a_change_of_the_keys_is_no_change_of_the_configuration(clean: Installation) -> None:
    before = clean.show("mmd-reload.service", "ExecMainStartTimestampMonotonic")
    clean.systemctl("start", "mmd-reload.path")
    clean.run("mmdctl", "keys", "add", "ci")
    clean.systemctl("start", GATEWAY)
    assert clean.show("mmd-reload.service", "ExecMainStartTimestampMonotonic") == before
    assert clean.show("mmd-reload-request.service", "ActiveState") == "inactive"


def test_a_file_by_hand_becomes_root_s_alone(clean: Installation) -> None:
    clean.write(FILE, "serial: 1\n", mode=0o644)
    clean.run("systemd-tmpfiles", "--create", "mmd.conf")
    assert clean.run("stat", "--format=%a %U", FILE).stdout == "600 root\n"


def test_a_user_s_own_gateway_gets_the_user_s_own_keys(clean: Installation) -> None:
    clean.run("useradd", "--create-home", "carol")
    uid = clean.run("id", "--user", "carol").stdout.strip()
    clean.systemctl("start", f"user@{uid}.service")
    clean.write("/home/carol/.config/mmd/mmd.yaml", 'gateway: {listen: ["127.0.0.1:9100"], admin_listen: []}\n')
    clean.run("chown", "-R", "carol:", "/home/carol/.config")
    home = {"HOME": "/home/carol", "XDG_RUNTIME_DIR": f"/run/user/{uid}"}

    def own(*argv: str) -> str:
        return clean.run(*argv, user="carol", env=home).stdout

    def has() -> KeyRing:
        own("systemctl", "--user", "restart", GATEWAY)
        return KeyRing.parse(own("cat", f"/run/user/{uid}/credentials/{GATEWAY}/api-keys.yaml"))

    own("systemctl", "--user", "daemon-reload")
    own("systemctl", "--user", "start", "mmd-gateway.socket", "mmd-admin.socket")
    assert has() == KeyRing()
    secret = own("mmdctl", "--user", "keys", "add", "ci").strip()
    assert clean.run("stat", "--format=%a %U", "/home/carol/.config/mmd/api-keys.yaml").stdout == "600 carol\n"
    assert has().find(secret.encode()) is not None
    assert clean.path(FILE).exists() is False


def test_removal_keeps_the_keys_and_purge_does_not(root_only: None) -> None:
    with Installation() as installation:
        installation.run("mmdctl", "keys", "add", "ci")
        before = installation.read(FILE)
        installation.up("--no-request")
        assert installation.read(FILE) == before
        installation.run(CHECKOUT / "packaging/down", timeout_s=60)
        assert installation.read(FILE) == before
        installation.run(CHECKOUT / "packaging/down", "--purge", timeout_s=60)
        assert not installation.path("/etc/mmd").exists()
