"""Workers: leases and the counts behind them, requests that are asked for, and workers that die, hang or leave."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from relay_gateway import (
    OK,
    Connection,
    Running,
    Script,
    chat_bytes,
    gateway,
    in_step,
    ok_answer,
    read_request,
    relay,
    run,
    until,
)

from mmd.config import Gateway
from mmd.gateway.workers import staff, worker_count
from mmd.gateway.workers.tally import UNITS_MAX, Tally
from mmd.names import CPU, UnitName
from mmd.policy.actions import Stop
from mmd.policy.events import Release

_UNIT = UnitName("m", CPU)


class Slow:
    """An engine that answers when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.serving = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            self.serving += 1
            told, gone = asyncio.ensure_future(self.go.wait()), asyncio.ensure_future(reader.read(1))
            try:
                await asyncio.wait((told, gone), return_when=asyncio.FIRST_COMPLETED)
                writer.write(ok_answer())
                await writer.drain()
            finally:
                self.serving -= 1
                told.cancel()
                gone.cancel()
                await asyncio.gather(told, gone, return_exceptions=True)


@asynccontextmanager
async def _busy(path: Path, number: int, **options: object) -> AsyncIterator[tuple[Running, Slow, list[Connection]]]:
    """A gateway with two workers, and requests in flight on as many connections, some at either worker."""
    slow = Slow()
    async with relay(path, slow, workers=2, **options) as running:
        clients = [await running.connect() for _ in range(number)]
        for client in clients:
            await client.send(chat_bytes())
        await until(lambda: slow.serving == number)
        yield running, slow, clients


def _lent(running: Running) -> set[UnitName]:
    state = running.dispatcher.scheduler.state
    return state.lent - state.recalled


def pids(running: Running) -> set[int]:
    assert running.staff is not None
    return set(running.staff.pids)


async def replaced(running: Running, before: set[int]) -> None:
    """One that was there before has gone, and another is there."""
    await until(lambda: len(pids(running)) == len(before) and pids(running) != before)


def test_a_tally_is_one_memory_in_two_places() -> None:
    descriptor = Tally.make()
    ours, theirs = Tally(descriptor), Tally(descriptor)
    os.close(descriptor)
    last = UNITS_MAX - 1
    theirs.begin(last, 5.0)
    theirs.begin(last, 6.0)
    assert theirs.end(last, 7.5) == 1
    assert (ours.in_flight(last), ours.arrived(last), ours.last_activity(last)) == (1, 2, 7.5)
    assert (ours.in_flight(0), ours.arrived(0), ours.last_activity(0)) == (0, 0, 0.0)


def test_auto_is_one_process_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, count in ((1, 1), (2, 1), (15, 1), (16, 2), (32, 4), (256, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert worker_count(None) == count
    assert worker_count(3) == 3


def test_what_workers_have_in_flight_is_counted_without_a_message(tmp_path: Path) -> None:
    async def check() -> None:
        async with _busy(tmp_path, 12) as (running, slow, clients):
            assert running.in_flight == 12
            state = running.dispatcher.scheduler.state
            assert not state.admitted, "nobody asked"
            assert state.instances[_UNIT].elsewhere == 12
            assert state.traffic["m"].requests == 12
            slow.go.set()
            for client in clients:
                assert (await client.answer())[2] == OK
            await until(lambda: running.in_flight == 0)
            counters = running.inference.counters_of("m")
            await until(lambda: counters.requests == 12)

    run(check())


def test_a_lease_ends_before_anything_is_done_to_its_model(tmp_path: Path) -> None:
    async def check() -> None:
        async with _busy(tmp_path, 6) as (running, slow, clients):
            assert _lent(running) == {_UNIT}
            running.dispatcher.post(Release(_UNIT))
            await asyncio.sleep(0.3)
            assert not running.dispatcher.scheduler.state.lent, "it is recalled at once"
            assert running.lifecycle.actions == [], "six requests are in flight"
            late = await running.connect()
            await late.send(chat_bytes())
            await until(lambda: running.dispatcher.scheduler.state.waiting)
            assert slow.serving == 6, "later ones wait"
            slow.go.set()
            for client in (*clients, late):
                assert (await client.answer())[2] == OK
            assert [type(action).__name__ for action in running.lifecycle.actions] == ["Stop", "Start"]
            await until(lambda: _lent(running) == {_UNIT})

    run(check())


def test_a_killed_worker_takes_its_counts_with_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with _busy(tmp_path, 30) as (running, slow, clients):
            before = pids(running)
            os.kill(min(before), signal.SIGKILL)
            await replaced(running, before)
            await until(lambda: running.in_flight == slow.serving)
            cut = [client for client in clients if client.reader.at_eof() or client.reader.exception()]
            assert running.in_flight == 30 - len(cut)
            running.dispatcher.post(Release(_UNIT))
            slow.go.set()
            for client in clients:
                if client not in cut:
                    assert (await client.answer())[2] == OK
            await until(lambda: [type(action) for action in running.lifecycle.actions] == [Stop])
            await in_step(running)

    run(check())


def test_a_worker_that_dies_with_a_recall_unanswered_holds_nothing_up(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), workers=2) as running:
            await in_step(running)
            before = pids(running)
            pid = min(before)
            os.kill(pid, signal.SIGSTOP)
            running.dispatcher.post(Release(_UNIT))
            await asyncio.sleep(0.3)
            assert running.lifecycle.actions == [], "it might be sending a request"
            os.kill(pid, signal.SIGKILL)
            await until(lambda: [type(action) for action in running.lifecycle.actions] == [Stop])
            await in_step(running)

    run(check())


def test_a_worker_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "_SILENT_S", 2.0)

    async def check() -> None:
        async with relay(tmp_path, Script(), workers=2) as running:
            before = pids(running)
            pid = min(before)
            os.kill(pid, signal.SIGSTOP)
            await replaced(running, before)
            await in_step(running)

    run(check())


