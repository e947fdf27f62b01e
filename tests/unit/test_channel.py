"""Messages between processes of the gateway: none is lost for its size or its text, and no client waits for one."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_gateway import Script, chat_bytes, gateway, relay, run, until

from mmd.config import EngineKind, Model
from mmd.gateway import handover
from mmd.gateway.api_error import ApiError
from mmd.gateway.channel import Channel, connection_of, from_memory, in_memory, turn_away
from mmd.gateway.workers import messages
from mmd.gateway.workers.messages import Refused, ToDecider, ToWorker
from mmd.policy.actions import Refusal, Refuse

_LONG = 200 << 10
_EVERY = {
    *((each, ToWorker) for each in get_args(ToWorker)),
    *((each, ToDecider) for each in get_args(ToDecider)),
    *((each, handover._ToSuccessor) for each in get_args(handover._ToSuccessor)),
}


@asynccontextmanager
async def pair(union: Any) -> AsyncIterator[tuple[Channel, list[tuple[Any, list[int]]], Channel]]:
    """Two ends, and what has come at the second."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    heard: list[tuple[Any, list[int]]] = []

    def on_end() -> None:
        heard.append((None, []))

    sender = Channel(here, union, lambda *_: None, lambda: None)
    receiver = Channel(there, union, lambda message, fds: heard.append((message, fds)), on_end)
    try:
        yield sender, heard, receiver
    finally:
        sender.close()
        receiver.close()


