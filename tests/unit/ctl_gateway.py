"""A gateway for mmdctl's tests: the admin API on a Unix socket, with answers written as typed values."""

import json
import socketserver
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import unquote

from mmd.ctl.client import Reloaded
from mmd.sizes import estimate
from mmd.status import (
    EstimateStatus,
    GatewayStatus,
    GpuStatus,
    InstanceStatus,
    ModelState,
    ModelStatus,
    Progress,
    Reckoning,
    RequestStatus,
    SleepStatus,
    Status,
)

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error before the answer begins, in the OpenAI error shape."""

    status: int
    message: str


class BreakOff:
    """The gateway dies in the middle of an answer."""


Step: TypeAlias = Progress | threading.Event | threading.Barrier | BreakOff
"""A line of an operation's answer; an Event or a Barrier holds the answer back."""


@dataclass(slots=True)
class Gateway:
    """What the gateway answers, and what it was asked."""

    status: Status
    operations: Mapping[tuple[str, str], Sequence[Step] | Refusal] = field(default_factory=dict)
    """By model and verb."""
    reloaded: Reloaded = field(default_factory=Reloaded)
    requests: Sequence[RequestStatus] = ()
    events: list[bytes] = field(default_factory=list)
    """Streams of events, one for each time that somebody asks."""
    keys_status: int = 200
    """The answer to new API keys."""
    keys_first: int | None = None
    """The answer to the first ones, if another."""
    asked: list[tuple[str, str, object]] = field(default_factory=list)
    """Method, path, body."""


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, gateway: Gateway) -> None:
        super().__init__(str(path), _Handler)
        self.gateway = gateway


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _gateway(self) -> Gateway:
        return cast("_Server", self.server).gateway

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        self._gateway.asked.append(("GET", self.path, self.headers.get("Last-Event-ID")))
        if self.path == "/api/v1/requests":
            self._answer(200, {"requests": [each.to_json() for each in self._gateway.requests]})
        elif self.path.startswith("/api/v1/events?"):
            self._write(200, "text/event-stream", self._gateway.events.pop(0))
        else:
            self._answer(200, self._gateway.status.to_json())

    def do_DELETE(self) -> None:
        self._gateway.asked.append(("DELETE", self.path, None))
        wanted = unquote(self.path.removeprefix("/api/v1/requests/"))
        found = next((each for each in self._gateway.requests if each.id == wanted), None)
        if found is None:
            self._answer(404, {"error": {"message": f"there is no request {wanted!r} under way", "code": "no_such_request"}})
        else:
            self._answer(200, found.to_json())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        self._gateway.asked.append(("POST", self.path, body))
        if self.path == "/api/v1/reload":
            self._answer(200, asdict(self._gateway.reloaded))
            return
        model, verb = self.path.removeprefix("/api/v1/models/").split("/")
        steps = self._gateway.operations[unquote(model), verb]
        if isinstance(steps, Refusal):
            self._answer(steps.status, {"error": {"message": steps.message, "type": "invalid_request_error", "code": None}})
        else:
            self._stream(steps)

    def do_PUT(self) -> None:
        assert self.headers["Content-Type"] == "application/yaml"
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._gateway.asked.append(("PUT", self.path, body))
        status = self._gateway.keys_first or self._gateway.keys_status
        self._gateway.keys_first = None
        self._answer(status, {} if status == 200 else {"error": {"message": f"answered {status}", "code": None}})

    def _answer(self, status: int, value: object) -> None:
        self._write(status, "application/json", json.dumps(value).encode())

    def _write(self, status: int, media: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, steps: Sequence[Step]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in steps:
            if isinstance(step, BreakOff):
                self.close_connection = True
                return
            if isinstance(step, threading.Event):
                assert step.wait(20)
                continue
            if isinstance(step, threading.Barrier):
                step.wait(20)
                continue
            line = json.dumps(step.to_json()).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def serving(gateway: Gateway, path: Path) -> Iterator[Gateway]:
    """`gateway` on the Unix socket `path`."""
    with _Server(path, gateway) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield gateway
        finally:
            server.shutdown()
            thread.join()


def example(now_s: float) -> Status:
    """A gateway with one GPU and a model in each of the states that look different."""
    tail = tuple(f"log line {number}" for number in range(7))
    return Status(
        gateway=GatewayStatus(
            version="0.1.0", pid=812, since=now_s - 11_520, listen=("127.0.0.1:8000", "/run/api.sock"), in_flight=2, waiting=1
        ),
        gpus=(
            GpuStatus(
                index=0, name="NVIDIA H100", uuid="GPU-1", total_bytes=24 * GIB, budget_bytes=23 * GIB,
                reserved_bytes=14 * GIB, used_bytes=int(14.2 * GIB),
            ),
        ),
        models=(
            _model("demo/llama-8b", "llama", ModelState.READY, now_s, vram_gib=14, in_flight=2, aliases=("gpt-4o-mini",)),
            _model(
                "demo/qwen-7b", "qwen", ModelState.SLEEPING, now_s, vram_gib=1, sleep_level=1, last_activity=now_s - 754,
                reckoning=estimated(),
            ),
            _model("demo/mistral", "mistral", ModelState.STARTING, now_s, vram_gib=8, status="loading weights 45 %", waiting=1),
            _model("demo/broken", "broken", ModelState.FAILED, now_s, reason="it exited with status 1", tail=tail),
            ModelStatus("demo/idle", "idle", "sim", ModelState.STOPPED, vram_bytes=6 * GIB, gpus=1, description="Never asked"),
        ),
    )  # fmt: skip


def estimated() -> Reckoning:
    """A model that was measured, and slept at level 1, but has never been woken."""
    made_of = estimate(7.6e9)
    return Reckoning(
        vram_bytes=int(17.9 * GIB), start_s=47.2, start_learned=True,
        estimate=EstimateStatus(
            7.6e9, "bf16", 2.0, 1, made_of.weights_bytes, made_of.kv_cache_bytes, made_of.overhead_bytes, made_of.total_bytes
        ),
        measured_bytes=int(17.9 * GIB),
        asleep=(SleepStatus(1, int(1.2 * GIB), True, int(14.2 * GIB), 2.9, False),),
    )  # fmt: skip


def _model(
    name: str,
    id: str,  # noqa: A002 - ModelStatus's name
    state: ModelState,
    now_s: float,
    *,
    vram_gib: int = 0,
    in_flight: int = 0,
    waiting: int = 0,
    sleep_level: int = 0,
    status: str = "",
    aliases: tuple[str, ...] = (),
    reason: str = "",
    tail: tuple[str, ...] = (),
    last_activity: float | None = None,
    reckoning: Reckoning | None = None,
) -> ModelStatus:
    instance = InstanceStatus(
        unit=f"mmd-model-{id}@0.service", placement="0", state=state, since=now_s - 3600, sleep_level=sleep_level,
        status=status, vram_bytes=vram_gib * GIB, in_flight=in_flight, pid=900,
    )  # fmt: skip
    return ModelStatus(
        name, id, "sim", state, aliases=aliases, instances=(instance,), vram_bytes=vram_gib * GIB, gpus=1, in_flight=in_flight,
        waiting=waiting, reason=reason, tail=tail, last_activity=last_activity, reckoning=reckoning,
    )  # fmt: skip
