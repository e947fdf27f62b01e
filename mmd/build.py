"""Makes the frozen values of mmd.config out of what was read, and writes them back as YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd.amounts import RESOURCE
from mmd.config import Config, EngineKind, Gauge, Listen, Model
from mmd.model_settings import MODEL
from mmd.names import slug
from mmd.setting import Section, Setting
from mmd.settings import TOP

__all__ = ["make_model", "make_section", "merge", "render"]

Values = Mapping[str, Any]


def merge(under: Values, over: Values) -> dict[str, Any]:
    """`over` laid on `under`: mappings key by key, everything else replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def make_section(section: Section, values: Values) -> Any:
    """The object that a section stands for."""
    assert section.make is not None
    if section.others is None:
        return section.make(**_fields(section, values))
    known = {key: value for key, value in values.items() if key in section.entries}
    named = {key: value for key, value in values.items() if key not in section.entries}
    commands = {key: value for key, value in named.items() if isinstance(value, Gauge)}
    amounts = {key: value for key, value in named.items() if key not in commands}
    return section.make(**_fields(section, known), amounts=amounts, commands=commands)


def make_model(name: str, values: Values, *, source: Path, line: int) -> Model:
    """The model called `name` out of its merged values; MmdError when no unit id can be made of the name."""
    fields = _fields(MODEL, values)
    fields["listen"], fields["listen_port"] = fields.get("listen", (Listen.TCP, None))
    fields.setdefault("engine", EngineKind.VLLM)
    if "id" not in fields:
        fields["id"] = slug(name)
    if fields["engine"] is EngineKind.EXTERNAL:
        fields["gpus"] = 0  # whatever it uses is foreign use
    return Model(name=name, source=source, line=line, **fields)


def render(config: Config) -> str:
    """The configuration as it takes effect, as YAML: every setting of the gateway, and of the models what is not default."""
    from mmd.yamlfile import dump

    top = {section.key: _plain(section, getattr(config, section.key)) for section in _sections(TOP)}
    for name, value in {**config.resources.amounts, **config.resources.commands}.items():
        top["resources"][name] = RESOURCE.write(value)
    return dump({**top, "models": {model.name: _model(model) for model in config.models.values()}})


def _model(model: Model) -> dict[str, Any]:
    default = _plain(MODEL, Model(name=model.name, id="", engine=model.engine))
    shown = _difference(_plain(MODEL, model), default)
    shown.pop("profile", None)  # it is merged in
    if model.engine is EngineKind.EXTERNAL:
        shown.pop("gpus", None)
    return {"id": model.id, "engine": str(model.engine), **{k: v for k, v in shown.items() if k != "id"}}


def _fields(section: Section, values: Values) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in values.items():
        entry = section.entries[key]
        if isinstance(entry, Setting):
            fields[entry.field or key] = value
        elif isinstance(entry, Section) and entry.make is not None:
            fields[key] = make_section(entry, value)
        elif isinstance(entry, Section):
            fields.update(_fields(entry, value))
    return fields


def _sections(section: Section) -> list[Section]:
    return [entry for entry in section.entries.values() if isinstance(entry, Section)]


def _plain(section: Section, value: Any) -> dict[str, Any]:
    """The settings of a section as YAML has them; what is not set is absent."""
    plain: dict[str, Any] = {}
    for key, entry in section.entries.items():
        if isinstance(entry, Setting):
            item = _get(value, entry)
            if item is not None or entry.kind.none:
                plain[key] = entry.kind.write(item)
        elif isinstance(entry, Section):
            plain[key] = _plain(entry, getattr(value, key) if entry.make is not None else value)
    return plain


def _get(value: Any, setting: Setting) -> Any:
    if isinstance(value, Model) and setting.key == "listen":
        return value.listen, value.listen_port
    return getattr(value, setting.field or setting.key)


def _difference(values: Values, default: Values) -> dict[str, Any]:
    different: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(default.get(key), Mapping):
            if below := _difference(value, default[key]):
                different[key] = below
        elif key not in default or value != default[key]:
            different[key] = value
    return different
