"""Models as files in models.d: what is written, what is refused, and that nothing is half done."""

import json
import os
import resource
import threading
from pathlib import Path

import pytest

from mmd.load import load
from mmd.model_settings import ROOT_ONLY
from mmd.registration import carry_out, read_reply
from mmd.registry import Fault, RegistryError, add, plan, remove, revision
from mmd.scope import Scope

_MAIN = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
profiles: {small: {vram: 2GiB}}
models:
  base: {engine: sim, vram: 4GiB, aliases: [b], lora: {base-sql: /x}}
"""
_SIM = {"engine": "sim", "vram": "4GiB"}


@pytest.fixture
def scope(tmp_path: Path) -> Scope:
    (tmp_path / "models.d").mkdir()
    (tmp_path / "mmd.yaml").write_text(_MAIN)
    return Scope.system()._replace(config_dir=tmp_path)


def fault(scope: Scope, models: dict[str, object], *, replace: bool = False) -> RegistryError:
    """Why an addition is refused, which leaves every file as it was."""
    before = contents(scope)
    with pytest.raises(RegistryError) as caught:
        add(scope, models, replace=replace)
    assert contents(scope) == before
    return caught.value


def contents(scope: Scope) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in scope.config_dir.rglob("*") if path.is_file()}


def drop_in(scope: Scope, name: str, text: str) -> Path:
    path = scope.config_dir / "models.d" / name
    path.write_text(text)
    return path


def test_a_model_becomes_a_file_of_its_own_that_is_read_as_it_was_meant(scope: Scope) -> None:
    os.umask(0o077)
    added = add(scope, {"Org/New 7B": {**_SIM, "args": ["--x", "no"], "profile": "small"}})
    (file,) = added.files
    assert file == scope.config_dir / "models.d/org-new-7b.yaml"
    assert file.stat().st_mode & 0o777 == 0o644
    loaded = load(scope)
    assert loaded.problems == ()
    model = loaded.config.models["Org/New 7B"]
    assert (model.args, model.vram_bytes, model.profile) == (("--x", "no"), 4 << 30, "small")
    assert added.models == {"Org/New 7B": revision(model)}
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is left beside it"


def test_the_folder_is_made_and_the_id_names_the_file(scope: Scope) -> None:
    (scope.config_dir / "models.d").rmdir()
    assert [file.name for file in add(scope, {"x": {**_SIM, "id": "other"}}).files] == ["other.yaml"]


def test_several_models_or_none(scope: Scope) -> None:
    refused = fault(scope, {"x": _SIM, "y": {**_SIM, "vrma": "1GiB"}})
    assert "models.y.vrma: unknown key (did you mean vram?)" in str(refused)
    assert refused.key == "models.y.vrma"
    assert [file.name for file in add(scope, {"x": _SIM, "y": _SIM}).files] == ["x.yaml", "y.yaml"]


def test_a_plan_writes_nothing(scope: Scope) -> None:
    before = contents(scope)
    (text,) = plan(scope, {"x": _SIM}).files.values()
    assert "models:\n  x: {engine: sim, vram: 4GiB}\n" in text
    assert contents(scope) == before


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({}, "there is no model in it"),
        ({"x": {"engine": "sim"}}, "models.x.vram: needed by a model that uses a GPU"),
        ({"x": {**_SIM, "vram": 4}}, "models.x.vram: 4 is not a size"),
        ({"x": {**_SIM, "id": "../x"}}, "models.x.id: '../x' is not a unit id"),
        ({"x": {**_SIM, "id": ["a"]}}, "is not a unit id"),
        ({"x": {**_SIM, "id": "base"}}, "base is already the unit id of base"),
        ({"x": {**_SIM, "aliases": ["b"]}}, "'b' is already an alias of base"),
        ({"x": {**_SIM, "aliases": ["base-sql"]}}, "base-sql"),
        ({"b": _SIM}, "'b' is the name of the model at"),
        ({"base-sql": _SIM}, "'base-sql' is the name of another model already"),
        ({"x": {**_SIM, "profile": "smal"}}, "did you mean small?"),
        ({"x": {**_SIM, "port": 3}}, "models.x.port"),
        ({"x": "text"}, "models.x: must be a mapping of keys"),
        ({"x": {**_SIM, "description": "\ud800"}}, "YAML cannot say"),
        ({"x\ny": _SIM}, "control characters"),
        ({"..": _SIM}, "no unit id can be made"),
        ({"n" * 300: _SIM}, "a name of 1 to 200 characters"),
        ({"X": _SIM, "x": _SIM}, "have the same unit id, x"),
    ],
)
def test_what_is_wrong_is_refused_by_key(scope: Scope, models: dict[str, object], words: str) -> None:
    refused = fault(scope, models)
    assert words in str(refused)
    assert refused.fault is Fault.INVALID


def test_what_is_there_is_replaced_only_on_request_and_where_it_is(scope: Scope) -> None:
    own = drop_in(scope, "10-mine.yaml", "models: {x: {engine: sim, vram: 1GiB, id: mine}}\n")
    assert fault(scope, {"x": _SIM}).fault is Fault.EXISTS
    replaced = add(scope, {"x": _SIM}, replace=True)
    assert list(replaced.files) == [own]
    assert load(scope).config.models["x"].vram_bytes == 4 << 30
    assert add(scope, {"z": _SIM}, replace=True).models.keys() == {"z"}, "nothing need be there"


def test_nobody_elses_file_is_touched(scope: Scope) -> None:
    drop_in(scope, "two.yaml", "models:\n  x: {engine: sim, vram: 1GiB}\n  y: {engine: sim, vram: 1GiB}\n")
    drop_in(scope, "z.yaml", "models: {}\n")
    for replace in (False, True):
        assert "mmd.yaml" in fault(scope, {"base": _SIM}, replace=replace).message
        assert "two.yaml" in fault(scope, {"x": _SIM}, replace=replace).message
        assert "z.yaml already" in fault(scope, {"z": _SIM}, replace=replace).message
        assert "two.yaml already" in fault(scope, {"two": _SIM}, replace=replace).message
    for name in ("base", "x"):
        with pytest.raises(RegistryError, match=r"mmd\.yaml:5|two\.yaml:2, beside y") as caught:
            remove(scope, name)
        assert caught.value.fault is Fault.SHARED


def test_a_configuration_with_problems_takes_nothing_but_its_correction(scope: Scope) -> None:
    bad = drop_in(scope, "bad.yaml", "models: {bad: {engine: sim, vrma: 1GiB}}\n")
    refused = fault(scope, {"x": _SIM})
    assert refused.fault is Fault.UNSOUND
    assert "bad.yaml:1" in refused.message
    add(scope, {"bad": _SIM}, replace=True)
    bad.write_text("models: {bad: {engine: sim, vrma: 1GiB}}\n")
    assert remove(scope, "bad") == bad
    add(scope, {"x": _SIM})


def test_a_removed_model_is_gone_and_an_unknown_one_is_said_to_be(scope: Scope) -> None:
    (file,) = add(scope, {"first": _SIM}).files
    with pytest.raises(RegistryError, match="did you mean first") as caught:
        remove(scope, "frist")
    assert caught.value.fault is Fault.UNKNOWN
    assert remove(scope, "first") == file
    assert load(scope).config.models.keys() == {"base"}


def test_a_file_that_cannot_be_written_leaves_nothing_behind(scope: Scope) -> None:
    """As on a full disk: the second of two files is longer than files may be for the moment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    long = {**_SIM, "description": "x" * 100_000}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        refused = fault(scope, {"x": _SIM, "y": long})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.fault is Fault.UNWRITABLE
    assert "File too large" in refused.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(scope: Scope) -> None:
    (scope.config_dir / "models.d").chmod(0o555)
    assert "models.d" in fault(scope, {"x": _SIM}).message


