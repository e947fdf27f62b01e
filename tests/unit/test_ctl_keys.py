"""mmdctl keys: the real program on a user's file, and what it tells a gateway."""

import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ctl_gateway import Gateway, example, serving

from mmd.keys import Key, KeyRing, Limit, digest

MMDCTL = str(Path(sys.executable).with_name("mmdctl"))


@dataclass(frozen=True, slots=True)
class Instance:
    """A user's instance of mmd in a folder."""

    root: Path

    @property
    def file(self) -> Path:
        return self.root / "config/mmd/api-keys.yaml"

    @property
    def socket(self) -> Path:
        return self.root / "run/mmd/admin.sock"

    @property
    def environment(self) -> dict[str, str]:
        own = {"HOME": self.root, "XDG_CONFIG_HOME": self.root / "config", "XDG_RUNTIME_DIR": self.root / "run"}
        return os.environ | {key: str(value) for key, value in own.items()}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [MMDCTL, "--user", "keys", *words], capture_output=True, text=True, timeout=40, env=self.environment, check=False
        )

    def ring(self) -> KeyRing:
        return KeyRing.parse(self.file.read_bytes(), self.file)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    (tmp_path / "run/mmd").mkdir(parents=True)
    return Instance(tmp_path)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway(example(time.time()))


def test_standard_output_is_the_key_alone_and_the_file_has_its_digest(instance: Instance) -> None:
    done = instance.run("add", "ci", "--scope", "admin", "--models", "demo/*", "q?", "--rate", "60/min", "--concurrency", "4")
    assert done.returncode == 0, done.stderr
    secret = done.stdout.removesuffix("\n")
    assert (len(secret), len(done.stdout)) == (47, 48)
    (key,) = instance.ring().keys
    assert key.created is not None
    expected = ("ci", digest(secret.encode()), "admin", ("demo/*", "q?"), Limit(60, 60), 4)
    assert (key.name, key.sha256, key.scope, key.models, key.rate, key.concurrency) == expected
    assert instance.ring().find(secret.encode()) == key
    assert "from now on, whoever has none is refused" in done.stderr
    assert "mmd-gateway is not running; it reads the keys when it starts" in done.stderr
    assert secret not in done.stderr + instance.file.read_text()
    assert "the first key" not in instance.run("add", "other").stderr


def test_the_file_is_its_owner_s_alone_whatever_the_umask_and_replaced_as_a_whole(instance: Instance) -> None:
    instance.file.parent.mkdir(parents=True)
    instance.file.write_text("serial: 4\n")
    instance.file.chmod(0o644)
    with instance.file.open() as before:
        command = ["sh", "-c", 'umask 0777; "$@"', "sh", MMDCTL, "--user", "keys", "add", "ci"]
        subprocess.run(command, env=instance.environment, check=True, capture_output=True, timeout=40)
        assert before.read() == "serial: 4\n"  # still there for whoever reads it
    assert stat.S_IMODE(instance.file.stat().st_mode) == 0o600
    assert instance.ring().serial == 5
    assert sorted(path.name for path in instance.file.parent.iterdir()) == [".api-keys.yaml.lock", "api-keys.yaml"]


def test_a_second_key_of_a_name_is_refused(instance: Instance) -> None:
    instance.run("add", "ci")
    before = instance.file.read_bytes()
    again = instance.run("add", "ci")
    assert (again.returncode, again.stdout) == (1, "")
    assert "there is a key ci already" in again.stderr
    assert "mmdctl keys revoke ci" in again.stderr
    assert instance.file.read_bytes() == before


