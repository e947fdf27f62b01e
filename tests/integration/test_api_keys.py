"""API keys on an installed system: the file, who sees it, how it comes to the gateway as a credential, and what it does."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import Answer, get, post, stream
from testbed import CHECKOUT, PROCESSES, Installation, named

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
    for user in ("mmd", "mmd-fetch", "nobody"):
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


_MODELS = """
gateway: {workers: WORKERS}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
defaults: {engine: sim}
models:
  demo/a: {vram: 6GiB, sim: {load_time: 200ms, tokens_per_second: 500}}
  other: {vram: 6GiB, sim: {load_time: 200ms, tokens_per_second: 2}}
"""


@pytest.fixture(params=PROCESSES, ids=named)
def serving(clean: Installation, request: pytest.FixtureRequest) -> Installation:
    clean.configure(_MODELS.replace("WORKERS", str(request.param)))
    return clean


def ask(key: str = "", model: str = "demo/a", api: str = "http://127.0.0.1:8000") -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return post("/v1/chat/completions", body, api=api, headers=headers).status


def again(key: str) -> int | None:
    """As `ask`; None: whoever had accepted was killed."""
    with contextlib.suppress(ConnectionError):
        return ask(key)
    return None


def add(machine: Installation, *words: str) -> str:
    done = machine.run("mmdctl", "keys", "add", *words)
    assert "mmd-gateway has taken it up" in done.stderr
    return done.stdout.strip()


def relieve(machine: Installation) -> None:
    """`systemctl reload`, and wait until the fresh process is the main one."""
    before = machine.show(GATEWAY, "MainPID")
    machine.systemctl("reload", GATEWAY)
    machine.wait_until(lambda: machine.show(GATEWAY, "MainPID") != before, 30, "another main process")
    machine.wait_until(lambda: machine.show(GATEWAY, "ActiveState") == "active", 30)


def test_keys_count_at_once_and_through_upgrades_restarts_and_crashes(serving: Installation) -> None:
    assert ask() == 200
    first = add(serving, "first", "--models", "demo/*")
    assert [ask(), ask(first), ask(first, "other"), ask("mmd-nonsense")] == [401, 200, 404, 401]
    second = add(serving, "second", "--rate", "2/h")
    assert [ask(second), ask(second), ask(second)] == [200, 200, 429]
    unused = add(serving, "unused", "--rate", "1/h")
    relieve(serving)
    assert [ask(), ask(first), ask(first, "other"), ask(second)] == [401, 200, 404, 429], "the rate moves on as well"
    third = add(serving, "third")
    serving.run("mmdctl", "keys", "revoke", "first")
    assert [ask(first), ask(third)] == [401, 200]
    relieve(serving)
    assert [ask(unused), ask(unused)] == [200, 429]
    assert [ask(first), ask(third)] == [401, 200], "the credential of a running unit is older than that"
    serving.systemctl("restart", GATEWAY)
    assert [ask(first), ask(third)] == [401, 200]
    fourth = add(serving, "fourth")
    serving.systemctl("kill", "--signal=KILL", "--kill-who=main", GATEWAY)
    serving.wait_until(lambda: again(fourth) == 200, 30)
    assert [ask(first), ask(), ask(third)] == [401, 401, 200]
    for name in ("second", "unused", "third", "fourth"):
        serving.run("mmdctl", "keys", "revoke", name)
    assert [ask(), ask(fourth)] == [401, 401], "the last one was revoked: that opens nothing"
    relieve(serving)
    assert ask() == 401
    serving.path(FILE).unlink()
    serving.systemctl("restart", GATEWAY)
    assert ask() == 200, "no file, no keys, as mmdctl says"
    log = serving.journal("-u", GATEWAY)
    assert re.search(r"^PUT /api/v1/keys, asked by uid 0 \(root\), pid [0-9]+$", log, re.MULTILINE)
    assert not any(key in log for key in (first, second, third, fourth))


def test_a_waiting_request_keeps_its_place_through_an_upgrade(serving: Installation) -> None:
    one = add(serving, "one", "--concurrency", "1", "--rate", "1/h")
    serving.systemctl("stop", "mmd-model-demo-a@0.service")
    found: list[int] = []
    client = threading.Thread(target=lambda: found.append(ask(one)))
    client.start()
    relieve(serving)
    client.join(30)
    assert found == [200]
    assert ask(one) == 429


def test_what_the_old_process_still_answers_counts_in_the_fresh_one(serving: Installation) -> None:
    one = add(serving, "one", "--concurrency", "1")
    assert ask(one, "other") == 200
    body = {"model": "other", "messages": [{"role": "user", "content": "hello"}], "min_tokens": 30, "max_tokens": 30}
    found: list[int] = []
    headers = {"x-api-key": one}
    client = threading.Thread(target=lambda: found.append(post("/v1/chat/completions", body, headers=headers).status))
    client.start()  # for 15 s
    serving.wait_until(lambda: serving.status()["gateway"]["in_flight"] == 1)
    assert ask(one) == 429
    relieve(serving)
    relieve(serving)
    assert (ask(one), found) == (429, [])
    client.join(30)
    assert found == [200]
    serving.wait_until(lambda: ask(one) == 200)


def reading(key: str) -> tuple[threading.Thread, list[str]]:
    """A stream of 250 s, by `key`: who reads it, and what has come."""
    lines: list[str] = []

    def read() -> None:
        lines.extend(stream("other", headers={"x-api-key": key}, max_tokens=500, ignore_eos=True))

    reader = threading.Thread(target=read)
    reader.start()
    return reader, lines


def ends_by_revoking(machine: Installation, name: str, reader: threading.Thread, lines: list[str]) -> None:
    machine.wait_until(lambda: any("content" in line for line in lines), 10, "tokens")
    machine.run("mmdctl", "keys", "revoke", name)
    revoked = time.monotonic()
    reader.join(5)
    assert not reader.is_alive(), "the stream goes on"
    assert time.monotonic() - revoked < 5
    said = [line for line in lines if line.startswith("data: ")]
    assert "invalid_api_key" in said[-2], said[-3:]
    assert said[-1] == "data: [DONE]"


def gateways(machine: Installation) -> int:
    """Processes of gateways, workers apart; another test's user may have one as well."""
    return sum("bin/mmd-gateway" in line for line in machine.ps())


