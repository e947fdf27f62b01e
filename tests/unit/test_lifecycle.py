"""An action always ends with a result, whatever fails in it, and our own shortages stop no healthy model."""

import asyncio
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from relay_gateway import StaticLifecycle, chat_bytes, engine, gateway, ok_answer, read_request, run, until

from mmd.config import Config, EngineKind, Listen, Model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.lesson_book import LessonBook
from mmd.gateway.lifecycle import Lifecycle
from mmd.gateway.memory import Memory
from mmd.gpu import GpuMemory, GpuProvider
from mmd.names import Placement, UnitName
from mmd.policy.actions import Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.events import Done, Phase
from mmd.report import Report
from mmd.scope import Scope
from mmd.systemd.client import Systemd
from mmd.systemd.unit import ActiveState, UnitState

UNIT = UnitName("m", Placement.parse("0"))
RUN = "ab" * 16


ERRORS = [OSError(errno.EMFILE, "x"), MemoryError(), RecursionError(), ValueError("x")]


def unit_state(unit: str, state: ActiveState) -> UnitState:
    return UnitState(unit, "loaded", state, "running", "success", "", RUN, 1, 0, 0, 0.0)


class Failing:
    """Fails at the call with this number, once, as `error` says."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


class FakeSystemd:
    def __init__(self, step: Callable[[], None], state: ActiveState) -> None:
        self.step, self.state = step, state

    async def read(self, unit: str) -> UnitState:
        self.step()
        return unit_state(unit, self.state)

    async def start(self, unit: str) -> str:
        self.step()
        self.state = ActiveState.ACTIVE
        return "done"

    async def stop(self, unit: str) -> str:
        self.step()
        self.state = ActiveState.INACTIVE
        return "done"

    async def processes(self, unit: str) -> list[int]:
        self.step()
        return []

    async def reset_failed(self, unit: str) -> None:
        self.step()


class FakeGpus:
    measures = True

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    async def sample(self) -> tuple[GpuMemory, ...]:
        self.step()
        return (GpuMemory(0, "u", "sim", 1 << 30, 0, {}),)

    async def close(self) -> None: ...


ACTIONS: dict[str, tuple[UnitAction, ActiveState]] = {
    "start": (Start(UNIT), ActiveState.INACTIVE),
    "stop": (Stop(UNIT), ActiveState.ACTIVE),
    "sleep": (Sleep(UNIT, 1, 0), ActiveState.ACTIVE),
    "wake": (Wake(UNIT, 1), ActiveState.ACTIVE),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("kind", ACTIONS)
def test_an_action_ends_with_a_result_wherever_it_fails(tmp_path: Path, kind: str, at: int, error: BaseException) -> None:
    action, state = ACTIONS[kind]

    async def scenario() -> Done:
        step = Failing(at, error)
        gpus = FakeGpus(step)

        async def open_gpus() -> GpuProvider:
            return gpus

        def model_of(unit: UnitName) -> Model | None:
            step()
            return None

        memory = Memory(open_gpus, lambda sampled: None)
        scope = Scope.user({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)})
        systemd = cast("Systemd", FakeSystemd(step, state))
        lifecycle = Lifecycle(scope, systemd, memory, tmp_path / "sleepers.json", model_of)
        async with asyncio.timeout(5):
            return await lifecycle.perform(action)

    done = asyncio.run(scenario())
    assert done.action is action
    assert done.observed.phase in (Phase.READY, Phase.STOPPED)


class BrokenLifecycle(StaticLifecycle):
    async def perform(self, action: UnitAction) -> Done:
        self.actions.append(action)
        raise OSError(errno.EMFILE, "x")


def test_the_scheduler_hears_of_an_action_that_broke_off() -> None:
    """Otherwise the model would be starting for ever."""

    async def scenario() -> None:
        lifecycle, book = BrokenLifecycle({"m": "unix:/x"}), LessonBook(Path(":memory:"))
        dispatcher = Dispatcher(lifecycle, cast("Systemd", None), book)
        model = Model("m", "m", EngineKind.SIM, gpus=0)
        dispatcher.reconfigure(Config(models={"m": model}), {"m": "d"}, 1 << 40)
        place = dispatcher.request(model)
        await until(lambda: dispatcher.outcomes)
        (outcome,) = dispatcher.outcomes.values()
        assert not outcome.done.ok
        assert all(each.pending is None for each in dispatcher.scheduler.state.instances.values())
        place.close()
        await dispatcher.close()
        book.close()

    run(scenario())


@pytest.mark.parametrize("listen", [Listen.TCP, Listen.UNIX])
@pytest.mark.parametrize("told", ["http://127.0.0.1:4000", "http://10.0.0.1:80", "unix:/run/mmd/registrar.sock"])
def test_where_an_engine_listens_is_for_the_configuration_to_say(tmp_path: Path, listen: Listen, told: str) -> None:
    scope = Scope.user({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)})
    model = Model("m", "m", EngineKind.COMMAND, gpus=0, listen=listen)
    directory = scope.unit_dir(UNIT)
    directory.mkdir(parents=True)
    (directory / "report.json").write_text(Report(RUN, "d", told, ready=True).to_json())

    async def scenario() -> str | None:
        async def none() -> GpuProvider:
            raise AssertionError

        lifecycle = Lifecycle(scope, cast("Systemd", None), Memory(none, print), tmp_path / "s", lambda unit: model)
        lifecycle.units[UNIT] = unit_state(str(UNIT), ActiveState.ACTIVE)
        return lifecycle.endpoint(UNIT)

    port = listen is Listen.TCP and told == "http://127.0.0.1:4000"
    assert asyncio.run(scenario()) == (f"loopback:4000:{directory}" if port else f"unix:{directory}/engine.sock")


def test_requests_during_a_lack_of_descriptors_are_503_and_stop_nothing(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(ok_answer())
        await writer.drain()

    async def scenario() -> None:
        async with engine(tmp_path / "engine.sock", serve) as endpoint, gateway({"m": endpoint}, workers=0) as running:
            client = await running.connect()
            status, _, _ = await client.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status == 200
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest = os.open("/dev/null", os.O_RDONLY)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                status, fields, _ = await client.ask(chat_bytes())
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (status, fields["retry-after"]) == (503, "1")
            status, _, _ = await client.ask(chat_bytes())
            assert status == 200
            assert not running.lifecycle.actions
            await until(lambda: running.in_flight == 0)

    run(scenario())
