"""One table: the schema, the manual, the annotated default and mmd.config agree with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mmd.build import make_section
from mmd.check import Complaint, read_section
from mmd.config import Config, EngineKind, Model
from mmd.load import load_text
from mmd.manual import manual
from mmd.model_settings import MODEL
from mmd.schema import drop_in_schema, schema, validate
from mmd.setting import Later, Section, Setting, walk
from mmd.settings import TOP
from mmd.sizes import BYTES_PER_WEIGHT, estimate, estimate_of, vram_bytes
from mmd.yamlfile import parse

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "config/mmd.yaml"


def uncommented() -> str:
    """The annotated default with its settings switched on: lines whose # is followed by no space."""
    return re.sub(r"(?m)^( *)#(?=[^ #\n])", r"\1", DEFAULT.read_text())


def keys(section: Section) -> set[str]:
    return {".".join(path) for path, entry in walk(section) if not isinstance(entry, Later) and "NAME" not in path}


def keys_in(value: Any, section: Section, path: str = "") -> set[str]:
    found = set()
    for key, item in (value or {}).items():
        found.add(f"{path}{key}")
        entry = section.entries.get(key)
        if isinstance(entry, Section):
            found |= keys_in(item, entry, f"{path}{key}.")
    return found


def test_the_schema_in_the_repository_is_current() -> None:
    stored = json.loads((ROOT / "config/mmd.schema.json").read_text())
    assert stored == schema(), "python -m mmd.schema > config/mmd.schema.json"


def test_the_schemas_are_schemas() -> None:
    Draft202012Validator.check_schema(schema())
    Draft202012Validator.check_schema(drop_in_schema())


def test_the_manual_is_current() -> None:
    page = (ROOT / "man/mmd.yaml.5.scd").read_text()
    assert manual() in page, "replace the settings in man/mmd.yaml.5.scd with the output of: python -m mmd.manual"


def test_the_annotated_default_is_valid_and_changes_nothing() -> None:
    loaded = load_text(DEFAULT.read_text())
    assert loaded.problems == ()
    assert loaded.config == Config()


def test_the_annotated_default_explains_every_key() -> None:
    loaded = load_text(uncommented())
    assert loaded.problems == ()
    assert (loaded.config.gateway, loaded.config.gpus, loaded.config.policy) == (
        Config().gateway,
        Config().gpus,
        Config().policy,
    )
    value = parse(uncommented(), DEFAULT).value
    for entry in TOP.entries.values():
        assert isinstance(entry, Section)
        assert keys_in(value[entry.key], entry) == keys(entry)
    assert set().union(*(keys_in(model, MODEL) for model in value["models"].values())) == keys(MODEL)
    assert {model.engine for model in loaded.config.models.values()} == set(EngineKind)


@pytest.mark.parametrize(
    "section", [entry for entry in TOP.entries.values() if isinstance(entry, Section)], ids=lambda s: s.key
)
def test_defaults_in_the_table_are_those_that_take_effect(section: Section) -> None:
    written = {e.key: parse(e.default, DEFAULT).value for e in section.entries.values() if isinstance(e, Setting) and e.default}
    complaints: list[Complaint] = []
    values = read_section(section, written, (), complaints)
    assert complaints == []
    assert section.make is not None
    assert make_section(section, values) == section.make()


def test_defaults_of_models_in_the_table_are_those_that_take_effect() -> None:
    def written(section: Section) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for entry in section.entries.values():
            if isinstance(entry, Setting) and entry.default:
                values[entry.key] = parse(entry.default, DEFAULT).value
            elif isinstance(entry, Section):
                values[entry.key] = written(entry)
        return values

    complaints: list[Complaint] = []
    values = read_section(MODEL, written(MODEL), (), complaints)
    assert complaints == []
    listen, port = values.pop("listen")
    level = values.pop("sleep")["level"]
    model = Model(name="m", id="m", engine=EngineKind.VLLM)
    assert (listen, port, level) == (model.listen, model.listen_port, model.sleep_level)
    for key, value in values.items():
        entry = MODEL.entries[key]
        made = make_section(entry, value) if isinstance(entry, Section) else value
        field = entry.field if isinstance(entry, Setting) and entry.field else key
        assert getattr(model, field) == made, key


def test_the_normative_keys_are_known() -> None:
    later = {".".join(path) for section in (TOP, MODEL) for path, entry in walk(section) if isinstance(entry, Later)}
    assert later == set()


def test_validate_places_what_it_finds() -> None:
    document = parse("gateway:\n  listen: 5\nmodels:\n  a:\n    vrma: 1\n    vram: 2\n", Path("mmd.yaml"))
    assert [(problem.line, problem.key) for problem in validate(document)] == [
        (2, "gateway.listen"),
        (5, "models.a.vrma"),
        (6, "models.a.vram"),
    ]
    assert validate(parse("models: {a: {gpus: 0}}", Path("models.d/a.yaml"))) == ()
    assert [p.key for p in validate(parse("gateway: {}", Path("models.d/a.yaml")))] == ["gateway"]


def test_estimates() -> None:
    gib = 1 << 30
    made_of = estimate(7.6e9)
    parts = (made_of.weights_bytes, made_of.kv_cache_bytes, made_of.overhead_bytes, made_of.total_bytes)
    assert [round(part / gib, 6) for part in parts] == [14.2, 2.8, 2.4, 19.4], "they add up as they are shown"
    assert estimate(1e9, "fp8").total_bytes == pytest.approx((0.9 + 1.0 + 1.6) * gib, abs=3)
    assert estimate(70e9, "fp8", 2).weights_bytes == pytest.approx(estimate(70e9, "fp8").weights_bytes / 2, abs=gib / 10)
    assert all(estimate(7e9, precision).total_bytes > 0 for precision in BYTES_PER_WEIGHT)
    model = Model(name="m", id="m", engine=EngineKind.VLLM, params=8e9)
    assert vram_bytes(model) == estimate(8e9).total_bytes
    assert vram_bytes(model._replace(gpus=2)) == estimate(8e9, gpus=2).total_bytes
    assert estimate_of(model._replace(params=None)) is None
    assert vram_bytes(model._replace(gpus=0)) == 0
    assert vram_bytes(model._replace(vram_bytes=5)) == 5