def test_a_stream_ends_when_its_key_is_revoked_also_in_a_gateway_that_was_relieved(serving: Installation) -> None:
    keys = {name: add(serving, name) for name in ("first", "second", "third", "stays")}
    assert ask(keys["stays"], "other") == 200
    ends_by_revoking(serving, "first", *reading(keys["first"]))
    before = gateways(serving)
    oldest, staying = reading(keys["second"]), reading(keys["stays"])
    serving.wait_until(lambda: serving.status()["gateway"]["in_flight"] == 2)
    relieve(serving)
    older = reading(keys["third"])
    assert gateways(serving) == before + 1
    serving.wait_until(lambda: serving.status()["gateway"]["in_flight"] == 3)
    relieve(serving)
    ends_by_revoking(serving, "third", *older)
    ends_by_revoking(serving, "second", *oldest)
    assert staying[0].is_alive(), "that of another key goes on"
    serving.run("mmdctl", "keys", "revoke", "stays")
    staying[0].join(5)
    assert not staying[0].is_alive()
    serving.wait_until(lambda: gateways(serving) == before, 10, "the old processes end with their last answer")


def test_the_admin_api_over_tcp_needs_a_key_from_the_first_one_on(serving: Installation) -> None:
    admin = "http://127.0.0.1:8001"
    stop = "/api/v1/models/demo%2Fa/stop"
    assert post(stop, {}, api=admin).status == 403
    operator, user = add(serving, "operator", "--scope", "admin"), add(serving, "user")
    refused = post(stop, {}, api=admin, headers={"x-api-key": user})
    assert (refused.status, refused.error["code"]) == (403, "admin_key_needed")
    assert "mmdctl keys add NAME --scope admin" in refused.error["message"]
    assert post(stop, {}, api=admin).status == 403
    assert ask(api=admin) == 401
    assert ask(user, api=admin) == 200
    assert '"ok": true' in post(stop, {}, api=admin, headers={"x-api-key": operator}).text
    assert "stop demo/a, asked by the API key operator at 127.0.0.1\n" in serving.journal("-u", GATEWAY)
    scraper = add(serving, "scraper", "--scope", "read")
    for key, seen in (("none", False), (user, False), (scraper, True), (operator, True)):
        status = serving.run("curl", "-s", f"{admin}/api/v1/status", "-H", f"x-api-key: {key}").stdout
        assert ('"models"' in status) is seen
    assert serving.run("curl", "-s", f"{admin}/api/v1/keys").stdout.count("admin_key_needed") == 1
    shown = serving.run("curl", "-s", f"{admin}/api/v1/keys", "-H", f"x-api-key: {operator}").stdout
    assert '"operator"' in shown
    assert "sha256" not in shown


