"""`mmdctl logs`, `cat`: journalctl and systemctl with the right arguments, mostly in place of mmdctl."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.targets import Target, find, no_such_model, targets
from mmd.ctl.terminal import printable
from mmd.errors import MmdError
from mmd.load import load
from mmd.names import UnitName
from mmd.scope import ScopeKind

if TYPE_CHECKING:
    from mmd.systemd.journal import JournalQuery

__all__ = ["cat", "logs"]

_LINES_BEFORE: Final = 10
"""How many lines of the past are shown before new ones are followed, as by journalctl(1)."""


def logs(context: Context, word: str | None, *, gateway: bool, follow: bool, lines: int | None, since: str | None) -> Exit:
    """The log of a model, of the gateway, or of all of mmd, with what systemd says about their units.

    It becomes journalctl, but where units of models are followed: those that start later have no match (`mmd.systemd.journal`).
    """
    from mmd.systemd.journal import JournalQuery, command  # brings asyncio along

    user = context.scope.kind is ScopeKind.USER
    if gateway:
        argv = ["journalctl", f"--{'user-' if user else ''}unit=mmd-gateway.service", *(["--follow"] if follow else [])]
        argv += [f"--lines={lines}"] if lines is not None else []
        argv += [f"--since={since}"] if since is not None else []
    else:
        model = None if word is None else _locate(context, word).id
        if follow and lines is None and since is None:
            lines = _LINES_BEFORE
        query = JournalQuery(model, lines, follow, since=since or "")
        if follow:
            return _follow(query, user=user)
        argv = command(query, user=user)
    if context.terminal.interactive and not (follow or lines is not None or since is not None):
        argv.insert(1, "--pager-end")  # a person who asks for no more wants the latest
    return _become(argv)


def _follow(query: "JournalQuery", *, user: bool) -> Exit:
    """Prints entries as they come, as journalctl does by default, until Ctrl-C."""
    import asyncio
    from contextlib import aclosing

    from mmd.systemd.journal import entries

    async def follow() -> None:
        async with aclosing(entries(query, user=user)) as found:
            async for entry in found:
                stamp = time.strftime("%b %d %H:%M:%S", time.localtime(entry.time))
                for line in entry.message.splitlines():
                    print(f"{stamp} {printable(entry.identifier)}[{entry.pid}]: {printable(line)}", flush=True)

    try:
        asyncio.run(follow())
    except MmdError as error:
        raise CtlError(error.message, hint=error.hint) from error
    return Exit.OK


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