def filled(kind: Any, text: str) -> Any:
    """A value of a type, with `text` wherever there may be text."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is str:
        return text
    if kind in (int, float, bool, type(None)):
        return kind(1) if kind is not type(None) else None
    if origin is dict:
        return {filled(arguments[0], text): filled(arguments[1], text)}
    if origin in (tuple, list):
        return origin(filled(arguments[0], text) for _ in range(3))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return made(kind, text)
    return filled(next(each for each in arguments if each is not type(None)), text)


def made(kind: Any, text: str) -> Any:
    return kind(**{name: filled(hint, text) for name, hint in get_type_hints(kind).items()})


@pytest.mark.parametrize(("kind", "union"), sorted(_EVERY, key=str), ids=lambda value: getattr(value, "__name__", ""))
def test_every_message_arrives_however_long_its_text(kind: Any, union: Any) -> None:
    async def check() -> None:
        async with pair(union) as (sender, heard, _):
            message, after = made(kind, "x" * _LONG), made(kind, "after")
            memory = in_memory(b"with it")
            sender.send(message, memory)
            sender.send(after)
            await until(lambda: len(heard) == 2)
            assert [each for each, _ in heard] == [message, after]
            assert [from_memory(fd) for fd in heard[0][1]] == [b"with it"]
            assert heard[1][1] == []

    run(check())


@pytest.mark.parametrize(("kind", "union"), sorted(_EVERY, key=str), ids=lambda value: getattr(value, "__name__", ""))
def test_text_that_is_none_in_utf_8_arrives_as_well(kind: Any, union: Any) -> None:
    async def check() -> None:
        async with pair(union) as (sender, heard, _):
            sender.send(made(kind, "a\ud800b"))
            await until(lambda: heard)
            assert heard[0][0] == made(kind, "a?b")

    run(check())


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 3)), min_size=1, max_size=8))
def test_messages_keep_their_order_and_their_descriptors(sizes: list[tuple[int, int]]) -> None:
    async def check() -> None:
        async with pair(ToWorker) as (sender, heard, _):
            for number, (size, count) in enumerate(sizes):
                refused = Refused(number, 503, "x" * size, "c", None, None, ())
                sender.send(refused, *(in_memory(b"%d" % index) for index in range(count)))
            await until(lambda: len(heard) == len(sizes))
            for number, (size, count) in enumerate(sizes):
                message, fds = heard[number]
                assert (message.number, len(message.message)) == (number, size)
                assert [from_memory(fd) for fd in fds] == [b"%d" % index for index in range(count)]

    run(check())


def test_more_descriptors_than_a_message_can_have_are_an_error() -> None:
    async def check() -> None:
        async with pair(ToWorker) as (sender, heard, _):
            sender.send(messages.Begin(), *(os.dup(0) for _ in range(253)))
            await until(lambda: heard)
            assert len(heard[0][1]) == 253
            for fd in heard[0][1]:
                os.close(fd)
            with pytest.raises(ValueError, match="descriptors"):
                sender.send(messages.Begin(), *(os.dup(0) for _ in range(254)))

    run(check())


def test_a_message_without_end_takes_no_memory_without_end() -> None:
    async def check() -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        heard: list[Any] = []
        receiver = Channel(there, ToWorker, lambda message, _: heard.append(message), lambda: None)
        with here:
            here.setblocking(False)
            loop = asyncio.get_running_loop()
            for _ in range(700):
                await loop.sock_sendall(here, b"+" + b"x" * 32768)
            assert sum(map(len, receiver._parts)) <= 17 << 20
            await loop.sock_sendall(here, b'={"type":"Leave"}')
            await loop.sock_sendall(here, b'{"type":"Leave"}')
            await until(lambda: heard)
            assert heard == [messages.Leave()], "the next one is understood"
        receiver.close()

    run(check())


def test_a_connection_that_cannot_be_handed_over_is_told_so() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        turn_away(theirs.detach())
        answer = ours.recv(4096)
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in head
        assert b"Content-Length: %d" % len(content) in head
        assert json.loads(content)["error"]["code"] == "too_many_connections"
        assert ours.recv(1) == b""


def test_a_connection_moves_with_what_was_read_of_it() -> None:
    async def check() -> None:
        async with pair(ToWorker) as (sender, heard, _):
            ours, theirs = socket.socketpair()
            with ours:
                sender.send_connection(messages.Connection(), theirs.detach(), b"x" * (1 << 20))
                await until(lambda: heard)
                connection, read = connection_of(heard[0][1])
                with connection:
                    connection.send(b"hello")
                    assert (ours.recv(5), read) == (b"hello", b"x" * (1 << 20))

    run(check())


@pytest.mark.parametrize("tail", [("y" * 1000,) * 200, ("z" * _LONG,), ("a\ud800",)], ids=["lines", "line", "surrogate"])
def test_a_client_of_a_worker_gets_a_refusal_of_any_length(tmp_path: Path, tail: tuple[str, ...]) -> None:
    """What an engine wrote before it failed may be of any length, and in no encoding."""

    async def check() -> None:
        async with relay(tmp_path, Script(), ready=False, workers=1) as running:
            running.lifecycle.start_s = 1.0
            connection = await running.connect()
            await connection.send(chat_bytes())
            await until(lambda: running.dispatcher.scheduler.state.waiting)
            (request,) = running.dispatcher._admissions
            running.dispatcher._perform(Refuse(request, Refusal.START_FAILED, "r" * _LONG + "\udc00", tail=tail))
            status, _, content = await connection.answer()
            error = json.loads(content)["error"]
            assert (status, error["code"]) == (503, "start_failed")
            assert len(error["message"]) < 80_000

    run(check())


def test_a_refusal_says_its_beginning_and_the_last_lines() -> None:
    error = ApiError(503, "m" * 100_000, code="c", tail=("early" * 10_000, "late"))
    refused = Refused.of(1, error)
    assert refused.message == "m" * 32768 + "..."
    assert refused.tail == ("late",)
    short = ApiError(503, "short", code="c", tail=("one", "two"))
    assert (Refused.of(1, short).message, Refused.of(1, short).tail) == ("short", ("one", "two"))


def test_names_of_models_may_be_many(tmp_path: Path) -> None:
    """A configuration with thousands of models goes to workers in a memory file."""

    async def check() -> None:
        models = tuple(Model(f"m{number}" + "x" * 190, f"m{number}", EngineKind.SIM, gpus=0) for number in range(1500))
        async with gateway({}, models=models, workers=1, ready=False) as running:
            connection = await running.connect()
            status, _, content = await connection.ask(chat_bytes("nobody"))
            assert (status, json.loads(content)["error"]["code"]) == (404, "model_not_found")

    run(check())