@pytest.fixture
def more_models(serving: Installation) -> Iterator[Path]:
    """A folder for more definitions of models; they are gone afterwards."""
    folder = serving.path("/etc/mmd/models.d")
    yield folder
    for file in folder.glob("key-test-*.yaml"):
        file.unlink()
    serving.run("mmdctl", "reload")


def test_a_key_to_look_with_sees_neither_logs_nor_the_configuration(serving: Installation, more_models: Path) -> None:
    admin = "http://127.0.0.1:8001"
    broken = "models: {broken: {engine: command, gpus: 0, command: [/bin/sh, -c, 'echo a line of the engine; exit 3']}}\n"
    (more_models / "key-test-broken.yaml").write_text(broken)
    serving.run("mmdctl", "reload")
    failed = post("/v1/chat/completions", {"model": "broken", "messages": []})
    assert failed.status == 503
    assert "a line of the engine" in failed.error["message"], "without keys the client sees why"
    (more_models / "key-test-wrong.yaml").write_text("models: {wrong: {colour: red}}\n")
    keys = {name: add(serving, name, "--scope", name) for name in ("use", "read", "admin")}

    def look(path: str, key: str) -> Answer:
        return get(path, api=admin, headers={"x-api-key": keys[key]})

    post("/api/v1/reload", {}, api=admin, headers={"x-api-key": keys["admin"]})  # mmdctl does not ask for this one
    assert "colour" in look("/api/v1/status", "admin").text
    told = post("/v1/chat/completions", {"model": "broken", "messages": []}, headers={"x-api-key": keys["use"]})
    assert told.status == 503
    assert "a line of the engine" not in told.error["message"]
    for key, sees_all in (("read", False), ("admin", True)):
        status = look("/api/v1/status", key)
        assert status.status == 200
        for private in ("a line of the engine", "colour"):
            assert (private in status.text) is sees_all, (key, private)
        assert [look(f"/api/v1/{path}", key).status for path in ("models", "gpus", "events")] == [200] * 3
        for path in ("logs", "requests", "keys", "config"):
            assert look(f"/api/v1/{path}", key).status == (200 if sees_all else 403), (key, path)
    assert look("/api/v1/status", "use").status == 403


def test_the_log_says_who_asked_on_the_admin_socket(serving: Installation) -> None:
    serving.run("useradd", "--groups", "mmd-admin", "dora", check=False)
    uid = serving.run("id", "--user", "dora").stdout.strip()
    add(serving, "ci")
    assert serving.run("mmdctl", "start", "demo/a", user="dora").returncode == 0
    assert re.search(rf"^start demo/a, asked by uid {uid} \(dora\), pid [0-9]+$", serving.journal("-u", GATEWAY), re.MULTILINE)
    where = ("--unix-socket", "/run/mmd/admin.sock", "http://localhost/api/v1/keys")
    put = ("curl", "-s", "-X", "PUT", *where, "-d", "serial: 99")
    assert "keys_are_roots" in serving.run(*put, user="dora").stdout
    assert ask() == 401


def test_a_file_with_a_mistake_lets_nobody_in_by_it(serving: Installation) -> None:
    good, bad = add(serving, "good"), add(serving, "bad", "--rate", "5/h")
    serving.write(FILE, serving.read(FILE).replace("5/h", "5 an hour"), mode=0o600)
    serving.systemctl("restart", GATEWAY)
    assert [ask(), ask(good), ask(bad)] == [401, 200, 401]
    (problem,) = serving.status()["gateway"]["problems"]
    assert "keys.bad.rate" in problem
    serving.write(FILE, "", mode=0o600)
    serving.systemctl("restart", GATEWAY)
    assert [ask(), ask(good)] == [401, 401]


def test_packaging_up_needs_no_key_for_its_request(serving: Installation) -> None:
    add(serving, "ci")
    assert "answer" in serving.up()


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
