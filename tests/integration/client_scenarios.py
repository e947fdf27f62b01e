"""What test_systemd_client.py runs inside a booted systemd: `python client_scenarios.py NAME LOOP`, LOOP asyncio or uvloop.

It is the gateway's place: the units are driven by the unit broker, with its own units, except in a user's own manager.
"""

# ruff: noqa: ASYNC110, ASYNC221, ASYNC240 - conditions of another process are polled; /proc, /run, systemctl hardly block

import asyncio
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import uvloop

from mmd.systemd import journal
from mmd.systemd.client import Systemd
from mmd.systemd.errors import (
    SystemdAccessDeniedError,
    SystemdDisconnectedError,
    SystemdError,
    SystemdMaskedError,
    SystemdNoSuchUnitError,
    SystemdTimeoutError,
)
from mmd.systemd.journal import JournalQuery
from mmd.systemd.unit import ActiveState, Connected, Disconnected, Event, JobResult, UnitChanged, UnitState

UNITS = Path("/run/systemd/system")
GENERATORS = Path("/run/systemd/system-generators")
BROKER = Path("/run/mmd/unit-broker.sock")
SHIPPED = Path(__file__).resolve().parents[2] / "units"
LOOP_GAP_LIMIT_S = 0.1
MANY = 30

TEMPLATES = {
    "quick": "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n",
    "slow": (
        "[Service]\nType=notify\nNotifyAccess=all\n"
        "ExecStart=/bin/sh -c 'sleep 1; systemd-notify --ready --status=\"loaded 100 %%\"; exec sleep 1000'\n"
    ),
    "stuck": "[Service]\nType=notify\nExecStart=/bin/sleep 1000\n",
    "fails": "[Service]\nType=notify\nExecStart=/bin/sh -c 'exit 3'\n",
    "unmet": "[Unit]\nConditionPathExists=/nonexistent\n[Service]\nExecStart=/bin/sleep 1000\n",
    "sleeps": "[Service]\nType=exec\nExecStart=/bin/sleep 1000\nLogExtraFields=MMD_MODEL=sleeps MMD_ROLE=model\n",
    "speaks": (
        "[Service]\nType=exec\nLogExtraFields=MMD_MODEL=speaks MMD_ROLE=model\n"
        "ExecStart=/bin/sh -c 'echo \"<3>engine says \xe9\u2713\"; exec sleep 1000'\n"
    ),
    "chatty": (
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nNotifyAccess=main\n"
        f"ExecStart={sys.executable} -c 'import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
        's.connect(os.environ["NOTIFY_SOCKET"]); s.send(b"READY=1"); '
        '[s.send(b"STATUS=%%d" %% n) for n in range(5001)]; __import__("time").sleep(1000)\'\n'
    ),
}

Scenario = Callable[[], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def unit(template: str, instance: int | str = 0) -> str:
    return f"mmd-model-{template}@{instance}.service"


def prepare() -> None:
    """Install the broker, and the templates by a generator, as mmd-generator does; done once by the test module."""
    made = Path("/run/templates")
    made.mkdir()
    for name, text in TEMPLATES.items():
        (made / f"mmd-model-{name}@.service").write_text(text)
    GENERATORS.mkdir(exist_ok=True)
    generator = GENERATORS / "mmd-generator"
    generator.write_text(f"#!/bin/sh\ncp {made}/* $1\n")
    generator.chmod(0o755)
    (UNITS / unit("masked")).symlink_to("/dev/null")
    for name in ("mmd-unit-broker.socket", "mmd-unit-broker@.service", "mmd.slice"):
        (UNITS / name).write_text((SHIPPED / name).read_text().replace("/usr/lib/mmd/bin/python", sys.executable))
    subprocess.run(["useradd", "--system", "mmd"], check=True)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "start", "mmd-unit-broker.socket"], check=True)


@contextmanager
def brokers_with(*lines: str) -> Iterator[None]:
    """New brokers have these directives as well."""
    drop_in = UNITS / "mmd-unit-broker@.service.d/test.conf"
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("\n".join(("[Service]", *lines, "")))
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    try:
        yield
    finally:
        drop_in.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True)


class Events(list[Event]):
    def states(self, name: str) -> list[UnitState]:
        return [event.state for event in self if isinstance(event, UnitChanged) and event.state.unit == name]

    async def seen(self, name: str, active_state: ActiveState) -> None:
        await self.until(lambda: any(state.active_state is active_state for state in self.states(name)))

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Systemd, Events]]:
    events = Events()
    systemd = await Systemd.connect(broker=BROKER, on_event=events.append)
    try:
        yield systemd, events
        for state in await systemd.list_models():
            await systemd.stop(state.unit)
            await systemd.reset_failed(state.unit)
        assert systemd.pending == 0
    finally:
        await systemd.close()
    async with asyncio.timeout(5):  # none of them may outlive its connection
        while workers():
            await asyncio.sleep(0.01)


