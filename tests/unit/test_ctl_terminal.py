"""mmdctl on a terminal: a pseudo-terminal of a known size, read as a person would."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from ctl_gateway import Gateway, example, serving

from mmd.ctl.table import Cell, Column, table
from mmd.ctl.terminal import Terminal, fit, printable
from mmd.ctl.words import duration, gib, moment
from mmd.status import ModelState, Progress

MMDCTL = str(Path(sys.executable).with_name("mmdctl"))


def on_terminal(
    words: list[str],
    *,
    columns: int,
    environment: dict[str, str] | None = None,
    wait_for: bytes = b"",
    then: threading.Event | None = None,
) -> tuple[int, str]:
    """The exit status and all that a terminal of `columns` columns received. Sets `then` once it shows `wait_for`."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    variables |= {"TERM": "xterm-256color", "PYTHONUTF8": "1", **(environment or {})}
    with subprocess.Popen([MMDCTL, *words], stdin=slave, stdout=slave, stderr=slave, env=variables) as process:
        os.close(slave)
        received = bytearray()
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # EIO: the last writer has closed the terminal, see pty(7)
                break
            if not chunk:
                break
            received += chunk
            if then is not None and wait_for in received:
                then.set()
        code = process.wait(timeout=20)
    os.close(master)
    return code, received.decode().replace("\r\n", "\n")


def test_progress_rewrites_one_line_and_ends_with_a_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    later = threading.Event()
    gateway = Gateway(
        example(time.time()),
        {
            ("demo/idle", "start"): [
                Progress("demo/idle", ModelState.STARTING, "loading weights 45 %"),
                later,
                Progress("demo/idle", ModelState.READY, "ready in 1.8 s, 14.2 GiB", done=True),
            ]
        },
    )
    with serving(gateway, path):
        words = ["--socket", str(path), "start", "idle"]
        ticks = b"demo/idle: loading weights 45 % (1."  # it says how long it has taken, though nothing new has come
        code, text = on_terminal(words, columns=60, wait_for=ticks, then=later)
    assert code == 0
    shown = text.split("\r\x1b[2K")
    assert shown[-1] == "\x1b[32mdemo/idle\x1b[0m: ready in 1.8 s, 14.2 GiB\n"
    assert "\n" not in "".join(shown[:-1])
    assert all(len(line) <= 60 for line in shown[:-1])


@pytest.mark.parametrize("columns", [160, 100, 80, 60, 40])
def test_status_fits_the_window(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "admin.sock"
    with serving(Gateway(example(time.time())), path):
        code, text = on_terminal(["--socket", str(path), "status"], columns=columns, environment={"NO_COLOR": "1"})
    assert code == 0
    assert "\x1b" not in text
    tables = [line for line in text.splitlines() if line.startswith(("GPU", "MODEL", "demo/"))]
    assert len(tables) == 7
    assert all(len(line) <= columns for line in tables), text
    assert all("GiB" in line or "failed" in line or "stopped" in line for line in tables[2:])


def test_colours_mark_states_only_where_they_work(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with serving(Gateway(example(time.time())), path):
        _, coloured = on_terminal(["--socket", str(path), "status"], columns=120)
        _, dumb = on_terminal(["--socket", str(path), "status"], columns=120, environment={"TERM": "dumb"})
    assert "\x1b[32mready\x1b[0m" in coloured
    assert "\x1b[31mfailed\x1b[0m" in coloured
    assert "\x1b" not in dumb


def test_a_narrow_table_drops_columns_in_order_then_cuts_the_elastic_one() -> None:
    columns = [Column("NAME", elastic=True), Column("A", drop=2), Column("B", drop=1), Column("EMPTY OR NOT", right=True)]
    rows = [[Cell("a-very-long-name"), Cell("aaaa"), Cell("bbbb"), Cell("1")]]
    assert table(columns, rows, Terminal(width=None))[1] == "a-very-long-name  aaaa  bbbb             1"
    assert table(columns, rows, Terminal(width=34, unicode=True))[1] == "a-very-long-n…  aaaa             1"
    assert table(columns, rows, Terminal(width=24))[1] == "a-very-...             1"


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (-5, "0.0 s"),
        (0.0, "0.0 s"),
        (1.84, "1.8 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (754, "12 min"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_in_words(duration_s: float, text: str) -> None:
    assert duration(duration_s) == text


def test_sizes_and_moments_in_words() -> None:
    assert gib(24 << 30) == "24.0"
    now_s = time.mktime((2026, 11, 20, 15, 0, 0, 0, 0, -1))
    assert moment(now_s - 60, now_s) == "14:59:00"
    assert moment(now_s - 86400, now_s) == "Nov 19 15:00"


def test_text_is_cut_and_cleaned() -> None:
    assert fit("abcdef", 4) == "abc…"
    assert fit("abcdef", 2, ellipsis="...") == "ab"
    assert printable("a\x1b[31mb\x07\tc\nd\x9b") == "ab\\x07 c d\\x9b"
    assert printable("\x1b]0;title\x07\x1b[2J\u202ex") == "\\x1b]0;title\\x07\\x1b[2J\\u202ex"
