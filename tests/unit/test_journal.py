"""mmd.systemd.journal with a journalctl that prints what the test wants; with the real one: tests/integration, tests/attack."""

import asyncio
import json
import os
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd.errors import MmdError
from mmd.systemd.journal import JournalEntry, JournalQuery, command, entries
from mmd.systemd.journal_service import parse_query
from mmd.systemd.request import RequestError

UNIT = "mmd-model-m@0.service"
BASE: dict[str, object] = {
    "__CURSOR": "c",
    "__REALTIME_TIMESTAMP": "1700000000500000",
    "MESSAGE": "said",
    "_PID": "42",
    "_SYSTEMD_UNIT": UNIT,
}


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named journalctl that prints the file `output`, or `coming` when it follows, and notes its arguments."""
    program = tmp_path / "journalctl"
    program.write_text(
        '#!/bin/sh\ncd "${0%/*}"\necho "$@" >>arguments\ncase $* in *--follow*) cat coming ;; *) cat output ;; esac\n'
    )
    program.chmod(0o755)
    for name in ("output", "coming"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def prints(file: Path, *found: dict[str, object]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in found))


def read(query: JournalQuery, *, user: bool = False) -> list[JournalEntry]:
    async def collect() -> list[JournalEntry]:
        async with aclosing(entries(query, user=user)) as found:
            return [entry async for entry in found]

    return asyncio.run(collect())


def test_commands() -> None:
    units = ["--unit=mmd-model-qwen@*.service", "--unit=mmd-fetch-qwen.service"]
    assert command(JournalQuery("qwen"), user=False) == ["journalctl", *units]
    assert command(JournalQuery(None, 20, since="-1h"), user=True) == [
        "journalctl",
        "--lines=20",
        "--since=-1h",
        "--user-unit=mmd-*",
    ]
    assert command(JournalQuery("m", 20, after="s=1;i=2"), user=False) == [
        "journalctl",
        "--after-cursor=s=1;i=2",
        "--unit=mmd-model-m@*.service",
        "--unit=mmd-fetch-m.service",
    ]


def test_no_journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MmdError, match="cannot run journalctl"):
        read(JournalQuery())


def test_entries(journalctl: Path) -> None:
    prints(
        journalctl / "output",
        {**BASE, "PRIORITY": "4", "SYSLOG_IDENTIFIER": "mmd-runner"},
        {**BASE, "MESSAGE": [27, 91, 109, 255], "PRIORITY": "9999999999999999999999999"},
        {**BASE, "MESSAGE": ["first", "second"], "PRIORITY": "\u0663"},
        {**BASE, "MESSAGE": "x" * (1 << 21)},
        {**BASE, "MESSAGE": None, "PRIORITY": []},
        {**BASE, "MESSAGE": "y" * 100_000, "_SYSTEMD_UNIT": "init.scope", "UNIT": UNIT, "_PID": "1"},
    )
    assert read(JournalQuery("m")) == [
        JournalEntry(1700000000.5, "said", 4, "m", UNIT, "mmd-runner", 42, "c"),
        JournalEntry(1700000000.5, "\x1b[m\ufffd", 6, "m", UNIT, "", 42, "c"),
        JournalEntry(1700000000.5, "second", 6, "m", UNIT, "", 42, "c"),
        JournalEntry(1700000000.5, "", 6, "m", UNIT, "", 42, "c"),
        JournalEntry(1700000000.5, "y" * (48 << 10), 6, "", UNIT, "", 1, "c"),
    ]


FORGED: list[dict[str, object]] = [
    {"_SYSTEMD_UNIT": "session-1.scope", "MMD_MODEL": "m", "MMD_ROLE": "model"},
    {"_SYSTEMD_UNIT": "session-1.scope", "UNIT": UNIT},
    {"_SYSTEMD_UNIT": "session-1.scope", "UNIT": UNIT, "_PID": ["1", "42"]},
    {"_SYSTEMD_UNIT": "mmd-model-other@0.service", "MMD_MODEL": "m", "UNIT": UNIT},
    {"_SYSTEMD_UNIT": "user@1000.service", "_SYSTEMD_USER_UNIT": UNIT, "USER_UNIT": UNIT},
    {"_SYSTEMD_UNIT": "mmd-model-m@0.socket"},
    {"_SYSTEMD_UNIT": "mmd-model-m2@0.service"},
    {"_SYSTEMD_UNIT": "mmd-fetch-m2.service", "MMD_MODEL": "m"},
]


def test_what_fetches_a_models_weights_speaks_of_the_model(journalctl: Path) -> None:
    prints(journalctl / "output", {**BASE, "_SYSTEMD_UNIT": "mmd-fetch-m.service"})
    assert [entry.unit for entry in read(JournalQuery("m"))] == ["mmd-fetch-m.service"]


def test_what_others_say_of_a_model_is_left_out(journalctl: Path) -> None:
    for name in ("output", "coming"):
        prints(journalctl / name, *({**BASE, "MESSAGE": "forged", **each} for each in FORGED))
    assert read(JournalQuery("m", follow=True)) == []


def test_what_other_users_say_is_left_out(journalctl: Path) -> None:
    mine = {**BASE, "_SYSTEMD_UNIT": "user@0.service", "_SYSTEMD_USER_UNIT": UNIT, "_UID": str(os.getuid())}
    prints(journalctl / "output", mine, {**mine, "_UID": "12345"}, {**mine, "_SYSTEMD_USER_UNIT": "x.service"})
    assert len(read(JournalQuery("m"), user=True)) == 1


def test_what_comes_is_found_whatever_its_instance_and_only_once(journalctl: Path) -> None:
    late = {**BASE, "__REALTIME_TIMESTAMP": "32503680000000000"}
    prints(journalctl / "output", BASE, {**late, "__CURSOR": "d"})
    prints(
        journalctl / "coming", {**late, "__CURSOR": "d"}, {**late, "__CURSOR": "e", "_SYSTEMD_UNIT": "mmd-model-m@1.service"}
    )
    assert [entry.cursor for entry in read(JournalQuery("m", 2, follow=True))] == ["c", "d", "e"]
    assert [entry.cursor for entry in read(JournalQuery("m", 0, follow=True))] == ["d", "e"]
    assert (journalctl / "arguments").read_text().splitlines()[-1].endswith("MMD_MODEL=m + _PID=1")


def test_failure_is_told(journalctl: Path) -> None:
    (journalctl / "journalctl").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    with pytest.raises(MmdError, match="journalctl: no such option"):
        read(JournalQuery())


def test_closing_ends_journalctl(journalctl: Path) -> None:
    (journalctl / "journalctl").write_text(
        f"#!/bin/sh\necho $$ >\"${{0%/*}}/pid\"\necho '{json.dumps(BASE)}'\nexec sleep 60\n",
    )

    async def first() -> str:
        async with aclosing(entries(JournalQuery("m", 0, follow=True), user=False)) as found:
            async for entry in found:
                return entry.message
        return ""

    assert asyncio.run(first()) == "said"
    assert not Path("/proc", (journalctl / "pid").read_text().strip()).exists()


RIGHT = {"model": "m", "lines": 5, "follow": True, "after": ""}


def test_requests_to_the_reader() -> None:
    assert parse_query(json.dumps(RIGHT).encode()) == JournalQuery("m", 5, follow=True)
    later = {"model": None, "lines": 0, "follow": False, "after": "s=0a;i=1"}
    assert parse_query(json.dumps(later).encode()) == JournalQuery(None, 0, after="s=0a;i=1")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "*"},
        {"model": "m\n"},
        {"model": "M"},
        {"model": "m@0.service + _UID=0"},
        {"model": ""},
        {"model": 1},
        {"model": "\ud800"},
        {"lines": -1},
        {"lines": True},
        {"lines": 10_001},
        {"lines": "5"},
        {"lines": None},
        {"follow": 1},
        {"after": "--file=/etc/shadow"},
        {"after": "s=0;i=1\n"},
        {"after": None},
        {"unit": "ssh.service"},
    ],
)
def test_other_requests_to_the_reader_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        parse_query(json.dumps({**RIGHT, **change}).encode())


@given(st.binary(max_size=1500))
def test_any_bytes_to_the_reader(raw: bytes) -> None:
    try:
        query = parse_query(raw)
    except RequestError:
        return
    assert query.model is None or query.model.isascii()
