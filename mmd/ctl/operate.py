"""`mmdctl start`, `stop`, `restart`, `sleep`, `wake`, `reset`, `pin`, `unpin`: operations on models, and how they go."""

import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mmd.ctl.client import Client, Operation, Verb
from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.targets import select, targets
from mmd.ctl.terminal import Colour, LiveLine, printable
from mmd.ctl.words import duration
from mmd.status import ModelState, ModelStatus, Progress, Status

__all__ = ["operate"]

_REDRAW_INTERVAL_S = 1.0
_QUIET_LIMIT_S = 30.0
"""After so long without a word about any model the gateway is asked whether it still answers."""
_ALL = {
    Verb.STOP: frozenset(ModelState) - {ModelState.PENDING, ModelState.STOPPED, ModelState.STOPPING, ModelState.EXTERNAL},
    Verb.SLEEP: frozenset({ModelState.READY, ModelState.DRAINING}),
}
"""The states of the models that `--all` means."""


@dataclass(frozen=True, slots=True)
class _Event:
    """What a thread hears of its model: how it goes, or that the answer never came or broke off."""

    model: str
    outcome: Progress | CtlError


_Events: TypeAlias = "queue.SimpleQueue[_Event]"


def operate(
    context: Context, operation: Operation, words: Sequence[str], *, everything: bool, wait: bool, as_json: bool
) -> Exit:
    """Does `operation` to the models that `words` mean, all at once, and tells how it goes until all are done."""
    found = context.client.status()
    models = _everything(found, operation.verb) if everything else [each.name for each in select(targets(found.models), words)]
    if not models:
        print(f"nothing to {operation.verb}", file=sys.stderr)
        return Exit.OK
    events: _Events = queue.SimpleQueue()
    for model in models:
        # Daemons: a thread that waits for a model to load must not keep mmdctl from ending on Ctrl-C.
        threading.Thread(target=_follow, args=(context.client, model, operation, events), daemon=True).start()
    watch = _Watch(context, operation, models, wait=wait, as_json=as_json)
    try:
        watch.run(events)
    except KeyboardInterrupt:
        watch.leave()
        return Exit.INTERRUPTED
    return watch.exit_code


def _everything(found: Status, verb: Verb) -> list[str]:
    def meant(model: ModelStatus) -> bool:
        return any(instance.state in _ALL[verb] for instance in model.instances) or model.state in _ALL[verb]

    return [model.name for model in found.models if meant(model)]


def _follow(client: Client, model: str, operation: Operation, events: _Events) -> None:
    """Thread: begins the operation on one model and passes on what the gateway says."""
    try:
        for progress in client.operate(model, operation):
            events.put(_Event(model, progress))
    except CtlError as error:
        events.put(_Event(model, error))


class _Watch:
    """Shows several operations: a line that is rewritten on a terminal, plain lines elsewhere, NDJSON on request."""

    def __init__(self, context: Context, operation: Operation, models: Sequence[str], *, wait: bool, as_json: bool) -> None:
        self.exit_code = Exit.OK
        self._context = context
        self._operation = operation
        self._wait = wait
        self._as_json = as_json
        self._said = dict.fromkeys(models, "")  # by model, of those that are not done
        self._line = LiveLine(context.terminal)
        self._begun_s = time.monotonic()

    def run(self, events: _Events) -> None:
        """Shows what comes until no model is left."""
        heard_s = self._begun_s
        while self._said:
            try:
                event = events.get(timeout=_REDRAW_INTERVAL_S)
            except queue.Empty:
                if time.monotonic() - heard_s > _QUIET_LIMIT_S:
                    self._context.client.status()  # raises when the gateway does not answer any more
                    heard_s = time.monotonic()
            else:
                heard_s = time.monotonic()
                self._take(event.model, event.outcome)
            self._redraw()

    def leave(self) -> None:
        """Says what goes on without being watched."""
        self._line.clear()
        names = ", ".join(self._said)
        print(f"stopped watching; the {self._operation.verb} of {names} goes on:", file=sys.stderr)
        print(f"  {self._context.command('status', *self._said)}", file=sys.stderr)

    def _take(self, model: str, outcome: Progress | CtlError) -> None:
        if model not in self._said:  # left to itself, yet its thread still listens
            return
        if isinstance(outcome, CtlError):
            message, *tail = outcome.message.splitlines()
            self._fail(model, message, outcome.exit_code, tail=tail, hint=outcome.hint)
            return
        if self._as_json:
            self._print(json.dumps(outcome.to_json()))
        if outcome.done and not outcome.ok:
            self._fail(model, outcome.message, Exit.FAILED, tail=outcome.tail, hint=self._context.command("logs", model))
        elif outcome.done or not self._wait:
            self._finish(model, printable(outcome.message))
        else:
            self._tell(model, printable(outcome.message))

    def _tell(self, model: str, message: str) -> None:
        news = message != self._said[model]
        self._said[model] = message
        if news and not (self._as_json or self._context.terminal.interactive):
            self._print(f"{model}: {message}")

    def _finish(self, model: str, message: str) -> None:
        del self._said[model]
        if not self._as_json:
            self._print(f"{self._context.terminal.paint(model, Colour.GREEN)}: {message}")

    def _fail(self, model: str, message: str, code: Exit, *, tail: Sequence[str] = (), hint: str = "") -> None:
        del self._said[model]
        self.exit_code = max(self.exit_code, code)
        self._line.clear()
        lines = [f"{model}: {message}", *(f"  | {line}" for line in tail), *([f"  {hint}"] if hint else [])]
        print("\n".join(map(printable, lines)), file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self._line.clear()
        print(text, flush=True)

    def _redraw(self) -> None:
        if self._as_json or not self._said:
            return
        going_on = ", ".join(f"{model}: {message or self._operation.verb}" for model, message in self._said.items())
        self._line.show(f"{going_on} ({duration(time.monotonic() - self._begun_s)})")
