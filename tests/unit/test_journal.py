"""mmd.systemd.journal with a journalctl that prints what the test wants; with the real one: tests/integration."""

import asyncio
import json
import os
from contextlib import aclosing
from pathlib import Path

import pytest

from mmd.errors import MmdError
from mmd.systemd.journal import ENTRY_FIELDS, JournalEntry, command, entries

INSTANCES = ["mmd-model-qwen@0.service", "mmd-model-qwen@0-1.service", "mmd-model-qwen-large@0.service", "ssh.service"]


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named journalctl that prints the file `output`, after noting its arguments in `arguments`."""
    program = tmp_path / "journalctl"
    program.write_text('#!/bin/sh\ncd "${0%/*}"\nprintf "%s\\n" "$@" >arguments\ncat output\n')
    program.chmod(0o755)
    (tmp_path / "output").write_text("".join(f"{unit}\n" for unit in INSTANCES))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def read(argv: list[str]) -> list[JournalEntry]:
    async def collect() -> list[JournalEntry]:
        async with aclosing(entries(argv)) as found:
            return [entry async for entry in found]

    return asyncio.run(collect())


def test_one_model(journalctl: Path) -> None:
    argv = command("qwen", "mmd-model-qwen@*.service")
    assert argv == [
        "journalctl",
        "MMD_MODEL=qwen",
        "+",
        "UNIT=mmd-model-qwen@0-1.service",
        "UNIT=mmd-model-qwen@0.service",
    ]
    assert (journalctl / "arguments").read_text().split() == ["--quiet", "--field=UNIT"]


def test_all_models_of_a_user(journalctl: Path) -> None:
    owner = f"_UID={os.getuid()}"
    argv = command(None, "mmd-model-*@*.service", user=True)
    assert argv[:5] == ["journalctl", owner, "MMD_ROLE=model", "+", owner]
    units = sorted(INSTANCES[:3])
    about, by = ([f"{field}={unit}" for unit in units] for field in ("USER_UNIT", "_SYSTEMD_USER_UNIT"))
    assert argv[5:] == [*about, "+", owner, *by]


def test_a_model_that_never_ran(journalctl: Path) -> None:
    assert command("new", "mmd-model-new@*.service") == ["journalctl", "MMD_MODEL=new"]


def test_options(journalctl: Path) -> None:
    argv = command("m", "mmd-model-m@*.service", follow=True, lines=20, since="-1h", output="json", fields=ENTRY_FIELDS)
    assert argv == [
        "journalctl",
        "--follow",
        "--lines=20",
        "--since=-1h",
        "--output=json",
        f"--output-fields={','.join(ENTRY_FIELDS)}",
        "--all",
        "MMD_MODEL=m",
    ]


def test_no_journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MmdError, match="cannot read the journal"):
        command("m", "mmd-model-m@*.service")
    with pytest.raises(MmdError, match="cannot run journalctl"):
        read(["journalctl"])


def test_entries(journalctl: Path) -> None:
    lines = [
        {
            "__REALTIME_TIMESTAMP": "1700000000500000",
            "MESSAGE": "loading weights 45 %",
            "PRIORITY": "4",
            "MMD_MODEL": "m",
            "_SYSTEMD_UNIT": "mmd-model-m@0.service",
            "SYSLOG_IDENTIFIER": "mmd-runner",
            "_PID": "42",
        },
        {
            "__REALTIME_TIMESTAMP": "0",
            "MESSAGE": [27, 91, 109, 255],
            "UNIT": "mmd-model-m@0.service",
            "_SYSTEMD_UNIT": "init.scope",
        },
        {"__REALTIME_TIMESTAMP": "0", "MESSAGE": ["first", "second"], "USER_UNIT": "mmd-model-m@0.service"},
        {"__REALTIME_TIMESTAMP": "0", "MESSAGE": "x" * (1 << 21)},
        {"__REALTIME_TIMESTAMP": "0", "MESSAGE": None},
    ]
    (journalctl / "output").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unit = "mmd-model-m@0.service"
    assert read(["journalctl"]) == [
        JournalEntry(1700000000.5, "loading weights 45 %", 4, "m", unit, "mmd-runner", 42),
        JournalEntry(0, "\x1b[m\ufffd", 6, "", unit, "", 0),
        JournalEntry(0, "second", 6, "", unit, "", 0),
        JournalEntry(0, "", 6, "", "", "", 0),
    ]


def test_failure_is_told(journalctl: Path) -> None:
    (journalctl / "journalctl").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    with pytest.raises(MmdError, match="journalctl: no such option"):
        read(["journalctl", "--bad"])


def test_closing_ends_journalctl(journalctl: Path) -> None:
    (journalctl / "journalctl").write_text(
        '#!/bin/sh\necho $$ >"${0%/*}/pid"\necho \'{"__REALTIME_TIMESTAMP": "0", "MESSAGE": "one"}\'\nexec sleep 60\n'
    )

    async def first() -> str:
        async with aclosing(entries(["journalctl", "--follow"])) as found:
            async for entry in found:
                return entry.message
        return ""

    assert asyncio.run(first()) == "one"
    assert not Path("/proc", (journalctl / "pid").read_text().strip()).exists()
