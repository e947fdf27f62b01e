"""Weights from a hub: what is fetched, what is checked, and what of a hub's answer is refused."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, fake_hub

from mmd.config import EngineKind, Model
from mmd.errors import MmdError
from mmd.gateway.prerequisites import why_not_started
from mmd.hub import fetch
from mmd.hub.http import Hub
from mmd.hub.listing import HubFile, parse_listing, parse_wanted, selected
from mmd.hub_unit import fetch_unit, wanted
from mmd.scope import Scope

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": os.urandom(3 << 20),
    "sub/tokenizer.json": b"{}",
    "pytorch_model.bin": b"the same again",
    "original/consolidated.pth": b"and again",
}
FETCHED = {name for name in FILES if name.endswith(("json", "safetensors"))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub("org/model", FILES) as hub:
        for name in ("http_proxy", "HTTP_PROXY", "HF_TOKEN", "CREDENTIALS_DIRECTORY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
        monkeypatch.setattr(fetch, "_BACK_OFF_S", 0.01)
        yield hub


def got(tmp_path: Path) -> dict[str, bytes]:
    snapshot = tmp_path / "hub/models--org--model/snapshots" / COMMIT
    return {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}


def test_what_an_engine_needs_is_fetched_once(hub: FakeHub, tmp_path: Path) -> None:
    assert fetch.main(["org/model@main"]) == 0
    assert got(tmp_path) == {name: FILES[name] for name in FETCHED}
    assert (tmp_path / "hub/models--org--model/refs/main").read_text() == COMMIT
    asked = len(hub.asked)
    assert fetch.main(["org/model@main"]) == 0
    assert len(hub.asked) == asked, "nobody is asked again"
    (tmp_path / "hub/models--org--model/snapshots" / COMMIT / "config.json").unlink()
    assert fetch.main(["org/model@main"]) == 0
    assert set(got(tmp_path)) == FETCHED


def test_a_broken_download_goes_on_where_it_broke_off(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut = {"model.safetensors": 1 << 20}
    hub.damaged = {"config.json"}
    assert fetch.main(["org/model@main"]) == 0
    assert got(tmp_path) == {name: FILES[name] for name in FETCHED}
    assert sum(role == "bytes" and path.endswith("model.safetensors") for role, path, _ in hub.asked) == 2


def test_the_token_is_for_the_hub_only(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    assert fetch.main(["org/model@main"]) == 1
    (reason,) = (tmp_path / "failure").read_text().splitlines()
    assert "HTTP status 401 (no such model, or one that needs a token)" in reason
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "HF_TOKEN").write_text("secret\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert fetch.main(["org/model@main"]) == 0
    assert not (tmp_path / "failure").exists()
    assert {token for role, _, token in hub.asked if role == "bytes"} == {None}


@pytest.mark.parametrize(
    "path", ["../../../evil", "/etc/evil", "a/../../evil", "a//b", ".", "a\\b", "a\nb", "\x1b[2J", "x" * 256, ""]
)
def test_a_hub_writes_nowhere_else(hub: FakeHub, tmp_path: Path, path: str) -> None:
    hub.listing = {"sha": COMMIT, "siblings": [{"rfilename": path, "blobId": "0" * 40, "size": 1}]}
    assert fetch.main(["org/model@main"]) == 1
    assert "the hub's answer is not understood" in (tmp_path / "failure").read_text()
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "listing",
    [
        [],
        {},
        {"sha": "../x", "siblings": []},
        {"sha": 5, "siblings": []},
        {"sha": COMMIT, "siblings": [{"rfilename": "a", "blobId": "../../x", "size": 1}]},
        {"sha": COMMIT, "siblings": [{"rfilename": "a", "blobId": "0" * 40, "size": -1}]},
        {"sha": COMMIT, "siblings": [{"rfilename": 5, "blobId": "0" * 40, "size": 1}]},
        {"sha": COMMIT, "siblings": [None]},
        {"sha": COMMIT, "siblings": [{"rfilename": "a", "blobId": None, "size": 1}]},
        {"sha": COMMIT, "siblings": [{"rfilename": "a", "lfs": 5, "size": 1}]},
    ],
)
def test_what_is_no_listing_is_refused(listing: Any) -> None:
    with pytest.raises(MmdError):
        parse_listing(listing)


@pytest.mark.parametrize("name", ["", "..", "a/b/c", "../a", "a/..b..", "a b", "a--b/c", "a/b@../x", "a/b@/x", "a/b@a//b", "a"])
def test_what_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(MmdError):
        parse_wanted(name)


def test_weights_that_are_longer_than_announced_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.listing = hub.true_listing()
    hub.files["config.json"] = b"x" * 100_000
    assert fetch.main(["org/model@main"]) == 1
    assert "longer than the hub says" in (tmp_path / "failure").read_text()


def test_a_listing_that_is_nested_too_deeply_is_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.listing = b"[" * 200_000
    assert fetch.main(["org/model@main"]) == 1
    assert "the answer is no JSON" in (tmp_path / "failure").read_text()


def test_other_schemes_are_not_followed(hub: FakeHub, tmp_path: Path) -> None:
    hub.elsewhere = "file:///etc/passwd?"
    assert fetch.main(["org/model@main"]) == 1
    assert "root:" not in (tmp_path / "failure").read_text()


def test_without_the_hub_what_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that an earlier version of mmd downloaded: nothing notes that they are complete."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    assert fetch.main(["org/model@main"]) == 1
    folder = tmp_path / "hub/models--org--model"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    assert fetch.main(["org/model@main"]) == 0


def test_one_form_of_the_weights() -> None:
    def names(*paths: str) -> set[str]:
        return {file.path for file in selected([HubFile(path, 1, "0" * 40) for path in paths])}

    assert names("a.bin", "b.json") == {"a.bin", "b.json"}
    assert names("a.bin", "a.safetensors", "onnx/a.onnx", "x.gguf") == {"a.safetensors"}
    assert names("x.gguf", "README.md") == {"x.gguf", "README.md"}


def model(**settings: Any) -> Model:
    return Model(name="org/model", id="m", **{"engine": EngineKind.VLLM, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["org/model@main"]),
        ({"model": "/srv/x"}, []),
        ({"model": "s3://bucket/x"}, []),
        ({"model": "org/x:Q4_K_M"}, ["org/x@main"]),
        ({"engine": EngineKind.COMMAND}, []),
        ({"args": ("--revision", "v2")}, ["org/model@v2"]),
        ({"args": ("--tokenizer=org/t", "--revision=x")}, ["org/model@x", "org/t@main"]),
        ({"lora": {"a": "org/lora", "b": "/srv/b"}}, ["org/model@main", "org/lora@main"]),
        ({"args": ("--speculative-config", '{"model": "org/draft"}')}, ["org/model@main", "org/draft@main"]),
        ({"args": ("--speculative-config", "{")}, ["org/model@main"]),
        ({"env": {"HF_HUB_OFFLINE": "1"}}, []),
        ({"env": {"HF_HOME": "/srv/hf"}}, []),
    ],
)
def test_what_a_model_needs(settings: dict[str, Any], expected: list[str]) -> None:
    assert [str(each) for each in wanted(model(**settings), Scope.system())] == expected
    assert (fetch_unit(model(**settings), scope=Scope.system(), bin_dir="/b") is None) is (not expected)
    assert wanted(model(**settings), Scope.user({})) == ()


def test_of_a_models_variables_the_fetch_gets_those_about_the_hub() -> None:
    env = {"HF_ENDPOINT": "http://h", "LD_PRELOAD": "/x", "PYTHONPATH": "/x", "https_proxy": "http://p", "HF_HUB_CACHE_X": "y"}
    text = fetch_unit(model(env=env), scope=Scope.system(), bin_dir="/b")
    assert text is not None
    names = set(re.findall(r'(?m)^Environment="?([A-Za-z_]+)=', text))
    assert names == {"HF_HOME", "HF_HUB_CACHE", "HOME", "HF_ENDPOINT", "https_proxy"}


def test_another_hub_fills_another_cache() -> None:
    """A member of mmd-admin who names a hub of theirs must not change what other models load."""

    def cache(**env: str) -> str:
        (found,) = re.findall(
            r'(?m)^Environment="?HF_HUB_CACHE=([^"\n]*)', fetch_unit(model(env=env), scope=Scope.system(), bin_dir="/b") or ""
        )
        return str(found)

    usual = "/var/cache/mmd/huggingface/hub"
    assert cache() == cache(HF_TOKEN="x", https_proxy="http://p") == usual
    others = [
        cache(HF_ENDPOINT="https://evil"),
        cache(HF_ENDPOINT="http://evil"),
        cache(HF_ENDPOINT="http://evil", http_proxy="http://p"),
        cache(SSL_CERT_FILE="/srv/ca"),
        cache(SSL_CERT_DIR="/srv/ca"),
    ]
    assert len({usual, *others}) == 6
    assert cache(HF_ENDPOINT="https://evil") == others[0]
    assert cache(HF_ENDPOINT="https://hub\nSSL_CERT_FILE=/srv/ca") != cache(HF_ENDPOINT="https://hub", SSL_CERT_FILE="/srv/ca")
    assert all(len(each) - len(f"{usual}-") >= 32 for each in others), "nobody finds another hub's"


def test_everybodys_token_is_for_the_usual_hub(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    environment = {"HF_HOME": str(tmp_path)}
    assert Hub.of_environment(environment).token == "secret"
    for name in ("HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        assert Hub.of_environment({**environment, name: "https://evil"}).token == ""


def test_the_fetch_gets_the_token_and_no_other_secret() -> None:
    secrets = {"HF_TOKEN": Path("/etc/mmd/hf"), "OTHER": Path("/etc/mmd/other")}
    text = fetch_unit(model(secrets=secrets), scope=Scope.system(), bin_dir="/b")
    assert text is not None
    assert re.findall(r"(?m)^LoadCredential=(.*)$", text) == ["HF_TOKEN:/etc/mmd/hf"]


def test_why_an_engine_was_not_started(tmp_path: Path) -> None:
    scope = Scope.system()._replace(model_dir=tmp_path / "mmd-model")
    folder = scope.fetch_dir / "m"
    folder.mkdir(parents=True)
    began = time.time()
    unknown = "a unit that it requires has failed: journalctl -u mmd-user@mmd-m-m.service -u mmd-fetch-m.service"
    assert why_not_started(scope, model(), began) == (unknown, ())
    (folder / "failure").write_text("no such model\nmore\n")
    assert why_not_started(scope, model(), began) == ("its weights could not be fetched: no such model", ("more",))
    assert why_not_started(scope, model(), began + 60) == (unknown, ()), "that was another time"
    (folder / "failure").unlink()
    os.mkfifo(folder / "failure")
    assert why_not_started(scope, model(), began) == (unknown, ())
    (folder / "failure").unlink()
    (folder / "failure").symlink_to("/etc/passwd")
    assert why_not_started(scope, model(), began) == (unknown, ())
    assert why_not_started(scope, model(model="/srv/x", user="someone"), began) is None


def test_an_endpoint_is_http() -> None:
    with pytest.raises(MmdError):
        Hub.of_environment({"HF_ENDPOINT": "file:///etc"})
