"""`mmdctl add`, `remove`: models come and go while everything else serves, and the configuration's files with them.

Who may write models.d does so; a member of group mmd-admin asks the gateway, which has it done. Either way mmd-reload.path sees
the files, as if an editor had saved them, and what follows is watched.
"""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mmd import registry
from mmd.ctl.client import Operation, Verb
from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.operate import operate
from mmd.ctl.reload import bring_into_use, is_active, unit_states
from mmd.ctl.targets import find, targets
from mmd.ctl.terminal import Colour, LiveLine, printable
from mmd.ctl.words import duration
from mmd.load import load
from mmd.registry import Fault, RegistryError
from mmd.scope import ScopeKind
from mmd.status import ModelState, ModelStatus, Progress, Status

__all__ = ["Addition", "add", "dry_run", "remove"]

_T = TypeVar("_T")

_IN_USE_WITHIN_S = 60.0
"""A reload runs every generator of the machine, and waits for its turn."""
_GLANCE_S = 0.3
_WATCH = "mmd-reload.path"
_RELOAD = "mmd-reload.service"
_GATEWAY_SOCKET = "mmd-gateway.socket"


@dataclass(frozen=True, slots=True)
class Addition:
    """What `mmdctl add` is to do."""

    models: Mapping[str, Any]
    """Settings as in YAML, by name."""
    replace: bool = False
    start: bool = False
    """Make room for them and start them; else they are tried in memory that is free."""
    wait: bool = True
    as_json: bool = False


def dry_run(context: Context, addition: Addition) -> Exit:
    """Says what `add` would write, after all its checks."""
    with _explained():
        found = registry.plan(context.scope, addition.models, replace=addition.replace)
    files = {str(file): text for file, text in found.files.items()}
    print(json.dumps(files, indent=2) if addition.as_json else "\n".join(f"# {file}\n{text}" for file, text in files.items()))
    return Exit.OK


def add(context: Context, addition: Addition) -> Exit:
    """Registers models, waits until they are in use, and until they are tried."""
    teller = _Teller(context, as_json=addition.as_json)
    if _writes(context):
        with _explained():
            found = registry.add(context.scope, addition.models, replace=addition.replace)
        for name, path in zip(found.models, found.files, strict=True):
            teller.say(name, ModelState.PENDING, f"registered in {path}")
        if not addition.wait:
            return Exit.OK
        models = _until_in_use(context, found.models, teller)
    else:
        models, files = context.client.add(addition.models, replace=addition.replace)
        for model, file in zip(models, files, strict=True):
            teller.say(model.name, ModelState.PENDING, f"registered in {file}")
        if not addition.wait:
            return Exit.OK
    _until_open(context, models)
    for model in models:
        if model.state is ModelState.EXTERNAL:
            teller.say(model.name, model.state, "in use: requests go to its own server", done=True)
    started = [model.name for model in models if model.state is not ModelState.EXTERNAL]
    operation = Operation(Verb.START if addition.start else Verb.VERIFY)
    return operate(context, operation, started, everything=False, wait=True, as_json=addition.as_json) if started else Exit.OK


def remove(context: Context, word: str, *, force: bool, wait: bool, as_json: bool) -> Exit:
    """Takes a model out of the configuration, and waits until its units have stopped, after what they answer still."""
    teller, begun_s = _Teller(context, as_json=as_json), time.monotonic()
    if _writes(context):
        target = find(targets(load(context.scope).config.models.values()), word)
        name, unit_id = (target.name, target.id) if target else (word, "")
        with _explained():
            file = registry.remove(context.scope, name)
        teller.say(name, ModelState.STOPPING, f"removed {file}")
        if not wait:
            return Exit.OK
        _until_out_of_use(context, name, teller)
        if force:
            _force(context, name)
    else:
        known = find(targets(_configured(context.client.status())), word)
        name, unit_id = (known.name, known.id) if known else (word, "")
        for gone in context.client.remove(name, force=force):
            teller.say(name, ModelState.STOPPING, f"removed {gone}")
        if not wait:
            return Exit.OK
    _until_stopped(context, name, unit_id, teller)
    teller.say(name, ModelState.STOPPED, f"removed, nothing of it runs ({duration(time.monotonic() - begun_s)})", done=True)
    return Exit.OK


def _writes(context: Context) -> bool:
    """Whether this process may write the configuration itself."""
    return context.scope.kind is ScopeKind.USER or os.geteuid() == 0


@contextmanager
def _explained() -> Iterator[None]:
    """Turns a refusal of the registry into mmdctl's own."""
    try:
        yield
    except RegistryError as error:
        code = Exit.NO_SUCH_MODEL if error.fault is Fault.UNKNOWN else Exit.FAILED
        raise CtlError(error.message, hint=error.hint, exit_code=code) from error


