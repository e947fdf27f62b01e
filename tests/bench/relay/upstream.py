"""An engine for the benchmark: streams of events at a steady rate, and one large answer. `upstream.py SOCKET`

Run inside the testbed as a `command` engine. A chat request with `stream` gets `max_tokens` events, 50 a second, each of which
tells when it was written (CLOCK_MONOTONIC, the same for all processes); one without gets `max_tokens` bytes.
"""

import asyncio
import contextlib
import json
import re
import sys
import time
from typing import Any, cast

import uvloop

_RATE = 50
_TICK_S = 0.001
_SLOTS = round(1 / _RATE / _TICK_S)
_PIECE = b"x" * (64 << 10)
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"streams","choices":[{"index":0,"delta":'
    b'{"content":" word"},"logprobs":null,"finish_reason":null}],"t":%d}\n\n'
)


class Client(asyncio.Protocol):
    """One connection of the gateway, or of the sink."""

    slots: tuple[dict["Client", int], ...] = tuple({} for _ in range(_SLOTS))
    """Streams by when in a period of the rate it is their turn; events that are left."""
    next_slot = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.held = b""
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_lost(self, _: Exception | None) -> None:
        for slot in self.slots:
            slot.pop(self, None)
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self.held += data
        head, found, body = self.held.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"content-length: *(\d+)", head.lower())
        size = int(length[1]) if length else 0
        if len(body) < size:
            return
        self.held = body[size:]
        if size == 0:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            if b"connection: close" in head.lower():  # the runner's check of our health
                self.transport.close()
        else:
            self.answer(json.loads(body[:size]))

    def answer(self, request: dict[str, Any]) -> None:
        if request.get("stream"):
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.transport.write(head)
            Client.next_slot = (Client.next_slot + 1) % _SLOTS
            self.slots[self.next_slot][self] = request["max_tokens"]
        else:
            self.large = asyncio.create_task(self.send(request["max_tokens"]))

    async def send(self, size: int) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for start in range(0, size, len(_PIECE)):
            await self.writable.wait()
            if self.transport.is_closing():
                return
            self.transport.write(_PIECE[: size - start])


async def tick() -> None:
    """Write an event to every stream of each slot whose turn has come."""
    begun = time.monotonic()
    turn = 0
    while True:
        slot = Client.slots[turn % _SLOTS]
        event = _EVENT % time.monotonic_ns()
        piece = b"%x\r\n%b\r\n" % (len(event), event)
        for client, left in list(slot.items()):
            client.transport.write(piece)
            slot[client] = left - 1
            if left == 1:
                del slot[client]
                done = b"data: [DONE]\n\n"
                client.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))
        turn += 1
        await asyncio.sleep(max(0.0, begun + turn * _TICK_S - time.monotonic()))


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with await loop.create_unix_server(Client, sys.argv[1], backlog=4096):
        with contextlib.suppress(asyncio.CancelledError):
            await tick()


uvloop.run(main())