def workers() -> list[int]:
    """The processes of brokers."""
    listed = subprocess.run(
        ["systemctl", "list-units", "--plain", "--no-legend", "mmd-unit-broker@*"], capture_output=True, text=True
    )
    units = [line.split()[0] for line in listed.stdout.splitlines()]
    pids = [
        subprocess.run(["systemctl", "show", "--property=MainPID", "--value", each], capture_output=True, text=True).stdout
        for each in units
    ]
    return [pid for pid in map(int, filter(str.strip, pids)) if pid]


async def raises(kind: type[SystemdError], call: Awaitable[object]) -> SystemdError:
    try:
        value = await call
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} expected, not {value!r}")


class LoopGap:
    """The longest time that the event loop did not turn."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last - 0.005), now

    def stop(self) -> float:
        self._task.cancel()
        return self.longest_s


@asynccontextmanager
async def slow_reload(seconds: float) -> AsyncIterator[None]:
    """A daemon-reload that is under way, because a generator takes that long."""
    GENERATORS.mkdir(exist_ok=True)
    generator = GENERATORS / "slow"
    generator.write_text(f"#!/bin/sh\ntouch /run/generating\nsleep {seconds}\nrm /run/generating\n")
    generator.chmod(0o755)
    process = await asyncio.create_subprocess_exec("systemctl", "daemon-reload")
    while not Path("/run/generating").exists():
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        generator.unlink()
        await process.wait()


@scenario
async def life_of_a_unit() -> None:
    """Start, read, list, processes, signal, stop, with an event for each step."""
    async with connected() as (systemd, events):
        name = unit("slow")
        assert await systemd.processes(name) == ()
        assert await systemd.start(name) is JobResult.DONE
        state = await systemd.read(name)
        assert (state.unit, state.load_state, state.active_state) == (name, "loaded", ActiveState.ACTIVE)
        assert (state.sub_state, state.result, state.restarts, state.exit_status) == ("running", "success", 0, 0)
        assert state.status_text == "loaded 100 %"
        assert len(state.invocation_id) == 32
        assert int(state.invocation_id, 16) > 0
        assert abs(state.since - time.time()) < 30
        assert state.main_pid in await systemd.processes(name)
        assert state in await systemd.list_models()
        await events.until(lambda: events.states(name)[-1:] == [state])
        seen = [each.active_state for each in events.states(name)]
        assert seen.index(ActiveState.ACTIVATING) < seen.index(ActiveState.ACTIVE), seen
        assert await systemd.restart(name) is JobResult.DONE
        assert (await systemd.read(name)).invocation_id != state.invocation_id
        await systemd.kill(name, signal=signal.SIGKILL)
        await events.seen(name, ActiveState.FAILED)
        failed = await systemd.read(name)
        assert (failed.result, failed.exit_status) == ("signal", signal.SIGKILL)
        await systemd.reset_failed(name)
        assert (await systemd.read(name)).active_state is ActiveState.INACTIVE
        assert await systemd.stop(name) is JobResult.DONE


@scenario
async def bad_units() -> None:
    """Missing, masked, invalid, failing and unmet units."""
    async with connected() as (systemd, _):
        missing = await raises(SystemdNoSuchUnitError, systemd.start(unit("missing")))
        assert missing.name == "org.freedesktop.systemd1.NoSuchUnit"
        assert (await systemd.read(unit("missing"))).load_state == "not-found"
        await systemd.reset_failed(unit("missing"))
        masked = await raises(SystemdMaskedError, systemd.start(unit("masked")))
        assert "systemctl unmask mmd-model-masked@0.service" in str(masked)
        invalid = await raises(SystemdError, systemd.read("dbus.service"))
        assert invalid.name == "org.freedesktop.DBus.Error.InvalidArgs"
        assert await systemd.start(unit("fails")) is JobResult.FAILED
        state = await systemd.read(unit("fails"))
        assert (state.active_state, state.result, state.exit_status) == (ActiveState.FAILED, "exit-code", 3)
        assert await systemd.start(unit("unmet")) is JobResult.DONE, "a failed Condition is not a failed job"
        assert (await systemd.read(unit("unmet"))).active_state is ActiveState.INACTIVE


@scenario
async def units_of_others() -> None:
    """A template that no generator made is left alone, however it is named."""
    (UNITS / "mmd-model-alike@.service").write_text(TEMPLATES["sleeps"])
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    async with connected() as (systemd, _):
        name = unit("alike")
        assert (await systemd.read(name)).load_state == "loaded"
        for call in (systemd.start, systemd.stop, systemd.restart, systemd.reset_failed, systemd.processes):
            refused = await raises(SystemdAccessDeniedError, call(name))
            assert "/run/systemd/generator/mmd-model-alike@.service" in str(refused)
        (UNITS / "mmd-model-alike@.service").unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True)


@scenario
async def overtaken_and_shared_jobs() -> None:
    """A stop cancels a start; two callers may wait for one job; a caller may give up without a trace."""
    async with connected() as (systemd, events):
        name = unit("stuck")
        first, second = asyncio.create_task(systemd.start(name)), asyncio.create_task(systemd.start(name))
        impatient = asyncio.create_task(systemd.start(name))
        await events.seen(name, ActiveState.ACTIVATING)
        impatient.cancel()
        hasty = asyncio.create_task(systemd.read(name))
        await asyncio.sleep(0)
        hasty.cancel()
        assert await systemd.stop(name) is JobResult.DONE
        assert set(await asyncio.gather(first, second)) == {JobResult.CANCELED}
        ended = await asyncio.gather(impatient, hasty, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended)
        assert systemd.pending == 0


@scenario
async def many_at_once() -> None:
    """30 concurrent restarts, four times: no result is lost however soon it comes."""
    async with connected() as (systemd, events):
        names = [unit("quick", n) for n in range(MANY)]
        for _ in range(4):
            results = await asyncio.wait_for(asyncio.gather(*(systemd.restart(name) for name in names)), 20)
            assert set(results) == {JobResult.DONE}
        latest = {state.unit: state for state in await systemd.list_models()}
        assert set(latest) >= set(names)
        await events.until(lambda: all(events.states(name)[-1] == latest[name] for name in names))


@scenario
async def loop_gap_during_reload() -> None:
    """While systemd is busy for seconds and a StartUnit waits for it, the event loop turns."""
    async with connected() as (systemd, _):
        gap = LoopGap()
        began = time.perf_counter()
        async with slow_reload(2):
            assert await systemd.start(unit("quick")) is JobResult.DONE
            waited_s = time.perf_counter() - began
        longest_s = gap.stop()
        print(f"StartUnit waited {waited_s:.2f} s for a daemon-reload, longest loop gap {longest_s * 1e3:.1f} ms")
        assert waited_s > 1.5
        assert longest_s < LOOP_GAP_LIMIT_S


@scenario
async def no_answer_in_time() -> None:
    """D-Bus gives up on a systemd that is busy: SystemdTimeoutError, and the connection stays."""
    with brokers_with("Environment=SYSTEMD_BUS_TIMEOUT=500ms"):  # read by sd-bus
        await timed_out()


async def timed_out() -> None:
    async with connected() as (systemd, events):
        async with slow_reload(1.5):
            error = await raises(SystemdTimeoutError, systemd.start(unit("sleeps")))
            assert unit("sleeps") in str(error)
        assert systemd.connected
        assert await systemd.start(unit("sleeps")) is JobResult.DONE
        await events.seen(unit("sleeps"), ActiveState.ACTIVE)
        assert not [event for event in events if isinstance(event, Disconnected)]


@scenario
async def reload_and_reexec() -> None:
    """Jobs, events and reads survive a daemon-reload and a daemon-reexec without a lost connection."""
    async with connected() as (systemd, events):
        for number, verb in enumerate(("daemon-reload", "daemon-reexec")):
            name = unit("slow", number)
            start = asyncio.create_task(systemd.start(name))
            await events.seen(name, ActiveState.ACTIVATING)
            process = await asyncio.create_subprocess_exec("systemctl", verb)
            while process.returncode is None:
                assert (await systemd.read(name)).load_state == "loaded"
                await asyncio.sleep(0.01)
            assert await start is JobResult.DONE
            await events.seen(name, ActiveState.ACTIVE)
        assert not [event for event in events if isinstance(event, Disconnected)]


async def lose_connection(kill: Callable[[Systemd], Awaitable[None]]) -> None:
    async with connected() as (systemd, events):
        name = unit("stuck")
        start = asyncio.create_task(systemd.start(name))
        await events.seen(name, ActiveState.ACTIVATING)
        await kill(systemd)
        began = time.perf_counter()
        await raises(SystemdDisconnectedError, start)
        was_connected = systemd.connected
        state = await systemd.read(name)  # waits for the next connection
        print(f"connected again after {time.perf_counter() - began:.2f} s")
        assert state.active_state is ActiveState.ACTIVATING, "the unit does not mind"
        assert (was_connected, systemd.connected, systemd.pending) == (False, True, 0)
        assert [type(event) for event in events if not isinstance(event, UnitChanged)] == [Disconnected, Connected]
        events.clear()
        assert await systemd.stop(name) is JobResult.DONE
        await events.seen(name, ActiveState.INACTIVE)


@scenario
async def bus_killed() -> None:
    """kill -9 of dbus-daemon: what was in flight fails, the next call waits for the new connection, events come again."""

    async def kill(systemd: Systemd) -> None:
        await (await asyncio.create_subprocess_exec("systemctl", "kill", "--signal=KILL", "dbus.service")).wait()

    await lose_connection(kill)


@scenario
async def worker_killed() -> None:
    """kill -9 of the worker is the same."""

    async def kill(systemd: Systemd) -> None:
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)

    await lose_connection(kill)


@scenario
async def bus_gone() -> None:
    """Without a bus, calls fail within the bound, and a first connection fails at once."""
    async with connected() as (systemd, events):
        with brokers_with("Environment=DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent"):
            os.kill(workers()[0], signal.SIGKILL)
            await events.until(lambda: not systemd.connected)
            began = time.perf_counter()
            error = await raises(SystemdDisconnectedError, systemd.read(unit("quick")))
            assert 4 < time.perf_counter() - began < 7
            assert "cannot connect to systemd" in str(error)
            await raises(SystemdDisconnectedError, Systemd.connect(broker=BROKER, on_event=events.append))
        await events.until(lambda: systemd.connected)


@scenario
async def broker_gone() -> None:
    """The same with a socket that nobody listens on, and with one that is not there."""
    async with connected() as (systemd, events):
        subprocess.run(["systemctl", "stop", "mmd-unit-broker.socket"], check=True)
        os.kill(workers()[0], signal.SIGKILL)
        await events.until(lambda: not systemd.connected)
        await raises(SystemdDisconnectedError, Systemd.connect(broker=BROKER, on_event=events.append))
        await raises(SystemdDisconnectedError, Systemd.connect(broker=Path("/nonexistent"), on_event=events.append))
        subprocess.run(["systemctl", "start", "mmd-unit-broker.socket"], check=True)
        await events.until(lambda: systemd.connected)


@scenario
async def out_of_descriptors() -> None:
    """While there is no descriptor left the connection cannot be made anew; afterwards it is."""
    async with connected() as (systemd, events):
        (worker,) = workers()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(worker, signal.SIGKILL)
        await events.until(lambda: not systemd.connected)
        error = await raises(SystemdDisconnectedError, systemd.list_models())
        assert "Too many open files" in str(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        await events.until(lambda: systemd.connected)
        assert await systemd.start(unit("quick")) is JobResult.DONE


@scenario
async def parent_killed() -> None:
    """The broker ends with its client, however that dies."""
    program = (
        "import asyncio\n"
        "from pathlib import Path\n"
        "from mmd.systemd.client import Systemd\n"
        "async def main():\n"
        f"    await Systemd.connect(broker=Path('{BROKER}'), on_event=print)\n"
        "    print('up', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert await client.stdout.readline() == b"up\n"
    (worker,) = workers()
    os.kill(worker, signal.SIGTERM)  # not the worker's business
    client.kill()
    await client.wait()
    async with asyncio.timeout(2):
        while (status := Path(f"/proc/{worker}/stat")).exists() and status.read_text().split()[2] != "Z":
            await asyncio.sleep(0.01)


@scenario
async def bursts() -> None:
    """5000 changes of one unit arrive as far fewer events, the last of them last, and cost no memory."""
    async with connected() as (systemd, events):
        name = unit("chatty")
        for _ in range(2):
            assert await systemd.restart(name) is JobResult.DONE
            await events.until(lambda: events.states(name)[-1:] != [] and events.states(name)[-1].status_text == "5000", 30)
            events.clear()
        (worker,) = workers()
        before = resident_bytes(worker)
        for _ in range(6):
            events.clear()
            assert await systemd.restart(name) is JobResult.DONE
            time.sleep(0.3)  # noqa: ASYNC251 - a client that does not read for a while
            await events.until(lambda: events.states(name)[-1:] != [] and events.states(name)[-1].status_text == "5000", 30)
            assert len(events.states(name)) < 5000
        grown = resident_bytes(worker) - before
        print(f"6 x 5000 changes: worker {before >> 10} KiB, grown by {grown >> 10} KiB")
        # How many wait in sd-bus's queue at most is a matter of timing (some MiB); a leak of them all would be 30 MiB and more.
        assert grown < 24 << 20


@scenario
async def figures() -> None:
    """A light worker and short round trips; printed, and asserted with a wide margin."""
    async with connected() as (systemd, _):
        assert await systemd.start(unit("sleeps")) is JobResult.DONE
        reads_s = [await timed(systemd.read(unit("sleeps"))) for _ in range(200)]
        calls_s = [await timed(systemd.processes(unit("sleeps"))) for _ in range(200)]
        rss = resident_bytes(workers()[0])
        read_ms, call_ms = statistics.median(reads_s) * 1e3, statistics.median(calls_s) * 1e3
        print(f"read of a unit {read_ms:.2f} ms, other calls {call_ms:.2f} ms, worker RSS {rss / (1 << 20):.1f} MiB")
        assert rss < 40 << 20
        assert read_ms < 50


async def timed(call: Awaitable[object]) -> float:
    began = time.perf_counter()
    await call
    return time.perf_counter() - began


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@scenario
async def logs() -> None:
    """The command of `mmdctl logs` shows what the engine wrote and what systemd wrote about its unit, of this model only."""
    async with connected() as (systemd, _):
        assert await systemd.start(unit("speaks")) is JobResult.DONE
        assert await systemd.start(unit("sleeps")) is JobResult.DONE
        for query in (JournalQuery("speaks"), JournalQuery("speaks", follow=True)):
            await show("engine says", "Started", query)
        async with aclosing(journal.entries(JournalQuery(), user=False)) as entries:
            units = {entry.unit async for entry in entries}
        assert {unit("speaks"), unit("sleeps")} <= units
        async with asyncio.timeout(10), aclosing(journal.entries(JournalQuery("speaks", 0, True), user=False)) as entries:
            late = asyncio.create_task(anext(entries))
            await asyncio.sleep(0.5)
            assert await systemd.start(unit("speaks", 1)) is JobResult.DONE
            assert (await late).unit == unit("speaks", 1), "an instance that was never there before"


async def show(engine_text: str, systemd_text: str, query: JournalQuery, *, user: bool = False) -> None:
    found: dict[str, journal.JournalEntry] = {}
    async with asyncio.timeout(10), aclosing(journal.entries(query, user=user)) as entries:
        async for entry in entries:
            assert entry.unit == unit("speaks"), entry
            found |= {text: entry for text in (engine_text, systemd_text) if text in entry.message}
            if len(found) == 2:
                break
    engine, manager = found[engine_text], found[systemd_text]
    assert (engine.message, engine.model, engine.priority) == ("engine says \xe9\u2713", "speaks", 3)
    assert (manager.model, manager.identifier, manager.unit) == ("", "systemd", unit("speaks"))
    assert engine.pid != manager.pid
    assert abs(engine.time - time.time()) < 60


@scenario
async def user_manager() -> None:
    """The same with a user's own service manager, its bus and its journal."""
    uid = os.getuid()
    await (await asyncio.create_subprocess_exec("systemctl", "start", f"user@{uid}.service")).wait()
    os.environ["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
    units = Path(f"/run/user/{uid}/systemd/user")
    units.mkdir(parents=True)
    (units / "mmd-model-speaks@.service").write_text(TEMPLATES["speaks"])
    await (await asyncio.create_subprocess_exec("systemctl", "--user", "daemon-reload")).wait()
    systemd = await Systemd.connect(broker=None, on_event=lambda event: None)
    try:
        assert await systemd.start(unit("speaks")) is JobResult.DONE
        assert [state.unit for state in await systemd.list_models()] == [unit("speaks")]
        await show("engine says", "Started", JournalQuery("speaks", follow=True), user=True)
        assert await systemd.stop(unit("speaks")) is JobResult.DONE
    finally:
        await systemd.close()


async def no_rights() -> None:
    """As a user whom the broker does not serve."""
    error = await raises(SystemdDisconnectedError, Systemd.connect(broker=BROKER, on_event=lambda event: None))
    assert "Permission denied" in str(error)


if __name__ == "__main__":
    name, loop = sys.argv[1:]
    if name == "prepare":
        prepare()
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
            runner.run({**SCENARIOS, "no_rights": no_rights}[name]())  # type: ignore[arg-type]
