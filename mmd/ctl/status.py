"""`mmdctl status`, `list`, `show`, `version`: what the gateway says."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from mmd import __version__
from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.targets import find, no_such_model, select, targets
from mmd.ctl.view import catalogue, details, overview
from mmd.errors import MmdError
from mmd.status import ModelStatus, Status

__all__ = ["list_models", "show", "status", "version"]

_WATCH_INTERVAL_S = 1.0
_CATALOGUE_KEYS = ("name", "id", "engine", "aliases", "description", "gpus", "vram_bytes", "pinned")


def status(context: Context, words: Sequence[str], *, as_json: bool, watch: bool) -> Exit:
    """The gateway, its GPUs and its models; with `watch` again every second, through restarts of the gateway."""
    if not watch:
        found = _restrict(context.client.status(), words)
        _say(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(overview(context, found, time.time())))
        return Exit.OK
    while True:
        try:
            found = _restrict(context.client.status(), words)
            text = json.dumps(found.to_json()) if as_json else "\n".join(overview(context, found, time.time()))
        except CtlError as error:
            if error.exit_code is not Exit.UNREACHABLE:
                raise
            text = "" if as_json else str(error)
        if text:
            _say(text if as_json else context.terminal.clear() + text)
        time.sleep(_WATCH_INTERVAL_S)


def list_models(context: Context, words: Sequence[str], *, as_json: bool, quiet: bool) -> Exit:
    """The models as configured; `quiet`: names only, one per line."""
    models = _restrict(context.client.status(), words).models
    if as_json:
        _say(json.dumps([_entry(model) for model in models], indent=2))
    elif quiet:
        _say("\n".join(model.name for model in models))
    else:
        _say("\n".join(catalogue(models, context.terminal)))
    return Exit.OK


def show(context: Context, word: str, *, as_json: bool) -> Exit:
    """All that is known of one model."""
    found = context.client.status()
    known = targets(found.models)
    target = find(known, word)
    if target is None:
        raise no_such_model(known, word)
    model = next(model for model in found.models if model.name == target.name)
    _say(json.dumps(asdict(model), indent=2) if as_json else "\n".join(details(model, context.terminal, time.time())))
    return Exit.OK


def version(context: Context, *, as_json: bool) -> Exit:
    """The versions of mmdctl and of the gateway that runs, if one does."""
    try:
        running = context.client.status().gateway.version
    except MmdError:
        running = None
    if as_json:
        _say(json.dumps({"mmdctl": __version__, "mmd_gateway": running}))
    else:
        _say(f"mmdctl {__version__}\nmmd-gateway {running or 'cannot be reached'}")
    return Exit.OK


def _restrict(found: Status, words: Sequence[str]) -> Status:
    if not words:
        return found
    wanted = {target.name for target in select(targets(found.models), words)}
    return replace(found, models=tuple(model for model in found.models if model.name in wanted))


def _entry(model: ModelStatus) -> dict[str, object]:
    known = asdict(model)
    return {key: known[key] for key in _CATALOGUE_KEYS}


def _say(text: str) -> None:
    print(text, flush=True)  # flushed: a watcher's pipe must not lag behind
