"""The runner's parts that need no process: its command line, the engine's log, macros, one HTTP check."""

import re
import selectors
import socket
import threading
from pathlib import Path

import pytest

from mmd.config import EngineKind
from mmd.engines import engine
from mmd.engines.base import HttpCall
from mmd.errors import MmdError
from mmd.names import Placement
from mmd.runner.check import HttpCheck, Outcome
from mmd.runner.launch import choose_port, engine_environment, expand, visible_devices
from mmd.runner.options import parse
from mmd.runner.output import EngineLog
from mmd.runner.process import describe_exit

FIXED = ["--model", "org/m", "--engine", "vllm", "--gpus", "0-1", "--definition", "abc", "--directory", "/run/mmd-model/m@0-1"]


def test_options() -> None:
    options = parse(
        [
            *FIXED,
            *("--listen", "tcp:18188", "--health-path=/up", "--health-interval", "0.1", "--health-timeout", "30"),
            *("--health-command", "a", "--health-command=--b=c", "--stop-command", "--", "--vram", "7", "--no-warm-up"),
            *("--gpu-memory", "0=24", "--gpu-memory=1=48", "--", "engine", "--", "--model"),
        ]
    )
    assert (options.model, options.engine, options.placement) == ("org/m", EngineKind.VLLM, Placement((0, 1)))
    assert (options.listen_tcp, options.port, options.id) == (True, 18188, "m")
    assert (options.health_path, options.health_interval_s, options.health_timeout_s) == ("/up", 0.1, 30.0)
    assert (options.health_command, options.stop_command) == (("a", "--b=c"), ("--",))
    assert (options.vram_bytes, options.gpu_memory_bytes, options.warm_up) == (7, {0: 24, 1: 48}, False)
    assert options.command == ("engine", "--", "--model")


def test_option_defaults() -> None:
    options = parse([*FIXED, "--", "engine"])
    assert (options.listen_tcp, options.health_path, options.health_interval_s) == (False, "/health", 0.05)
    assert (options.health_timeout_s, options.vram_bytes, options.warm_up) == (600.0, None, True)
    assert options.socket == Path("/run/mmd-model/m@0-1/engine.sock")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "x"], "--model is missing"),
        ([*FIXED], "no engine command"),
        ([*FIXED, "--", *()], "no engine command"),
        ([*FIXED, "--what", "--", "x"], "unknown argument '--what'"),
        ([*FIXED, "--vram"], "--vram needs a value"),
        ([*FIXED, "--vram", "7GiB", "--", "x"], "--vram: '7GiB'"),
        ([*FIXED, "--engine", "llm", "--", "x"], "--engine: 'llm'"),
        ([*FIXED, "--gpus", "gpu0", "--", "x"], "is not a placement"),
        ([*FIXED, "--listen", "udp", "--", "x"], "none of unix, tcp, tcp:PORT"),
        ([*FIXED, "--listen", "tcp:99999", "--", "x"], "none of unix, tcp, tcp:PORT"),
        ([*FIXED, "--gpu-memory", "24", "--", "x"], "is not INDEX=BYTES"),
    ],
)
def test_wrong_options(argv: list[str], words: str) -> None:
    with pytest.raises(MmdError, match=re.escape(words)):
        parse(argv)


class Journal:
    """An EngineLog with vLLM's patterns, and what it passed on."""

    def __init__(self) -> None:
        found = engine(EngineKind.VLLM)
        self.lines: list[bytes] = []
        self.log = EngineLog(found.progress, found.out_of_memory, self.lines.append)


def test_lines_are_passed_on_unchanged_however_they_arrive() -> None:
    journal = Journal()
    text = b"one\n\x1b[32mtwo\x1b[0m \xff\r\n  three  \n\nfour"
    for index in range(len(text)):
        journal.log.feed(text[index : index + 1])
    assert journal.lines == [b"one\n", b"\x1b[32mtwo\x1b[0m \xff\n", b"  three  \n"]
    journal.log.close()
    assert journal.lines[-1] == b"four\n"
    assert journal.log.tail == ("one", "two \ufffd", "  three", "four")