def test_a_worker_told_to_end_finishes_and_is_replaced(tmp_path: Path) -> None:
    async def check() -> None:
        async with _busy(tmp_path, 10) as (running, slow, clients):
            before = pids(running)
            os.kill(min(before), signal.SIGTERM)
            await asyncio.sleep(0.2)
            slow.go.set()
            for client in clients:
                assert (await client.answer())[2] == OK
            await replaced(running, before)
            await in_step(running)

    run(check())


def test_a_limit_of_requests_in_flight_holds_over_all_workers(tmp_path: Path) -> None:
    async def check() -> None:
        async with _busy(tmp_path, 3, concurrency=3) as (running, slow, _):
            assert not running.dispatcher.scheduler.state.lent
            more = [await running.connect() for _ in range(6)]
            for client in more:
                await client.send(chat_bytes())
            await until(lambda: len(running.dispatcher.scheduler.state.waiting) == 6)
            await more[0].close()
            await until(lambda: len(running.dispatcher.scheduler.state.waiting) == 5)
            assert slow.serving == 3
            slow.go.set()
            for client in more[1:]:
                assert (await client.answer())[2] == OK
            await until(lambda: running.in_flight == 0)

    run(check())


def test_nobody_listening_restarts_the_engine_once(tmp_path: Path) -> None:
    """Each worker may find out for itself: the engine is stopped once all the same."""

    async def check() -> None:
        async with gateway({"m": f"unix:{tmp_path}/nobody.sock"}, workers=2) as running:
            clients = [await running.connect() for _ in range(8)]
            for client in clients:
                await client.send(chat_bytes())
            for client in clients:
                status, _, content = await client.answer()
                assert (status, json.loads(content)["error"]["code"]) == (502, "engine_unreachable")
            assert [type(action).__name__ for action in running.lifecycle.actions][:2] == ["Stop", "Start"]
            await until(lambda: running.in_flight == 0)

    run(check())


def test_an_engine_that_listens_elsewhere_now_is_found(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), workers=2) as running:
            await in_step(running)
            (tmp_path / "engine.sock").rename(tmp_path / "other.sock")
            running.lifecycle.endpoints["m"] = f"unix:{tmp_path}/other.sock"
            lender = running.dispatcher._lender
            assert lender is not None
            lender.renew(_UNIT)
            for _ in range(4):
                await in_step(running)
            assert running.lifecycle.actions == []

    run(check())


def test_a_waiting_stream_hears_what_its_model_is_doing(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(loading_keepalive_s=0.05)
        async with relay(tmp_path, Script(), workers=2, settings=settings, ready=False) as running:
            running.lifecycle.start_s = 0.5
            client = await running.connect()
            await client.send(chat_bytes(stream=True))
            status, _, content = await client.answer()
            assert status == 200
            assert content.startswith(b": m is starting; 1st in line\n\n: m is starting; 1st in line\n\n")

    run(check())


def test_a_changed_configuration_reaches_every_worker(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), workers=2) as running:
            assert running.staff is not None
            config = running.dispatcher.config
            config = config._replace(gateway=config.gateway._replace(max_body_bytes=20))
            running.dispatcher.reconfigure(config, {}, 1 << 40)
            running.staff.configure(config)
            await asyncio.sleep(0.1)
            for _ in range(6):
                client = await running.connect()
                assert (await client.ask(chat_bytes()))[0] == 413
                await client.close()

    run(check())


def test_connections_wait_for_a_worker_when_there_is_none(tmp_path: Path) -> None:
    async def check() -> None:
        go = asyncio.Event()

        async def slow(_: web.Request) -> web.Response:
            await go.wait()
            return web.Response()

        async with relay(tmp_path, Script(), workers=2, routes=(web.get("/slow", slow),)) as running:
            client = await running.connect()
            await client.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: running.handlers)
            before = pids(running)
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: before.isdisjoint(pids(running)))
            late = await running.connect()
            await late.send(chat_bytes())
            go.set()
            assert (await client.answer())[0] == 200
            assert (await client.ask(chat_bytes()))[2] == OK, "it went on to a fresh worker"
            assert (await late.answer())[2] == OK, "the socket's queue held it meanwhile"

    run(check())