class _Teller:
    """Says how it goes: lines, JSON on request, and on a terminal what goes on in one line that is rewritten."""

    def __init__(self, context: Context, *, as_json: bool) -> None:
        self._terminal = context.terminal
        self._as_json = as_json
        self._line = LiveLine(context.terminal)
        self._said = ""

    def say(self, model: str, state: ModelState, message: str, *, done: bool = False) -> None:
        self._line.clear()
        if self._as_json:
            print(json.dumps(Progress(model, state, message, done=done).to_json()), flush=True)
        else:
            print(f"{self._terminal.paint(model, Colour.GREEN) if done else model}: {printable(message)}", flush=True)

    def going_on(self, model: str, state: ModelState, message: str) -> None:
        """What a person sees change, and a script is told once."""
        if self._terminal.interactive and not self._as_json:
            self._line.show(f"{model}: {printable(message)}")
        elif message != self._said:
            self.say(model, state, message)
        self._said = message

    def clear(self) -> None:
        self._line.clear()


def _configured(status: Status) -> list[ModelStatus]:
    """The models of the gateway's configuration, not what still runs of others."""
    return [model for model in status.models if model.revision]


def _until_in_use(context: Context, wanted: Mapping[str, str], teller: _Teller) -> list[ModelStatus]:
    """The models as the gateway has them, once it has those and systemd their units."""
    _bring_into_use(context)

    def there() -> list[ModelStatus] | None:
        found = {model.name: model for model in _configured(context.client.status())}
        if any(name not in found or found[name].revision != text for name, text in wanted.items()):
            return None
        models = [found[name] for name in wanted]
        units = [f"mmd-model-{model.id}@cpu.service" for model in models if model.state is not ModelState.EXTERNAL]
        return models if all(state == "loaded" for state in unit_states(context, "LoadState", units)) else None

    return _wait(context, there, wanted, teller, "pending: it is being brought into use")


def _until_open(context: Context, models: Iterable[ModelStatus]) -> None:
    """Waits until systemd listens at the models' own ports, which follow when the gateway has the models."""
    sockets = [f"mmd-port-{model.id}.socket" for model in models if model.port]
    if not sockets or not is_active(context, _GATEWAY_SOCKET):
        return
    deadline_s = time.monotonic() + _IN_USE_WITHIN_S
    while True:
        reload, *states = unit_states(context, "ActiveState", [_RELOAD, *sockets])
        pending = reload in ("activating", "deactivating") or "inactive" in states
        if not pending or time.monotonic() > deadline_s:
            break
        time.sleep(_GLANCE_S)
    if closed := [unit for unit, state in zip(sockets, states, strict=True) if state != "active"]:
        hint = shlex.join((*context.systemctl, "status", *closed))
        raise CtlError(f"in use, but nobody listens: {', '.join(closed)}", hint=hint)


def _until_out_of_use(context: Context, name: str, teller: _Teller) -> None:
    _bring_into_use(context)

    def gone() -> bool | None:
        return all(model.name != name for model in _configured(context.client.status())) or None

    _wait(context, gone, [name], teller, "it is being taken out of use")


def _until_stopped(context: Context, name: str, unit_id: str, teller: _Teller) -> None:
    """Waits for the units of a model that is configured no more, however long their requests take."""
    try:
        while left := [m for m in context.client.status().models if not m.revision and (m.name == name or m.id == unit_id)]:
            in_flight = sum(model.in_flight for model in left)
            requests = "request" if in_flight == 1 else "requests"
            words = f"waiting for {in_flight} {requests} to finish" if in_flight else "stopping"
            teller.going_on(name, left[0].state, words)
            time.sleep(_GLANCE_S)
    finally:
        teller.clear()


def _force(context: Context, name: str) -> None:
    """Breaks off what the units of a removed model still answer, if there are any."""
    try:
        context.client.remove(name, force=True)
    except CtlError as error:
        if error.exit_code is not Exit.NO_SUCH_MODEL:
            raise


def _bring_into_use(context: Context) -> None:
    """Where nothing watches the files, does what would follow."""
    if not is_active(context, _WATCH):
        bring_into_use(context, load(context.scope).config)


def _wait(context: Context, done: Callable[[], _T | None], names: Iterable[str], teller: _Teller, words: str) -> _T:
    deadline_s = time.monotonic() + _IN_USE_WITHIN_S
    while (found := done()) is None:
        if problems := load(context.scope).problems:
            message = f"the files are changed, but the configuration has problems meanwhile: {problems[0]}"
            raise CtlError(message, hint=context.command("check"))
        if time.monotonic() > deadline_s:
            hint = "journalctl -u mmd-reload.service tells why"
            raise CtlError("the files are changed, but mmd-gateway does not have them in use yet", hint=hint)
        for name in names:
            teller.going_on(name, ModelState.PENDING, words)
        time.sleep(_GLANCE_S)
    teller.clear()
    return found
