"""`mmdctl logs`, `cat`: journalctl and systemctl with the right arguments, in place of mmdctl."""

import os
from collections.abc import Sequence
from typing import NoReturn

from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError
from mmd.ctl.targets import Target, find, no_such_model, targets
from mmd.load import load
from mmd.names import UnitName
from mmd.scope import ScopeKind

__all__ = ["cat", "logs"]


def logs(context: Context, word: str | None, *, gateway: bool, follow: bool, lines: int | None, since: str | None) -> NoReturn:
    """Becomes journalctl: the log of a model, of the gateway, or of all of mmd, with what systemd says about their units."""
    from mmd.systemd.journal import command  # brings asyncio along

    user = context.scope.kind is ScopeKind.USER
    if gateway:
        argv = ["journalctl", f"--{'user-' if user else ''}unit=mmd-gateway.service"]
    elif word is None:
        argv = command(None, "mmd-*", user=user, own=True)
    else:
        target = _locate(context, word)
        argv = command(target.id, f"mmd-model-{target.id}@*", user=user)
    options = ["--follow"] if follow else []
    options += [f"--lines={lines}"] if lines is not None else []
    options += [f"--since={since}"] if since is not None else []
    if context.terminal.interactive and not options:
        options = ["--pager-end"]  # a person who asks for no more wants the latest
    _become((argv[0], *options, *argv[1:]))


def cat(context: Context, word: str) -> NoReturn:
    """Becomes `systemctl cat` of the model's template, or of the one instance that `word` names, with its own drop-ins."""
    target = _locate(context, word)
    instance = UnitName.parse(word if word.endswith(".service") else f"{word}.service")
    _become((*context.systemctl, "cat", str(instance) if instance else f"mmd-model-{target.id}@.service"))


def _locate(context: Context, word: str) -> Target:
    """The model that `word` names: by the configuration, which needs no gateway, else by the gateway, which knows models that
    run although they were removed."""
    configured = targets(load(context.scope).config.models.values())
    found = find(configured, word)
    if found is not None:
        return found
    try:
        known = targets(context.client.status().models)
    except CtlError:
        if not configured:
            raise
        raise no_such_model(configured, word) from None
    found = find(known, word)
    if found is None:
        raise no_such_model(known, word)
    return found


def _become(command: Sequence[str]) -> NoReturn:
    """Replaces this process by `command`: its pager, its Ctrl-C and its exit status are the person's."""
    try:
        os.execvp(command[0], list(command))  # noqa: S606 - no shell is meant
    except OSError as error:
        raise CtlError(f"cannot run {command[0]}: {error.strerror}") from error
