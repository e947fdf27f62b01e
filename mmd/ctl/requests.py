"""`mmdctl requests`, `cancel`, `events`: what the gateway is doing, and the end of a request."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.table import Cell, Column, table
from mmd.ctl.terminal import Colour, Terminal, printable
from mmd.ctl.words import duration, moment
from mmd.status import RequestStatus

__all__ = ["cancel", "events", "requests"]

_COLUMNS = (
    Column("ID"),
    Column("MODEL", elastic=True),
    Column("STATE"),
    Column("AGE", right=True),
    Column("SENT", right=True, drop=2),
    Column("TOKENS", right=True, drop=3),
    Column("PATH", elastic=True, drop=4),
    Column("CLIENT", drop=5),
    Column("KEY", drop=6),
    Column("CLIENT'S ID", elastic=True, drop=1),
)
_COLOURS = {"waiting": Colour.YELLOW, "answering": Colour.GREEN}

# How long to wait for a gateway that is being replaced or restarted, while events are followed.
_AGAIN_S = 1.0

# Events that are shown before those that come, unless told otherwise; as journalctl(1).
_FOLLOWED = 10


def requests(context: Context, *, as_json: bool) -> Exit:
    """The requests that are not over, the oldest first."""
    found = context.client.requests()
    if as_json:
        print(json.dumps([each.to_json() for each in found], indent=2), flush=True)
    elif found:
        print("\n".join(_lines(found, context.terminal, time.time())), flush=True)
    else:
        print("no requests", flush=True)
    return Exit.OK


def _lines(found: Sequence[RequestStatus], terminal: Terminal, now_s: float) -> list[str]:
    rows = []
    for each in found:
        tokens = "" if each.tokens is None else str(each.tokens)
        sent = str(each.sent_bytes) if each.sent_bytes else ""
        texts = (each.id, each.model, each.state, duration(now_s - each.since), sent, tokens, each.path, each.client, each.key)
        cells = [Cell(printable(text)) for text in (*texts, each.client_id)]
        cells[2] = Cell(each.state, _COLOURS.get(each.state, Colour.PLAIN))
        rows.append(cells)
    return table(_COLUMNS, rows, terminal)


def cancel(context: Context, ids: Sequence[str]) -> Exit:
    """End these requests; FAILED when one of them is not there."""
    code = Exit.OK
    for request in ids:
        try:
            was = context.client.cancel(request)
        except CtlError as error:
            if error.exit_code is Exit.UNREACHABLE:
                raise
            code = Exit.FAILED
            print(f"{request}: {error.message}", flush=True)
        else:
            print(f"{request}: cancelled; it was {was.state}, for {printable(was.model)}", flush=True)
    return code


def events(context: Context, *, follow: bool, lines: int | None, as_json: bool) -> Exit:
    """What has happened of late, and with `follow` what happens, through restarts of the gateway."""
    last: str | None = None
    lines = _FOLLOWED if follow and lines is None else lines
    while True:
        try:
            for event in context.client.events(follow=follow, lines=lines, last=last):
                last = event.id or last
                print(json.dumps(event.data) if as_json else _event(event.data, context.terminal), flush=True)
        except CtlError as error:
            if not (follow and last is not None and error.exit_code is Exit.UNREACHABLE):
                raise
        if not follow:
            return Exit.OK
        time.sleep(_AGAIN_S)


def _event(data: Mapping[str, Any], terminal: Terminal) -> str:
    wrong = data.get("ok") is False or data.get("problems") or data.get("problem") or data["type"] == "missed"
    message = terminal.paint(printable(str(data["message"])), Colour.RED if wrong else Colour.PLAIN)
    return f"{moment(data['time'], time.time())}  {message}"
