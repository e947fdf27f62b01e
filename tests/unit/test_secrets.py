"""Secrets of models: what a configuration may say, what the unit says, what the runner makes of it; nothing shows them."""

import json
import os
from pathlib import Path

import pytest

from mmd.config import Model
from mmd.credentials import credential_lines
from mmd.errors import MmdError
from mmd.load import Loaded, load_text
from mmd.registry import Fault, RegistryError, plan
from mmd.runner.launch import engine_environment
from mmd.runner.options import Options, parse
from mmd.runner.output import EngineLog
from mmd.runner.secrets import Mask, read_secrets
from mmd.schema import validate
from mmd.scope import Scope
from mmd.secrecy import hide_secrets, looks_secret
from mmd.units import definition, render_units
from mmd.yamlfile import parse as parse_yaml

TOKEN = "hf_abcdefghijklmnop"
FIXED = ["--model", "org/m", "--engine", "sim", "--gpus", "cpu", "--definition", "abc", "--directory", "/run/mmd-model/m@cpu"]


def loaded(said: object, *, place: str = "models: {m: {engine: sim, gpus: 0, %s}}") -> Loaded:
    return load_text(place % f"secrets: {json.dumps(said)}")


def model(said: object) -> Model:
    found = loaded(said)
    assert found.problems == ()
    return found.config.models["m"]


def options(**secrets: str) -> Options:
    return parse([*FIXED, *(word for name, file in secrets.items() for word in ("--secret", f"{name}={file}")), "--", "engine"])


# The configuration


@pytest.mark.parametrize("file", ["/a", "/etc/mmd/secrets/hf-token", "/srv/a b/%n", "/srv/é", "/.hidden/..a/a..", '/a$b"c'])
def test_files_that_may_be_named(file: str) -> None:
    assert model({"HF_TOKEN": file}).secrets == {"HF_TOKEN": Path(file)}


WRONG_FILES = [
    *("", "/", "relative", "/a/", "//a", "/a//b", "/a/./b", "/a/../b", "/..", "/a/.", "/a:b", "/a\\", "/a\\b", "/a\nUser=root"),
    *("/a ", "/a /b", "/a\x00", "/a\x7f", "/a\ufdd0", "/a\u2028b", 7, None, ["/a"], {"/a": 1}, TOKEN),
]


@pytest.mark.parametrize("file", WRONG_FILES)
def test_files_that_may_not(file: object) -> None:
    found = loaded({"HF_TOKEN": file})
    assert [problem.key for problem in found.problems] == ["models.m.secrets.HF_TOKEN"]
    said = json.dumps({"HF_TOKEN": file})
    text = f"models: {{m: {{engine: sim, gpus: 0, secrets: {said}}}}}"
    assert validate(parse_yaml(text, Path("mmd.yaml"))), "the schema agrees"


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A:B", "A/B", "A=B", "é", "A" * 256, "A\n"])
def test_names_that_may_not(name: str) -> None:
    assert loaded({name: "/a"}).problems


@pytest.mark.parametrize(
    "place", ["defaults: {%s}", "profiles: {p: {%s}}", "models: {m: {engine: external, endpoint: 'http://h', %s}}"]
)
def test_places_where_they_do_not_belong(place: str) -> None:
    """A member of mmd-admin may add a model with any profile, which runs any program: it must not get what root gave others."""
    assert [problem.key.rpartition(".")[2] for problem in loaded({"HF_TOKEN": "/a"}, place=place).problems] == ["secrets"]


def test_a_variable_has_one_value() -> None:
    found = load_text("models: {m: {engine: sim, gpus: 0, env: {A: b}, secrets: {A: /a}}}")
    assert [(problem.key, problem.message) for problem in found.problems] == [("models.m.secrets.A", "is in env too")]


def test_a_mistake_does_not_show_the_value() -> None:
    mistakes = [
        *(f"secrets: {value}" for value in (TOKEN, f"[{TOKEN}]", f"{{HF_TOKEN: {TOKEN}}}", f"{{HF_TOKEN={TOKEN}: }}")),
        *(f"env: {value}" for value in (f"HF_TOKEN={TOKEN}", f"[HF_TOKEN={TOKEN}]", f"{{HF_TOKEN: [{TOKEN}]}}")),
        *(f"env: {value}" for value in (f"{{HF_TOKEN={TOKEN}: }}", f"{{my-key: {TOKEN}, 1key: {TOKEN}}}")),
    ]
    for mistake in mistakes:
        text = f"models: {{m: {{engine: sim, gpus: 0, {mistake}}}}}"
        problems = load_text(text).problems
        by_schema = validate(parse_yaml(text, Path("mmd.yaml")))
        assert problems, mistake
        assert TOKEN not in repr((problems, by_schema)), mistake
    (harmless,) = load_text("models: {m: {engine: sim, gpus: 0, env: {VERSION: 1.10}}}").problems
    assert "1.1" in harmless.message, "what is no secret is shown, to be found"


