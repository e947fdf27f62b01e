"""mmd-journal@.service: reads mmd's lines of the journal for the gateway, which may not read the journal itself.

One request per connection, a line of JSON: `{"model": ID or null, "lines": N, "follow": BOOL, "after": CURSOR}`. The answer is
`{"begun": true}`, a line for each entry (JournalEntry as an object), then `{"end": true}` or `{"error": TEXT}`. A request that
follows finds what is logged after `begun`. The reader ends when its client does.

The gateway may have been taken over: the request is parsed strictly, the command line of journalctl is of this module's making,
and an entry is passed on only if it is of a unit of mmd by fields that cannot be forged (`mmd.systemd.journal`).
"""

import asyncio
import json
import re
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from mmd.errors import MmdError
from mmd.names import is_unit_id
from mmd.systemd.journal import CURSOR_PATTERN, LINES_MAX, JournalEntry, JournalQuery, entries
from mmd.systemd.peer import Peer, read_line, serve_gateway
from mmd.systemd.request import RequestError, parse_object

__all__ = ["main", "parse_query", "served_entries"]

_REQUEST_BYTES: Final = 1024

# The gateway has its request ready when it connects, and takes an answer at once or, if its own client is slow, within minutes.
_REQUEST_LIMIT_S: Final = 10.0
_SEND_LIMIT_S: Final = 600.0

# The longest answer: 48 KiB of a message, which JSON may escape sixfold, and little else.
_ANSWER_BYTES: Final = 1 << 20

_GONE: Final = "the reader of the journal has ended"
_LOOK: Final = "journalctl -t mmd-journal"


def parse_query(line: bytes) -> JournalQuery:
    """The request in one line; RequestError when it is anything else."""
    match parse_object(line, _REQUEST_BYTES):
        case {"model": str() | None as model, "lines": int(lines), "follow": bool(follow), "after": str(after), **rest}:
            known = model is None or is_unit_id(model)
            right = not isinstance(lines, bool) and 0 <= lines <= LINES_MAX
            if not rest and known and right and (not after or re.fullmatch(CURSOR_PATTERN, after)):
                return JournalQuery(model, lines, follow, after)
    raise RequestError("the request is not one for lines of the journal")


async def served_entries(path: Path, query: JournalQuery) -> AsyncGenerator[JournalEntry, None]:
    """The client's side: the entries that a reader behind the socket `path` finds. MmdError, now or later, when it cannot.

    What is logged after this returns is new, to a query that follows.
    """
    asked = {"model": query.model, "lines": query.lines, "follow": query.follow, "after": query.after}
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=_ANSWER_BYTES)
    except OSError as error:
        hint = "systemctl start mmd-journal.socket"
        raise MmdError(f"cannot connect to {path}: {error.strerror or error}", hint=hint) from error
    writer.write(json.dumps(asked).encode() + b"\n")
    try:
        begun = await reader.readline()
    except OSError:
        begun = b""
    if not begun:
        writer.close()
        raise MmdError(_GONE, hint=_LOOK)
    return _answers(reader, writer)


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncGenerator[JournalEntry, None]:
    try:
        while line := await reader.readline():
            match json.loads(line):
                case {"end": True}:
                    return
                case {"error": str(message)}:
                    raise MmdError(message)
                case raw:
                    yield JournalEntry(**raw)
        raise MmdError(_GONE, hint=_LOOK)
    except OSError as error:
        raise MmdError(_GONE, hint=_LOOK) from error
    finally:
        writer.close()


def main() -> int:
    """Answers one request of the gateway; the exit status."""
    return serve_gateway(_answer_one)


def _answer_one(connection: socket.socket, _: Peer) -> int:
    line = read_line(connection, most_bytes=_REQUEST_BYTES, limit_s=_REQUEST_LIMIT_S)
    try:
        if line is None:
            raise RequestError(f"no request within {_REQUEST_LIMIT_S:g} s, or one that is too long")
        query = parse_query(line)
    except RequestError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    return asyncio.run(_serve(connection, query))


async def _serve(connection: socket.socket, query: JournalQuery) -> int:
    reader, writer = await asyncio.open_unix_connection(sock=connection.dup())
    answer = asyncio.ensure_future(_answer(writer, query))
    gone = asyncio.ensure_future(reader.read(1))  # nothing more is to come but the end
    await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not answer.done():
        answer.cancel()
    try:
        return await answer
    except asyncio.CancelledError:
        return 0
    finally:
        writer.close()


async def _answer(writer: asyncio.StreamWriter, query: JournalQuery) -> int:
    async def send(frame: dict[str, Any]) -> None:
        writer.write(json.dumps(frame).encode() + b"\n")
        async with asyncio.timeout(_SEND_LIMIT_S):
            await writer.drain()

    try:
        await send({"begun": True})
        try:
            async with aclosing(entries(query, user=False)) as found:
                async for entry in found:
                    await send(asdict(entry))
        except MmdError as error:
            await send({"error": str(error)})
            return 1
        await send({"end": True})
    except (OSError, TimeoutError):  # the client has gone, or takes nothing
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
