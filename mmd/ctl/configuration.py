"""`mmdctl check`, `config`: the configuration as mmd reads it. No gateway is needed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmd.build import render
from mmd.config import Config
from mmd.ctl.context import Context
from mmd.ctl.exits import Exit
from mmd.errors import MmdError
from mmd.keys import KEYS_FILE, KeyRing
from mmd.load import Loaded, load, load_files, read_bounded
from mmd.problem import Problem
from mmd.schema import validate
from mmd.scope import Scope
from mmd.secrecy import hide_secrets
from mmd.units import render_units
from mmd.yamlfile import parse

__all__ = ["check", "config", "read"]


def check(context: Context, path: Path | None, *, quiet: bool, as_json: bool) -> Exit:
    """Prints what is wrong with the installed configuration, or with the file or directory `path`; FAILED when something is."""
    loaded = read(context.scope, path)
    problems = loaded.problems
    keys_asked_for = _keys_asked_for(context.scope)
    warnings = loaded.warnings_where(keys_asked_for=keys_asked_for is True)
    if as_json:
        counts = {"models": len(loaded.config.models), "gpus": len(loaded.config.gpus.devices)}
        print(json.dumps({"ok": not problems, **counts, "problems": _plain(problems), "warnings": _plain(warnings)}, indent=2))
    elif problems:
        print("\n".join(map(str, problems)))
    elif not quiet:
        print(_summary(loaded.config))
    if not as_json and not quiet:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if loaded.open_without_keys and keys_asked_for is None:
            print("warning: whether there are API keys can only root see: sudo mmdctl check", file=sys.stderr)
    return Exit.FAILED if problems else Exit.OK


def _plain(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [{**problem._asdict(), "file": str(problem.file)} for problem in problems]


def _keys_asked_for(scope: Scope) -> bool | None:
    """Whether the gateway asks for API keys; None when the file cannot be read, and nothing is known of it."""
    try:
        return KeyRing.parse(read_bounded(scope.config_dir / KEYS_FILE)).required
    except FileNotFoundError:
        return False
    except OSError:
        return None
    except MmdError:
        return True  # the gateway refuses everybody then


def config(context: Context, *, as_json: bool) -> Exit:
    """Prints the configuration in effect, without values of `env` that look secret, and on standard error what is left out
    because it is wrong."""
    loaded = read(context.scope)
    models = {name: model._replace(env=hide_secrets(model.env)) for name, model in loaded.config.models.items()}
    text = render(loaded.config._replace(models=models))
    print(json.dumps(parse(text, context.scope.config_file).value, indent=2) if as_json else text.rstrip("\n"))
    if loaded.problems:
        print("\n".join(map(str, loaded.problems)), file=sys.stderr)
    return Exit.FAILED if loaded.problems else Exit.OK


def read(scope: Scope, path: Path | None = None) -> Loaded:
    """The installed configuration, or the one in `path`, with all that the loader and the unit generator find wrong with it.

    `path` is a directory such as /etc/mmd, or one file. A drop-in is read with the files that it adds to, since its models may
    use their profiles, but only its own problems count.
    """
    if path is None or path.is_dir():
        scope = scope if path is None else scope._replace(config_dir=path)
        drop_ins = sorted(file for file in (scope.config_dir / "models.d").glob("*.yaml") if not file.name.startswith("."))
        return _examine(load(scope), scope, [scope.config_file, *drop_ins])
    if path.parent.name == "models.d" and (path.parent.parent / scope.config_file.name).exists():
        whole = read(scope, path.parent.parent)
        return whole._replace(problems=tuple(each for each in whole.problems if each.file == path))
    try:
        loaded = load_files([(path, read_bounded(path))], scope=scope)
    except OSError as error:
        return Loaded(Config(), (Problem(path, 0, "", f"cannot be read: {error.strerror}"),))
    return _examine(loaded, scope, [path])


def _examine(loaded: Loaded, scope: Scope, files: Sequence[Path]) -> Loaded:
    """With the models added whose units cannot be made; and if the loader has no objection at all, with jsonschema's."""
    units = render_units(loaded.config, scope=scope, bin_dir=str(Path(sys.executable).parent))
    by_schema = () if loaded.problems else (each for file in files for each in validate(parse(read_bounded(file), file)))
    return loaded._replace(problems=(*loaded.problems, *units.problems, *by_schema))


def _summary(config: Config) -> str:
    models, gpus = len(config.models), len(config.gpus.devices)
    found = f"{gpus} GPU{'' if gpus == 1 else 's'}" if gpus else f"GPUs: {config.gpus.provider}"
    return f"ok: {models} model{'' if models == 1 else 's'}, {found}"
