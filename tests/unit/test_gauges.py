"""Gauges over real commands: what they say, and what becomes of those that are slow, fail, or say something else."""

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from mmd.config import Config, Device, EngineKind, Gauge, Gpus, Model, Provider, Resources
from mmd.gateway.gauges import Gauges, host_ram_bytes
from mmd.policy.events import Gauged

GIB = 1 << 30


def shell(script: str, interval_s: float = 0.1) -> Gauge:
    return Gauge(("/bin/sh", "-c", script), interval_s)


def config_of(gauges: Mapping[str, Gauge], *, needed: bool = True, ram_bytes: int | None = 1) -> Config:
    """A configuration with these gauges and a model that needs them all."""
    model = Model(name="m", id="m", engine=EngineKind.SIM, gpus=0, resources=dict.fromkeys(gauges, 1.0) if needed else {})
    return Config(resources=Resources(ram_bytes, commands=gauges), models={"m": model})


class Bench:
    """Gauges, what they told, and who holds what as the test says."""

    def __init__(self) -> None:
        self.readings: list[Gauged] = []
        self.stand: object = "steady"
        self.gauges = Gauges(lambda _: hash(self.stand), self.readings.append)

    def free(self) -> list[float]:
        return [reading.free for reading in self.readings]

    async def until(self, predicate: Callable[[], object], timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not predicate():  # noqa: ASYNC110  commands have no event for what is asked
                await asyncio.sleep(0.005)


@asynccontextmanager
async def bench(config: Config) -> AsyncIterator[Bench]:
    made = Bench()
    made.gauges.use(config)
    try:
        yield made
    finally:
        await made.gauges.close()


def alive(word: str) -> list[int]:
    """The processes whose command line holds `word`, zombies apart."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if word.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.mark.parametrize(
    ("script", "free"),
    [
        ("echo 2", 2.0),
        ("echo 0.5", 0.5),
        ("echo -3", -3.0),
        ("echo 18GiB", 18 * GIB),
        ("printf '  Avail\\n 123\\n'", 123.0),
        ("echo careful >&2; echo 7", 7.0),
        ("sleep 600 & echo 4", 4.0),
    ],
    ids=["number", "fraction", "negative", "size", "last line", "stderr apart", "child left behind"],
)
def test_what_a_command_prints(script: str, free: float) -> None:
    async def scenario() -> None:
        async with bench(config_of({"scratch": shell(script)})) as made:
            assert made.gauges.problems == {"scratch": "it has not told yet how much is free; models that need it wait"}
            await made.until(lambda: len(made.readings) > 1)
            assert set(made.readings) == {Gauged("scratch", free)}
            assert made.gauges.problems == {}
            assert made.gauges.sizes == ({"scratch"} if free == 18 * GIB else set())

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("/bin/sh", "-c", "echo first >&2; echo no such host >&2; exit 3"), "/bin/sh: exit status 3: no such host"),
        (("/bin/sh", "-c", "kill -9 $$"), "/bin/sh: killed by signal 9"),
        (("/bin/echo", "plenty"), "/bin/echo printed 'plenty', which is neither a number nor a size such as 18GiB"),
        (("/bin/echo", "1 2"), "/bin/echo printed '1 2', which is neither a number nor a size such as 18GiB"),
        (("/bin/echo", "nan"), "/bin/echo printed 'nan', which is neither a number nor a size such as 18GiB"),
        (("/bin/true",), "/bin/true printed nothing"),
        (("/bin/sh", "-c", "head -c 10485760 /dev/zero; echo 1"), "/bin/sh: it prints more than 64 KiB"),
        (("/bin/sh", "-c", "yes >&2 & sleep 0.2; echo 1; exit 1"), "/bin/sh: exit status 1: y"),
        (("/bin/sh", "-c", "setsid sleep 0.5 & exit 1"), "/bin/sh: exit status 1"),
        (("/nowhere/df-free",), "/nowhere/df-free cannot be run: No such file or directory"),
        (("/etc/passwd",), "/etc/passwd cannot be run: Permission denied"),
    ],
    ids=[
        "status",
        "signal",
        "nonsense",
        "two",
        "nan",
        "nothing",
        "10 MB",
        "noise",
        "left the session",
        "missing",
        "no program",
    ],
)
def test_a_first_try_that_fails_limits_nothing(command: tuple[str, ...], why: str) -> None:
    async def scenario() -> None:
        async with bench(config_of({"scratch": Gauge(command, 0.1)})) as made:
            await made.until(lambda: made.readings, 10)
            assert made.readings[0] == Gauged("scratch", math.inf)
            assert made.gauges.problems == {"scratch": f"{why}; until it tells, it limits nothing"}

    uvloop.run(scenario())


def test_a_failure_later_leaves_the_last_value_in_force_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its recovery is logged as well."""
    file = tmp_path / "free"
    file.write_text("5\n")

    async def scenario() -> None:
        async with bench(config_of({"scratch": shell(f"echo x >> {tmp_path}/runs; cat {file}")})) as made:
            await made.until(lambda: made.readings)
            file.unlink()
            await made.until(lambda: made.gauges.problems)
            assert made.gauges.problems["scratch"].endswith("No such file or directory; what it told last stays in force")
            runs, readings = len((tmp_path / "runs").read_text()), len(made.readings)
            await made.until(lambda: len((tmp_path / "runs").read_text()) > runs + 4)
            assert len(made.readings) == readings
            file.write_text("6\n")
            await made.until(lambda: not made.gauges.problems)
            await made.until(lambda: made.free()[-1] == 6)

    caplog.set_level(logging.INFO, "mmd.gateway.gauges")
    uvloop.run(scenario())
    assert [(record.levelname, record.message.split(";")[0].split(": ")[0]) for record in caplog.records] == [
        ("WARNING", "resource scratch"),
        ("INFO", "resource scratch"),
    ]
    assert caplog.records[1].message == "resource scratch: its gauge works again"


def test_a_command_that_hangs_is_killed_with_its_children_and_holds_up_nobody(tmp_path: Path) -> None:
    """Time-out: 5 s, since the interval is less. Meanwhile another gauge, and the event loop, go on."""
    mark = f"86400.{os.getpid()}"

    async def scenario() -> None:
        slow, fast = shell(f"echo x >> {tmp_path}/runs; sleep {mark} & sleep {mark}"), shell("echo 3")
        async with bench(config_of({"slow": slow, "fast": fast})) as made:
            began = time.monotonic()
            await made.until(lambda: len(alive(mark)) >= 3)
            await made.until(lambda: made.free().count(3.0) > 20)
            assert (tmp_path / "runs").read_text() == "x\n", "never two of one at a time"
            await made.until(lambda: math.inf in made.free(), 10)
            assert 4.9 < time.monotonic() - began < 9
            assert made.gauges.problems["slow"] == "/bin/sh: no answer within 5.0 s; until it tells, it limits nothing"
            await made.until(lambda: len((tmp_path / "runs").read_text()) == 4)
            await made.until(lambda: len(alive(mark)) <= 3)  # those of the first run are gone
        await made.until(lambda: not alive(mark))  # closing ends them all

    uvloop.run(scenario())


def test_a_reading_during_which_a_model_took_some_is_not_passed_on(tmp_path: Path) -> None:
    go, runs = tmp_path / "go", tmp_path / "runs"

    async def scenario() -> None:
        script = f"echo x >> {runs}; until [ -e {go} ]; do sleep 0.02; done; echo 9"
        async with bench(config_of({"scratch": shell(script)})) as made:
            await made.until(runs.exists)
            made.stand = "somebody has taken some"
            go.touch()
            await made.until(lambda: runs.read_text().count("x") > 1)
            await made.until(lambda: made.readings)
            assert runs.read_text().count("x") - len(made.readings) >= 1
            assert set(made.free()) == {9.0}

    uvloop.run(scenario())


def test_a_change_of_the_configuration_ends_what_it_does_not_ask_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = {"kept": shell("echo 1"), "changed": shell("echo 2"), "gone": shell(f"sleep {tmp_path.name}.1d")}
        async with bench(config_of(first)) as made:
            await made.until(lambda: {1.0, 2.0} <= set(made.free()))
            made.gauges.use(config_of({"kept": shell("echo 1"), "changed": shell("echo 4GiB"), "new": shell("echo 5")}))
            assert set(made.gauges.problems) == {"changed", "new"}, "they have not told yet"
            made.readings.clear()
            await made.until(lambda: {1.0, 4.0 * GIB, 5.0} <= set(made.free()))
            assert 2.0 not in made.free()
            assert made.gauges.sizes == {"changed"}
            made.gauges.use(Config(resources=Resources(1)))
            await asyncio.sleep(0.15)
            made.readings.clear()
            await asyncio.sleep(0.3)
            assert made.readings == []
            assert made.gauges.problems == {}

    uvloop.run(scenario())


def test_a_command_that_no_model_needs_is_not_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        idle, needed = shell(f"touch {tmp_path}/ran; echo 1"), shell("echo 2")
        config = config_of({"needed": needed})
        config = config._replace(resources=Resources(1, commands={"idle": idle, "needed": needed}))
        async with bench(config) as made:
            await made.until(lambda: len(made.readings) > 2)
            assert {reading.resource for reading in made.readings} == {"needed"}
            assert not (tmp_path / "ran").exists()

    uvloop.run(scenario())


def test_a_command_gets_no_shell_no_input_and_none_of_the_gateways_own_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    monkeypatch.setenv("MMD_TEST", "kept")
    script = tmp_path / "report"
    script.write_text(
        f'#!/bin/sh\nenv > {tmp_path}/env\necho "$@" > {tmp_path}/args\ncat\nls -l /proc/self/fd > {tmp_path}/fd\necho 1\n'
    )
    script.chmod(0o755)

    async def scenario() -> None:
        async with bench(config_of({"scratch": Gauge((str(script), "$HOME", "a;b"), 0.1)})) as made:
            await made.until(lambda: made.readings)
            assert made.free()[0] == 1.0

    with socket.socket() as own:
        inode = os.fstat(own.fileno()).st_ino
        uvloop.run(scenario())
    variables = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert variables["MMD_TEST"] == "kept"
    assert not {"NOTIFY_SOCKET", "SSL_CERT_FILE"} & variables.keys()
    assert (tmp_path / "args").read_text() == "$HOME a;b\n"
    assert f"[{inode}]" not in (tmp_path / "fd").read_text(), "none of the gateway's connections"


def test_the_hosts_memory_is_what_the_kernel_says_less_a_reserve() -> None:
    """Read twice around the gauge; other programs may take or free some hundred megabytes meanwhile."""

    def meminfo(key: str) -> int:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) << 10

    async def scenario() -> float:
        async with bench(config_of({}, ram_bytes=None)) as made:
            await made.until(lambda: made.readings)
            assert made.gauges.problems == {}
            assert made.readings[0].resource == "ram"
            return made.free()[0]

    free = uvloop.run(scenario())
    reserve = min(0.05 * meminfo("MemTotal"), 4 * GIB)
    assert free == pytest.approx(meminfo("MemAvailable") - reserve, abs=GIB)
    assert host_ram_bytes(Config()) == pytest.approx(meminfo("MemTotal") - reserve, abs=1 << 20)


def test_simulated_models_have_no_end_of_host_memory() -> None:
    config = config_of({}, ram_bytes=None)._replace(gpus=Gpus(provider=Provider.SIM, devices=(Device(memory_bytes=GIB),)))

    async def scenario() -> None:
        async with bench(config) as made:
            await asyncio.sleep(0.05)  # /proc/meminfo is read at once, if at all
            assert not made.readings

    uvloop.run(scenario())
    assert host_ram_bytes(config) == math.inf


def test_a_size_of_ram_needs_no_gauge() -> None:
    async def scenario() -> None:
        async with bench(config_of({"x": shell("echo 1")}, ram_bytes=GIB)) as made:
            await made.until(lambda: len(made.readings) > 2)
            assert {reading.resource for reading in made.readings} == {"x"}

    uvloop.run(scenario())