def test_names_that_look_secret() -> None:
    secret = ("HF_TOKEN", "hf_token", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DbPassword", "TOKENS")
    assert all(map(looks_secret, secret))
    assert not any(map(looks_secret, ("HF_HOME", "TOKENIZERS_PARALLELISM", "VLLM_LOGGING_LEVEL", "PATH")))
    assert hide_secrets({"A_KEY": "x", "B": "y"}) == {"A_KEY": "(hidden)", "B": "y"}


def test_only_root_may_set_them(tmp_path: Path) -> None:
    (tmp_path / "models.d").mkdir()
    (tmp_path / "mmd.yaml").write_text("gpus: {provider: sim, devices: [{memory: 24GiB}]}")
    scope = Scope.system()._replace(config_dir=tmp_path)
    settings = {"engine": "command", "command": ["/bin/env"], "gpus": 0}
    plan(scope, {"m": settings})
    for said in ({"X": "/etc/shadow"}, {}, None):
        with pytest.raises(RegistryError, match="only root may set it") as caught:
            plan(scope, {"m": {**settings, "secrets": said}})
        assert (caught.value.fault, caught.value.key) == (Fault.INVALID, "models.m.secrets")


# The unit


def test_the_unit_loads_credentials() -> None:
    found = loaded({"HF_TOKEN": "/srv/100%/t"})
    text = render_units(found.config, scope=Scope.system(), bin_dir="/b").files["mmd-model-m@.service"]
    lines = text.splitlines()
    assert lines.count("LoadCredential=HF_TOKEN:/srv/100%%/t") == lines.count(r"SetCredential=HF_TOKEN:\n") == 1
    assert '--secret "HF_TOKEN=/srv/100%%/t"' in text
    assert list(credential_lines({})) == []


def test_another_file_is_another_definition() -> None:
    gpus = loaded({}).config.gpus
    with_a, with_b, without = (definition(model(said), gpus=gpus) for said in ({"A": "/a"}, {"A": "/b"}, {}))
    assert len({with_a, with_b, without}) == 3
    assert without == definition(load_text("models: {m: {engine: sim, gpus: 0}}").config.models["m"], gpus=gpus)


# The runner


@pytest.mark.parametrize(
    ("written", "value"), [(b"x", "x"), (b"x\n", "x"), (b"x\n\n", "x\n"), (b" x ", " x "), (b"a\xff", "a\udcff")]
)
def test_the_value_is_the_file_less_one_newline(tmp_path: Path, written: bytes, value: str) -> None:
    (tmp_path / "T").write_bytes(written)
    assert read_secrets(options(T="/etc/t"), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == {"T": value}


def test_a_value_of_64_kib_is_the_largest(tmp_path: Path) -> None:
    (tmp_path / "T").write_bytes(b"x" * 65536 + b"\n")
    assert len(read_secrets(options(T="/etc/t"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})["T"]) == 65536


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b"", "/etc/t is missing or empty"),
        (b"\n", "/etc/t is missing or empty"),
        (b"x" * 65537, "/etc/t is larger than 64 KiB"),
        (b"x" * 65536 + b"\n\n", "/etc/t is larger than 64 KiB"),
        (b"secret\0", "/etc/t holds a NUL byte"),
        (None, "the copy of /etc/t cannot be read: No such file"),
    ],
)
def test_what_is_no_value_is_refused_by_name_and_not_shown(tmp_path: Path, written: bytes | None, words: str) -> None:
    if written is not None:
        (tmp_path / "T").write_bytes(written)
    with pytest.raises(MmdError) as caught:
        read_secrets(options(T="/etc/t"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    message = str(caught.value)
    assert message.startswith("models.org/m.secrets.T: ")
    assert words in message
    assert "secret" not in message.replace("models.org/m.secrets.T", "")


def test_a_unit_without_credentials_is_refused() -> None:
    with pytest.raises(MmdError, match="the unit has no credentials"):
        read_secrets(options(T="/etc/t"), {})
    assert read_secrets(options(), {}) == {}


@pytest.mark.parametrize("word", ["T", "T=", "=/a", "T=a", "../T=/a", TOKEN])
def test_wrong_options_are_not_shown(word: str) -> None:
    with pytest.raises(MmdError) as caught:
        parse([*FIXED, "--secret", word, "--", "x"])
    assert TOKEN not in str(caught.value)


def test_the_engine_is_not_told_where_credentials_are() -> None:
    assert "CREDENTIALS_DIRECTORY" not in engine_environment({"CREDENTIALS_DIRECTORY": "/run/credentials/u", "A": "b"}, "0")


# What the engine says


def log(*values: str) -> tuple[EngineLog, list[bytes]]:
    lines: list[bytes] = []
    found = EngineLog((), None, lines.append)
    found.mask = Mask(values)
    return found, lines


def test_what_the_engine_says_of_them_is_hidden() -> None:
    engine, lines = log(TOKEN, "-----BEGIN\nMIIEvQIBADANBg\n-----END--\n", "short", TOKEN[:10])
    engine.feed(f"token={TOKEN}, {TOKEN[:10]}.\nMIIEvQIBADANBg\r\nshort\n".encode())
    assert lines == [b"token=***, ***.\n", b"***\n", b"short\n"]
    assert engine.tail == ("token=***, ***.", "***", "short")
    assert engine.mask.hide_text(f"the engine {TOKEN} died") == "the engine *** died"


def test_a_short_value_is_not_hidden_since_it_would_show_by_its_place() -> None:
    engine, lines = log("1234567", "")
    engine.feed(b"1234567\n")
    assert lines == [b"1234567\n"]


def test_bytes_that_are_no_text_are_hidden_as_well() -> None:
    engine, lines = log(os.fsdecode(b"abcdefgh\xff"))
    engine.feed(b"=abcdefgh\xff=\n")
    assert lines == [b"=***=\n"]


@pytest.mark.parametrize("before", range(65536 - len(TOKEN), 65537))
def test_a_secret_is_hidden_where_a_line_without_end_is_cut(before: int) -> None:
    engine, lines = log(TOKEN)
    text = b"." * before + TOKEN.encode() + b"." * 100
    half = before + 7
    engine.feed(text[:half])
    engine.feed(text[half:] + b"\n")
    engine.close()
    whole = b"".join(lines).replace(b"\n", b"")
    assert whole == b"." * before + b"***" + b"." * 100
