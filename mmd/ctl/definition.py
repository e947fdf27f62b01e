"""A model's definition as the options of `mmdctl add` say it. They are made from the table of settings."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmd.build import merge
from mmd.ctl.exits import CtlError, Exit
from mmd.kinds import BOOLEAN, BadValueError, Kind
from mmd.model_settings import MODEL, ROOT_ONLY
from mmd.setting import Setting
from mmd.yamlfile import parse

__all__ = ["add_options", "definitions", "with_options"]

_DEST = "setting_{}"
_LISTS = {"alias": "aliases", "arg": "args"}
"""Options that add to a list, one item each time."""


def add_options(command: argparse.ArgumentParser) -> None:
    """An option for each key with a single value, and what says the others."""
    group = command.add_argument_group("definition", "Keys of a model, see mmd.yaml(5).")
    for setting in _scalars():
        option, dest, words = f"--{_word(setting.key)}", _DEST.format(setting.key), setting.doc.replace("%", "%%")
        if setting.kind is BOOLEAN:
            group.add_argument(option, action=argparse.BooleanOptionalAction, dest=dest, help=words)
        else:
            group.add_argument(option, metavar=setting.key.upper(), dest=dest, help=words)
    group.add_argument("--alias", metavar="NAME", action="append", help="one of aliases; may be repeated")
    group.add_argument("--arg", metavar="WORD", action="append", help="one of args: --arg=--enforce-eager; may be repeated")
    group.add_argument("--env", metavar="VARIABLE=VALUE", action="append", help="one of env; may be repeated")
    words = "any key, with dots for the levels, and its value in YAML: --set idle.stop_after=30min; may be repeated"
    group.add_argument("--set", metavar="KEY=YAML", action="append", help=words)


def definitions(name: str | None, source: Path | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The models that a command line defines: settings as in YAML, by name. `source` - is standard input."""
    own = dict(_settings(arguments))
    if name is not None:
        below = {} if source is None else _read(source)
        return {name: merge(below, own)}
    if source is None:
        raise CtlError("name a model, or give --from", hint="mmdctl add --help", exit_code=Exit.USAGE)
    if own:
        raise CtlError("options that define need a NAME: there may be several models in --from", exit_code=Exit.USAGE)
    found = _read(source)
    models = found["models"] if set(found) == {"models"} else found
    if not isinstance(models, dict):
        raise CtlError(f"{source}: it must be a mapping of names", hint="write NAME: and its settings under that")
    return models


def with_options(message: str, name: str | None, arguments: argparse.Namespace) -> str:
    """A complaint about the keys of a model, with the options that gave them."""
    for key, _ in _settings(arguments) if name is not None else ():
        option = next((short for short, long in _LISTS.items() if long == key), None) or _word(key)
        given = vars(arguments).get(option, vars(arguments).get(_DEST.format(key)))
        shown = f"--{option}" if given is not None else "--set"
        message = message.replace(f"models.{name}.{key}", f"{shown}: models.{name}.{key}")
    return message


def _scalars() -> Iterator[Setting]:
    for entry in MODEL.entries.values():
        if (
            isinstance(entry, Setting)
            and entry.key not in ROOT_ONLY
            and entry.kind.schema.get("type") not in ("array", ["object", "null"])
        ):
            yield entry


def _word(key: str) -> str:
    return key.replace("_", "-")


def _settings(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What the options say, by the key at the top."""
    said = vars(arguments)
    found: dict[str, Any] = {}
    for setting in _scalars():
        value = said[_DEST.format(setting.key)]
        if value is not None:
            found[setting.key] = _value(setting.kind, value) if isinstance(value, str) else value
    for option, key in _LISTS.items():
        if said[option]:
            found[key] = said[option]
    if said["env"]:
        found["env"] = dict(_pair(text, "--env") for text in said["env"])
    for text in said["set"] or ():
        path, written = _pair(text, "--set")
        key, *below = path.split(".")
        value = _yaml(written, f"--set {path}=")
        for part in reversed(below):
            value = {part: value}
        found = merge(found, {key: value})
    yield from found.items()


def _pair(text: str, option: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise CtlError(f"{option} {text}: there is no '='", hint=f"{option} KEY=VALUE", exit_code=Exit.USAGE)
    return key, value


def _value(kind: Kind, text: str) -> Any:
    """The word of a command line as this kind of value: as it is where that is one, else as YAML has it (a number, a list)."""
    try:
        kind.read(text)
    except BadValueError:
        return _yaml(text, "")
    return text


def _yaml(text: str, option: str) -> Any:
    document = parse(text, Path("-"))
    if document.problems:
        raise CtlError(f"{option}{text}: {document.problems[0][1].message}", exit_code=Exit.USAGE)
    return document.value


def _read(source: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
    except OSError as error:
        raise CtlError(f"{source} cannot be read: {error.strerror}") from error
    document = parse(text, source)
    if document.problems:
        raise CtlError("\n".join(str(problem) for _, problem in document.problems))
    if not isinstance(document.value, dict):
        raise CtlError(f"{source}: it must be a mapping", hint="write KEY: VALUE lines")
    return document.value
