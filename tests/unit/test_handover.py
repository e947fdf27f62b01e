"""What two gateways say to each other while one relieves the other."""

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import uvloop

from mmd.gateway.channel import Channel
from mmd.gateway.handover import Client, KeysTaken, Predecessor, Prepared, Successor, Taken, UnitTaken, _FromSuccessor
from mmd.gateway.relay.head import RequestParser
from mmd.systemd.activation import ListenSocket


class Note(msgspec.Struct, frozen=True, tag=True):
    text: str


class Strange(msgspec.Struct, frozen=True, tag=True):
    text: str


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not within 5 s")


class Ear:
    """A channel's end, and what it heard."""

    def __init__(self, end: socket.socket) -> None:
        self.heard: list[tuple[object, list[int]]] = []
        self.ended = 0
        self.channel = Channel(end, Note, lambda message, fds: self.heard.append((message, fds)), self._end)

    def _end(self) -> None:
        self.ended += 1


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    uvloop.run(main())


def test_messages_arrive_in_order_with_their_descriptors_however_slow_the_other_is() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        sender, count = Ear(ours), 3000
        for number in range(count):  # more than a socket's buffer holds
            sender.channel.send(Note(f"{number} " + "x" * 500), *((os.memfd_create("test"),) if number % 100 == 0 else ()))
        await asyncio.sleep(0.05)
        ear = Ear(theirs)
        await until(lambda: len(ear.heard) == count)
        texts = [message.text.split()[0] for message, _ in ear.heard if isinstance(message, Note)]
        assert texts == [str(number) for number in range(count)]
        assert [bool(fds) for _, fds in ear.heard] == [number % 100 == 0 for number in range(count)]
        for _, fds in ear.heard:
            for fd in fds:
                os.close(fd)
        ear.channel.close()
        await until(lambda: sender.ended == 1)
        sender.channel.send(Note("to nobody"))
        assert not ear.ended, "it has ended of its own will"

    run(scenario)


def test_what_another_version_says_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        sender, ear = Ear(ours), Ear(theirs)
        sender.channel.send(Strange("?"), os.memfd_create("test"))
        sender.channel.send(Note("!"))
        await until(lambda: ear.heard)
        assert [message for message, _ in ear.heard] == [Note("!")]
        sender.channel.close()
        ear.channel.close()

    run(scenario)
    assert "is not understood" in caplog.text


def test_a_detached_end_keeps_what_was_not_read() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        sender, first = Ear(ours), Ear(theirs)
        end = first.channel.detach()
        sender.channel.send(Note("later"))
        second = Ear(end)
        await until(lambda: second.heard)
        assert not first.heard
        sender.channel.close()
        await until(lambda: second.ended)

    run(scenario)


def test_a_client_goes_over_with_what_was_read_of_it() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        successor = Successor(lambda: None)
        successor._channel = Ear(ours).channel
        predecessor = Predecessor(theirs)
        clients: list[tuple[Client, socket.socket, bytes]] = []
        keys_in_use: list[tuple[str, int]] = []
        predecessor.on_key = lambda _, key, count: keys_in_use.append((key, count))
        predecessor.on_client = lambda client, connection, read: clients.append((client, connection, read))
        peers = [socket.socketpair() for _ in range(2)]
        keys = KeysTaken("#" * (1 << 17), ("a problem",), {"ci": 12.5})
        successor.take({"unit": UnitTaken(level=1, in_flight=2, idle_s=None)}, keys)
        successor.count_key("ci", 2)
        successor.give(Client("mmd-api"), os.dup(peers[0][0].fileno()), b"")
        successor.give(Client("mmd-api", chunked=True), os.dup(peers[1][0].fileno()), b"x" * (1 << 20))
        await until(lambda: len(clients) == 2)
        assert await predecessor.taken == Taken({"unit": UnitTaken(1, 2, None)})
        assert predecessor.keys == keys
        assert keys_in_use == [("ci", 2)]
        assert [(client, len(read)) for client, _, read in clients] == [
            (Client("mmd-api"), 0),
            (Client("mmd-api", chunked=True), 1 << 20),
        ]
        for (ours_here, there), (_, connection, _) in zip(peers, clients, strict=True):
            connection.sendall(b"hello")
            assert there.recv(5) == b"hello"
            for each in (ours_here, there, connection):
                each.close()
        predecessor.close()
        successor.dismiss()

    run(scenario)


def test_a_relieved_gateway_hears_of_other_keys_and_one_that_knows_no_such_message_leaves_it_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        successor = Successor(lambda: None)
        successor._channel = Channel(ours, _FromSuccessor, successor._hear, successor._ended)
        heard: list[str] = []
        successor.on_keys = heard.append
        predecessor = Predecessor(theirs)
        predecessor.change_keys("serial: 8")
        predecessor.change_keys("#" * (1 << 20))
        await until(lambda: len(heard) == 2)
        assert heard == ["serial: 8", "#" * (1 << 20)]
        again = Predecessor(predecessor.detach())
        again.change_keys("serial: 9")
        await until(lambda: heard[2:] == ["serial: 9"])
        again.close()
        successor.dismiss()

        ours, theirs = pair()
        prepared: list[object] = []
        old = Channel(ours, Prepared, lambda message, _: prepared.append(message), lambda: None)  # as 0.1.0 listens
        predecessor = Predecessor(theirs)
        predecessor.change_keys("serial: 8")
        predecessor.prepared()
        await until(lambda: prepared)
        assert (prepared, old.open) == ([Prepared()], True)
        old.close()
        predecessor.close()

    run(scenario)
    assert caplog.text.count("is not understood") == 1


_FRESH = """
import asyncio, socket, sys
from mmd.gateway.handover import Predecessor

async def main():
    predecessor = Predecessor(socket.socket(fileno=int(sys.argv[2])))
    found = await predecessor.sockets
    assert [(each.name, each.socket.family) for each in found] == [(f"mmd-port-{n}", socket.AF_UNIX) for n in range(150)]
    predecessor.prepared()
    await asyncio.sleep(0.1)

asyncio.run(main())
"""


def test_more_sockets_than_a_message_has_room_for() -> None:
    async def scenario() -> None:
        gone = asyncio.Event()
        with socket.socket(socket.AF_UNIX) as listening:
            sockets = [ListenSocket(f"mmd-port-{number}", listening) for number in range(150)]
            await Successor(gone.set).start((sys.executable, "-c", _FRESH), sockets)
        await gone.wait()

    run(scenario)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/embeddings?x=1 HTTP/1.1\r\nHost: a:80\r\nAuthorization: k\r\nX: 1\r\nX: 2\r\nContent-Length: 7\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 7\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.0\r\nContent-Length: 7\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 7\r\n\r\n",
    ],
)
def test_a_head_that_is_written_again_says_the_same(head: bytes) -> None:
    def parse(data: bytes) -> RequestParser:
        parser = RequestParser()
        assert parser.parse(data) == len(data)
        return parser

    first = parse(head).head
    again = parse(first.written(7, b"")).head
    for name in ("method", "target", "version", "host", "fields", "keep_alive", "length", "chunked"):
        assert getattr(again, name) == getattr(first, name), name