def test_list_shows_what_keys_may_do(instance: Instance) -> None:
    empty = instance.run("list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "no key is asked for; the first one: mmdctl --user keys add NAME" in empty.stderr
    assert json.loads(instance.run("list", "--json").stdout) == []
    instance.run("add", "ci", "--models", "demo/*", "--models", "q?", "--rate", "60/min")
    instance.run("add", "operator", "--scope", "admin")
    lines = [line.split() for line in instance.run("list").stdout.splitlines()]
    assert lines[0] == ["NAME", "SCOPE", "MODELS", "RATE", "CONCURRENCY", "CREATED"]
    assert lines[1][:5] == ["ci", "use", "demo/*,", "q?", "60/min"]
    assert lines[2][:5] == ["operator", "admin", "all", "-", "-"]
    first, second = json.loads(instance.run("list", "--json").stdout)
    assert second == {"name": "operator", "scope": "admin", "created": second["created"]}
    assert set(first) == {"name", "scope", "models", "rate", "created"}
    assert instance.run("list").stderr == ""


def test_revoke_takes_a_key_out_and_the_last_one_leaves_nobody_in(instance: Instance) -> None:
    secret = instance.run("add", "ci").stdout.strip()
    wrong = instance.run("revoke", "cci")
    assert wrong.returncode == 1
    assert "there is no key 'cci'" in wrong.stderr
    assert "did you mean ci?" in wrong.stderr
    gone = instance.run("revoke", "ci")
    assert (gone.returncode, gone.stdout) == (0, "")
    assert "no key is left, so that everybody is refused" in gone.stderr
    assert f"remove {instance.file}" in gone.stderr
    assert (instance.ring().serial, instance.ring().find(secret.encode())) == (2, None)
    assert "everybody is refused" in instance.run("list").stderr


def test_json_is_all_of_standard_output(instance: Instance) -> None:
    added = json.loads(instance.run("add", "ci", "--concurrency", "2", "--json").stdout)
    key = instance.ring().find(added.pop("key").encode())
    assert key == instance.ring().keys[0]
    assert added == {"name": "ci", **key.plain()}
    assert json.loads(instance.run("revoke", "ci", "--json").stdout) == added


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("add", "a b"), "NAME: not a key's name"),
        (("add", "mmd-x"), "NAME: not a key's name"),
        (("revoke", "mmd-x"), "NAME: not a key's name"),
        (("add", "ci", "--scope", "root"), "--scope: 'root' is not use or read or admin"),
        (("add", "ci", "--scope", ""), "--scope: '' is not use or read or admin"),
        (("add", "ci", "--rate", "60"), "--rate: '60' is not a rate such as 60/min"),
        (("add", "ci", "--concurrency", "0"), "--concurrency: 0 is not a whole number from 1"),
        (("add", "ci", "--models", ""), "--models: '' is not a name"),
        (("add", "ci", "--scope", "read", "--models", "m"), "limits inference, which a key of the scope read is not good for"),
        (("add", "ci", "--scope", "read", "--rate", "5/s"), "limits inference, which a key of the scope read"),
        (("add", "ci", "--scope", "read", "--concurrency", "2"), "limits inference, which a key of the scope read"),
        (("add",), "the following arguments are required: NAME"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_changes_nothing(instance: Instance, words: tuple[str, ...], message: str) -> None:
    done = instance.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not instance.file.exists()


def test_a_file_with_mistakes_is_left_alone(instance: Instance) -> None:
    instance.file.parent.mkdir(parents=True)
    for text in ("", "serial: 1\nkeys:\n  ci: {sclope: use}\n"):
        instance.file.write_text(text)
        for words in (("add", "x"), ("revoke", "ci"), ("list",)):
            done = instance.run(*words)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"{instance.file}:" in done.stderr
        assert instance.file.read_text() == text
    assert f"{instance.file}:3: keys.ci.sclope: unknown key (did you mean scope?)" in done.stderr


def test_several_at_a_time_lose_nothing(instance: Instance, gateway: Gateway) -> None:
    """Also the gateway hears of them in the order in which they were made."""
    with serving(gateway, instance.socket):
        threads = [threading.Thread(target=instance.run, args=("add", f"key{number}")) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {key.name for key in instance.ring().keys} == {f"key{number}" for number in range(6)}
    told = [KeyRing.parse(str(body)).serial for _, _, body in gateway.asked]
    assert told == [1, 2, 3, 4, 5, 6]


def test_a_change_waits_for_another_one(instance: Instance) -> None:
    instance.file.parent.mkdir(parents=True)
    with (instance.file.parent / ".api-keys.yaml.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(target=lambda: results.append(instance.run("add", "ci")))
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
        assert not instance.file.exists()
    thread.join()
    assert results[0].returncode == 0


def test_the_gateway_is_told_by_the_file_s_text(instance: Instance, gateway: Gateway) -> None:
    with serving(gateway, instance.socket):
        done = instance.run("add", "ci")
        assert "mmd-gateway has taken it up" in done.stderr
        assert gateway.asked == [("PUT", "/api/v1/keys", instance.file.read_text())]
        instance.run("revoke", "ci")
        assert gateway.asked[1] == ("PUT", "/api/v1/keys", instance.file.read_text())
        instance.run("list")
    assert len(gateway.asked) == 2


@pytest.mark.parametrize("status", [404, 405])
def test_a_gateway_that_takes_no_keys_takes_them_when_it_restarts(instance: Instance, gateway: Gateway, status: int) -> None:
    gateway.keys_status = status
    with serving(gateway, instance.socket):
        done = instance.run("add", "ci")
    assert (done.returncode, len(done.stdout)) == (0, 48)
    assert "at its next restart" in done.stderr
    assert "systemctl --user restart mmd-gateway.service" in done.stderr


def test_a_gateway_that_refuses_is_an_error_but_the_key_is_there(instance: Instance, gateway: Gateway) -> None:
    gateway.keys_status = 500
    with serving(gateway, instance.socket):
        done = instance.run("add", "ci")
    assert (done.returncode, len(done.stdout)) == (1, 48)
    assert "mmd-gateway goes on with the keys that it has: answered 500" in done.stderr
    assert "systemctl --user restart mmd-gateway.service" in done.stderr
    assert instance.ring().find(done.stdout.strip().encode()) is not None


def test_a_gateway_that_is_replaced_meanwhile_is_asked_again(instance: Instance, gateway: Gateway) -> None:
    gateway.keys_first = 503
    with serving(gateway, instance.socket):
        done = instance.run("add", "ci")
    assert done.returncode == 0
    assert "mmd-gateway has taken it up" in done.stderr
    assert gateway.asked == 2 * [("PUT", "/api/v1/keys", instance.file.read_text())]


def test_a_file_that_systemd_would_not_pass_on_is_not_written(instance: Instance) -> None:
    many = KeyRing(tuple(Key(f"key{number}", digest(b"%d" % number), models=("x" * 150,)) for number in range(4000)), 1)
    instance.file.parent.mkdir(parents=True)
    instance.file.write_text(many.render())
    done = instance.run("add", "ci")
    assert (done.returncode, done.stdout) == (1, "")
    assert "too many keys for one file" in done.stderr
    assert instance.ring() == many


def test_what_cannot_be_read_is_named(instance: Instance) -> None:
    instance.file.mkdir(parents=True)
    done = instance.run("list")
    assert done.returncode == 1
    assert f"{instance.file}: cannot be read: Is a directory" in done.stderr
