"""A runner's report as the gateway reads it: an engine can put anything in its place."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmd.config import Gpus
from mmd.gpu.sim import SimProvider
from mmd.report import FailureReason, Report
from mmd.sim.ledger import Ledger

HONEST = Report("0123456789abcdef" * 2, "abc", "http://127.0.0.1:8123", ready=True, load_s=1.5, warm_up_s=0.25)
FAILED = Report("ab" * 16, "abc", "unix:/x", failure=FailureReason.EXITED, message="it exited", tail=("one", "\ttwo é 三"))


def read(directory: Path, text: str | bytes) -> Report | None:
    (directory / "report.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Report.read(directory)


@pytest.mark.parametrize("report", [HONEST, FAILED], ids=["ready", "failed"])
def test_a_runners_report_is_read_as_it_was_written(tmp_path: Path, report: Report) -> None:
    assert read(tmp_path, report.to_json()) == report


def changed(**fields: object) -> str:
    return json.dumps(json.loads(FAILED.to_json()) | fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        b"\xff",
        "9" * 5000,
        changed(invocation="../../x"),
        changed(invocation=5),
        changed(load_s="1"),
        changed(load_s=-1),
        changed(load_s=True),
        changed(load_s=float("nan")),
        changed(warm_up_s=float("inf")),
        changed(warm_up_s=10**400),
        changed(failure="hungry"),
        changed(failure=["exited"]),
        changed(message=None),
        changed(message=["x"]),
        changed(tail="text"),
        changed(tail=[1]),
        changed(endpoint=None),
        changed(definition={}),
        changed(message="x" * (256 << 10)),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_what_is_no_report_is_none(tmp_path: Path, text: str | bytes) -> None:
    assert read(tmp_path, text) is None


def test_what_a_report_says_can_be_shown_and_encoded(tmp_path: Path) -> None:
    ugly = "a\ud800b\x1b[2Jc\nd\x00e\u202ef"
    report = read(tmp_path, changed(message=ugly, definition=ugly, tail=[ugly]))
    assert report is not None
    for text in (report.message, report.definition, *report.tail):
        assert text == "a\ufffdb\ufffd[2Jc\ufffdd\ufffde\ufffdf"
        assert text.encode()


def test_what_a_report_says_is_bounded(tmp_path: Path) -> None:
    report = read(tmp_path, changed(message="m" * 5000, tail=["t" * 2000] * 60, endpoint="e" * 5000))
    assert report is not None
    assert (len(report.message), len(report.tail), len(report.tail[0])) == (1000, 40, 1000)


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://127.0.0.1:8123", 8123),
        ("http://127.0.0.1:0", None),
        ("http://127.0.0.1:65536", None),
        ("http://127.0.0.1:80/x", None),
        ("http://127.0.0.1:80@evil:90", None),
        ("http://169.254.169.254:80", None),
        ("unix:/run/mmd/registrar.sock", None),
    ],
)
def test_a_report_tells_a_port_at_most(endpoint: str, port: int | None) -> None:
    assert Report("", "", endpoint).port == port


def fifo(path: Path) -> None:
    os.mkfifo(path)


def to_shadow(path: Path) -> None:
    path.symlink_to("/etc/shadow")


def to_a_report(path: Path) -> None:
    other = path.parent / "other"
    other.write_text(HONEST.to_json())
    path.symlink_to(other)


def second_name(path: Path) -> None:
    other = path.parent / "other"
    other.write_text(HONEST.to_json())
    path.hardlink_to(other)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


@pytest.mark.parametrize("put", [fifo, Path.mkdir, to_shadow, to_a_report, second_name, huge])
def test_what_stands_in_place_of_a_report_is_neither_followed_nor_waited_for(
    tmp_path: Path, put: Callable[[Path], object]
) -> None:
    put(tmp_path / "report.json")
    begun = time.monotonic()
    assert Report.read(tmp_path) is None
    assert time.monotonic() - begun < 0.5


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root")
def test_a_report_of_another_user_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, HONEST.to_json()) == HONEST
    os.chown(tmp_path / "report.json", 64_321, 64_321)
    assert Report.read(tmp_path) is None


# The ledger of simulated GPUs, which every simulated engine can write.


@pytest.mark.parametrize("put", [fifo, Path.mkdir, to_shadow, to_a_report, second_name, huge])
def test_the_ledger_passes_over_what_is_no_allocation(tmp_path: Path, put: Callable[[Path], object]) -> None:
    ledger = Ledger(tmp_path)
    claim = ledger.claim(5, owner="m", totals={0: 10})
    put(tmp_path / "gpu0-evil")
    begun = time.monotonic()
    assert [each.bytes for each in ledger.read()] == [5]
    assert time.monotonic() - begun < 0.5
    claim.release()
    assert ledger.read() == ()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"gpu": 0}', '{"gpu": 0, "bytes": -1, "owner": "m", "pid": 1}',
     '{"gpu": "0", "bytes": 1, "owner": "", "pid": 1}',
     '{"gpu": 0, "bytes": 1e999, "owner": "m", "pid": 1}', "[" * 4000],
    ids=lambda text: repr(text)[:30],
)  # fmt: skip
def test_a_locked_file_that_is_no_allocation_is_passed_over(tmp_path: Path, text: str) -> None:
    import fcntl

    ledger = Ledger(tmp_path)
    (tmp_path / ".lock").touch()
    with (tmp_path / "gpu0-evil").open("w") as file:
        file.write(text)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ledger.read() == ()


@pytest.mark.parametrize("put", [fifo, to_shadow])
def test_a_ledger_whose_lock_is_no_file_does_not_stop_the_gateway(tmp_path: Path, put: Callable[[Path], object]) -> None:
    import asyncio

    from mmd.errors import MmdError

    put(tmp_path / ".lock")

    async def sample() -> None:
        async with asyncio.timeout(2):
            with pytest.raises(MmdError):
                await SimProvider(Gpus(), tmp_path).sample()

    asyncio.run(sample())
