"""The configuration format as JSON Schema, made from the table of settings.

`python -m mmd.schema > config/mmd.schema.json` makes the file that editors use. `validate` is the second opinion of
`mmdctl check`: the loader enforces the same by itself.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmd.kinds import NAME
from mmd.load import is_drop_in
from mmd.model_settings import DEFAULTS, MODEL, PROFILE
from mmd.problem import Problem
from mmd.setting import Entry, Later, Section
from mmd.settings import TOP
from mmd.yamlfile import Document

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

__all__ = ["drop_in_schema", "schema", "validate"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """The schema of mmd.yaml."""
    properties = {key: _entry(entry) for key, entry in TOP.entries.items()}
    properties["defaults"] = _section(DEFAULTS)
    properties["profiles"] = _named("Named sets of model keys, used with `profile: NAME`.", _section(PROFILE))
    properties["models"] = _models()
    return {
        "$schema": _DIALECT,
        "title": "mmd.yaml",
        "description": "The configuration of mmd, see mmd.yaml(5).",
        **_mapping(properties),
    }


def drop_in_schema() -> dict[str, Any]:
    """The schema of models.d/*.yaml."""
    return {"$schema": _DIALECT, "title": "models.d/*.yaml", **_mapping({"models": _models()})}


def validate(document: Document) -> tuple[Problem, ...]:
    """What jsonschema finds wrong with a document, with the lines; not what is wrong with it as YAML."""
    from jsonschema import Draft202012Validator  # 60 ms, and only `mmdctl check` wants it

    validator = Draft202012Validator(drop_in_schema() if is_drop_in(document.file) else schema())
    errors = sorted(validator.iter_errors(document.value), key=lambda error: [str(part) for part in error.absolute_path])
    return tuple(_problem(document, error) for error in errors)


def _problem(document: Document, error: "ValidationError") -> Problem:
    path = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
        path = (*path, next((key for key in error.instance if key not in known), ""))
    if _may_hold_secrets(path, error):
        path = tuple(str(part).partition("=")[0] for part in path)  # {HF_TOKEN=hf_abc} is a key
        message = "is not what the schema says of it"
    else:
        message = error.message if len(error.message) < 200 else f"{error.message[:200]}..."
    return Problem(document.file, document.line(path), ".".join(map(str, path)), message)


def _may_hold_secrets(path: tuple[str | int, ...], error: "ValidationError") -> bool:
    """Whether jsonschema's message, which begins with the value, may show variables of a model."""
    return not {"env", "secrets"}.isdisjoint(path) or (
        error.validator != "additionalProperties" and isinstance(error.instance, dict | list)
    )


def _models() -> dict[str, Any]:
    return _named("The models, by the names that clients send.", _section(MODEL))


def _named(description: str, item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "type": ["object", "null"],
        "propertyNames": NAME.schema,
        "additionalProperties": item,
    }


def _mapping(properties: Mapping[str, Any], others: Any = False) -> dict[str, Any]:
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": others}


def _section(section: Section) -> dict[str, Any]:
    properties = {key: _entry(entry) for key, entry in section.entries.items()}
    if section.others is None or section.names is None:
        return {"description": section.doc, **_mapping(properties)}
    names = {"anyOf": [{"enum": list(properties)}, section.names.schema]}
    return {"description": section.doc, **_mapping(properties, _entry(section.others)), "propertyNames": names}


def _entry(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Section):
        return _section(entry)
    if isinstance(entry, Later):
        allowed = {"not": {}} if entry.only is None else {"const": entry.only}
        return {"description": f"{entry.doc} Not yet supported.", **allowed}
    default = f" Default: {entry.default}." if entry.default else ""
    return {"description": f"{entry.doc}{default}", **entry.kind.schema}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