def test_a_progress_bar_gives_a_line_per_change_and_its_status_at_once() -> None:
    journal = Journal()
    bar = "Loading safetensors checkpoint shards: {:3d}% Completed | {}/40 [00:0{}<00:09]"
    for update in range(40):
        journal.log.feed(("\r" + bar.format(update // 10 * 25, update, update % 10)).encode())
        assert journal.log.status == f"loading weights {update // 10 * 25} %"
    journal.log.feed(b"\n")
    assert len(journal.lines) <= 6
    assert b"100%" not in b"".join(journal.lines)


def test_progress_is_what_was_not_said_before() -> None:
    journal = Journal()
    for number in range(50):
        journal.log.feed(f"GET /health 503 from 127.0.0.1:{40000 + number} in {number} ms\n".encode())
    assert journal.log.steps == 1
    for percent in range(5):
        journal.log.feed(f"Downloading: {percent}% of 14.{percent} GB\n".encode())
    assert journal.log.steps == 6


def test_what_is_kept_of_a_log_drives_no_terminal() -> None:
    journal = Journal()
    journal.log.feed(b"\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J\tend\xe2\x80\xae\n")
    assert journal.log.tail == ("red\\x1b]0;title\\x07 end\\u202e",)
    assert b"\x1b]0;title" in journal.lines[-1], "the journal has it as it was"


def test_a_flood_of_words_is_bounded() -> None:
    journal = Journal()
    for number in range(3000):
        word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        journal.log.feed(f"{word}\n".encode())
    assert journal.log.steps == 2000
    assert len(journal.log.tail) == 40
    journal.log.feed(b"x" * 100_000)
    assert len(journal.lines[-1]) == 100_001
    assert len(journal.log.tail[-1]) == 1000


def test_out_of_memory_before_and_after_readiness() -> None:
    journal = Journal()
    journal.log.feed(b"torch.OutOfMemoryError: CUDA out of memory.\n")
    assert journal.log.ran_out_of_memory
    journal.log.start_serving()
    assert not journal.log.ran_out_of_memory


def test_expand_touches_nothing_but_macros() -> None:
    values = {"{port}": "80", "{gpus}": "0,1", "{model}": "m"}
    words = ("--port={port}", '{"a": {"port": 1}}', "{gpus}{port}", "{model}", "{x}")
    assert expand(words, values, only=("{port}", "{gpus}")) == ("--port=80", words[1], "0,180", "{model}", "{x}")
    assert expand(("{model}",), values) == ("m",)


def test_environment_of_the_engine() -> None:
    given = {"PATH": "/bin", "NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "LISTEN_FDS": "1", "CUDA_VISIBLE_DEVICES": "7"}
    assert engine_environment(given, visible_devices(Placement((0, 2)))) == {
        "PATH": "/bin",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0,2",
    }
    assert engine_environment({}, visible_devices(Placement()))["CUDA_VISIBLE_DEVICES"] == ""


def test_choose_port() -> None:
    port = choose_port(None)
    assert choose_port(port) == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(MmdError, match=f"port {port} is not free"):
            choose_port(port)


def test_describe_exit() -> None:
    assert describe_exit(3 << 8) == "exited with status 3"
    assert describe_exit(9) == "was killed by SIGKILL"


def check(address: Path | int, *, timeout_s: float = 2.0) -> Outcome:
    """Drive one check to its end, as the supervisor's loop does."""
    found = HttpCheck(address, HttpCall("POST", "/v1/x", {"a": 1}, timeout_s=timeout_s))
    while found.outcome is None:
        with selectors.DefaultSelector() as selector:
            selector.register(found.descriptor, found.events)
            if selector.select(timeout_s):
                found.advance()
            else:
                found.expire()
    found.close()
    return found.outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ([b"HTTP/1.1 200 OK\r\n\r\n"], Outcome(healthy=True, text="answers 200", status=200)),
        ([b"HTT", b"P/1.0 ", b"404 Not Found"], Outcome(healthy=False, text="answers 404", status=404)),
        ([b"HTTP/1.1 503 Service Unavailable"], Outcome(healthy=False, text="answers 503", status=503)),
        ([b"SSH-2.0-OpenSSH"], Outcome(healthy=False, text="does not speak HTTP")),
        ([], Outcome(healthy=False, text="closed the connection")),
    ],
)
def test_http_check(tmp_path: Path, answer: list[bytes], outcome: Outcome) -> None:
    received = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                received.append(connection.recv(4096))
                for part in answer:
                    connection.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        assert check(tmp_path / "s") == outcome
        thread.join()
    head, _, body = received[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert b"Content-Length: 8" in head
    assert body == b'{"a": 1}'


def test_http_check_without_a_server(tmp_path: Path) -> None:
    assert check(tmp_path / "missing").text == "refuses connections"
    assert check(choose_port(None)).text == "refuses connections"


def test_http_check_that_is_not_answered(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        outcome = check(tmp_path / "s", timeout_s=0.1)
    assert (outcome.text, outcome.timed_out) == ("does not answer", True)


def test_a_full_backlog_is_not_a_dead_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        first.connect(str(tmp_path / "s"))
        assert check(tmp_path / "s").timed_out