def test_two_who_add_the_same_model_do_not_both_succeed(scope: Scope) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def attempt(number: int) -> None:
        start.wait(10)
        try:
            add(scope, {"x": {**_SIM, "priority": number}})
            outcomes.append("added")
        except RegistryError as error:
            outcomes.append(error.fault)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["added", *[Fault.EXISTS] * 7]


def test_requests_are_answered_whatever_they_are(scope: Scope) -> None:
    done = read_reply(carry_out(scope, json.dumps({"add": {"x": _SIM}, "replace": False}).encode() + b"\n"))
    assert done.models.keys() == {"x"}
    for request in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"add": []}',
        b'{"add": {}, "replace": 1}',
        b'{"remove": "x", "y": 1}',
        b"[" * 9999,
    ):
        with pytest.raises(RegistryError) as caught:
            read_reply(carry_out(scope, request))
        assert caught.value.fault is Fault.INVALID, request
    assert read_reply(carry_out(scope, b'{"remove": "x"}')).files == done.files
    for reply in (b"", b"{", b"[]", b'{"fault": "nonsense"}', b"{}"):
        with pytest.raises(RegistryError, match="registrar"):
            read_reply(reply)


def test_only_root_opens_ports_to_others(scope: Scope) -> None:
    for port in ("0.0.0.0:9000", "127.0.0.1:80", "[::]:9000", "192.0.2.1:9000"):
        with pytest.raises(RegistryError, match="not a loopback address"):
            plan(scope, {"n": {"gpus": 0, "port": port}})
    for port in ("127.0.0.1:9000", "localhost:9000", "[::1]:9000"):
        assert plan(scope, {"n": {"gpus": 0, "port": port}}).models
    text = scope.config_file.read_text()
    scope.config_file.write_text(text + "\ngateway: {added_ports: any}\n")
    assert plan(scope, {"n": {"gpus": 0, "port": "0.0.0.0:9000"}}).models


def test_no_added_model_has_the_number_of_the_gateways_port(scope: Scope) -> None:
    """Clients that ask `localhost`, which is [::1] first, would send the model what they mean for the gateway."""
    for port in ("[::1]:8000", "127.0.0.2:8000", "[::1]:8001"):
        with pytest.raises(RegistryError, match="has the number of a port of the gateway"):
            plan(scope, {"n": {"gpus": 0, "port": port}})


def test_some_settings_are_roots(scope: Scope) -> None:
    for key in ROOT_ONLY:
        with pytest.raises(RegistryError, match="only root may set it"):
            plan(scope, {"n": {"gpus": 0, key: "x"}})
