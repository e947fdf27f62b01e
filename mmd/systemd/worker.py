"""The D-Bus worker: a process of its own that holds one connection to systemd for the gateway.

In a system instance systemd starts it, as root without capabilities, one for each connection to mmd-unit-broker.socket
(`mmd.systemd.broker`, docs/decisions/unit-broker.md): the gateway itself has no rights over units. In a user's own instance it
is a child of the gateway.

Why a process. pystemd calls sd-bus synchronously and does not release the GIL, so neither the event loop nor a thread may use
it: a StartUnit issued while a daemon-reload took 3 s stalled an asyncio loop for 2.8 s, with a worker process for 8 ms. One
JSON object per line goes each way over a Unix socket, which is this process's standard input.

Why it never reconnects. A worker is one connection: when the bus goes away it says so and exits, and the client starts another.
So the death of dbus-daemon, of this process and a bus that is not there yet are one case, and what sd-bus leaves behind in a
closed connection (close() twice aborts; pystemd does not release the message of a failed call) goes with the process.

Facts about sd-bus that the code relies on:
- Signals that arrive during a synchronous call wait in sd-bus's own queue while the file descriptor is not readable: process()
  must run until it is empty after every call, or their callbacks never fire.
- For the same reason no callback runs during a call. The job of a StartUnit is therefore registered before the signal that ends
  it is looked at, even if that signal arrived before the reply: no result is lost.
- Callbacks must be plain functions and must be kept alive, since sd-bus borrows the pointer. What they raise becomes a
  SystemError out of process().
- When the bus is gone, sd-bus closes its descriptor and process() says so once, by a message without a body.
- Asking for a property of a unit that is not loaded loads it, which systemd announces as UnitNew and not as PropertiesChanged.
  A unit that is started for the first time may be announced by UnitNew alone. So UnitNew is followed by a read only if the unit
  is still loaded (GetUnit does not load it); else reading and announcing would follow each other for ever.
- Ten properties one by one take 1 ms, GetAll 4 ms and 5 MB more memory, so single properties are read.
- While systemd is flooded with STATUS messages (thousands in a second) it answers no call; the signals that arrive meanwhile
  wait in sd-bus's queue, which ends at 65536 messages. Only the rate of the runners' messages keeps that short.
"""

import errno
import json
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pystemd.dbusexc import DBusBaseError, DBusDisconnectedError
from pystemd.dbuslib import DBus, apply_signature, path_decode, path_encode

from mmd.names import MODEL_UNIT_PATTERN, is_model_unit
from mmd.systemd.request import REQUEST_BYTES, RequestError, UnitCall, UnitRequest, parse_request

__all__ = ["main", "serve"]

_DESTINATION: Final = b"org.freedesktop.systemd1"
_ROOT: Final = b"/org/freedesktop/systemd1"
_MANAGER: Final = b"org.freedesktop.systemd1.Manager"
_UNITS: Final = b"/org/freedesktop/systemd1/unit"
_UNIT: Final = b"org.freedesktop.systemd1.Unit"
_SERVICE: Final = b"org.freedesktop.systemd1.Service"

# Key of UnitState -> where systemd keeps it: interface, property, D-Bus type.
_PROPERTIES: Final = {
    "load_state": (_UNIT, b"LoadState", b"s"),
    "active_state": (_UNIT, b"ActiveState", b"s"),
    "sub_state": (_UNIT, b"SubState", b"s"),
    "result": (_SERVICE, b"Result", b"s"),
    "status_text": (_SERVICE, b"StatusText", b"s"),
    "invocation_id": (_UNIT, b"InvocationID", b"ay"),
    "main_pid": (_SERVICE, b"MainPID", b"u"),
    "restarts": (_SERVICE, b"NRestarts", b"u"),
    "exit_status": (_SERVICE, b"ExecMainStatus", b"i"),
}
_STATE_CHANGE: Final = (_UNIT, b"StateChangeTimestamp", b"t")
_FRAGMENT: Final = (_UNIT, b"FragmentPath", b"s")

# How often a unit that changes while it is being read is read again; the signal of the change causes one more read anyway.
_READ_ATTEMPTS: Final = 3

_JOB_METHODS: Final = {
    UnitCall.START: b"StartUnit",
    UnitCall.STOP: b"StopUnit",
    UnitCall.RESTART: b"RestartUnit",
}

_INVALID_ARGUMENTS: Final = "org.freedesktop.DBus.Error.InvalidArgs"
_ACCESS_DENIED: Final = "org.freedesktop.DBus.Error.AccessDenied"

# Between two attempts to read a unit: systemd may be off the bus because it re-executes itself.
_RETRY_DELAY_S: Final = 0.05

_RECEIVE_BYTES: Final = 65536

# How long the peer may leave a line untaken. The gateway takes it at once; one that never does would keep this process.
_SEND_TIMEOUT_S: Final = 60.0


class _NotOursError(Exception):
    """The unit is not one that mmd-generator has made, whatever its name."""


class _Worker:
    def __init__(self, peer: socket.socket, bus: Any, templates: Path | None) -> None:
        self._peer = peer
        self._bus = bus
        self._templates = templates
        self._received = b""
        self._jobs: set[str] = set()
        self._finished: list[tuple[str, str]] = []
        self._changed: dict[str, None] = {}  # a set that keeps its order; bounded by the number of units
        self._appeared: dict[str, None] = {}
        self._unread: dict[str, None] = {}
        self._callbacks: list[Callable[..., None]] = []
        self._requests: dict[UnitCall, Callable[[UnitRequest], Any]] = {
            UnitCall.LIST: self._list,
            UnitCall.READ: lambda request: self._read(request.unit),
            UnitCall.KILL: lambda request: self._manager(b"KillUnit", b"ssi", request.unit, request.whom, request.signal),
            UnitCall.RESET_FAILED: lambda request: self._manager(b"ResetFailedUnit", b"s", request.unit),
            UnitCall.PROCESSES: lambda request: [row[1] for row in self._manager(b"GetUnitProcesses", b"s", request.unit)],
        }

    def run(self) -> None:
        """Serve until the peer closes the socket. DBusBaseError when the bus is gone."""
        self._subscribe()
        self._send({"ready": True})
        with selectors.DefaultSelector() as selector:
            selector.register(self._peer, selectors.EVENT_READ)
            selector.register(self._bus.get_fd(), selectors.EVENT_READ)
            while True:
                self._drain()
                self._announce()
                wait_s = 0 if self._changed or self._appeared else _RETRY_DELAY_S if self._unread else None
                if any(key.fileobj is self._peer for key, _ in selector.select(wait_s)) and not self._serve():
                    return

    def _subscribe(self) -> None:
        def on_properties(message: Any, error: object = None, userdata: object = None) -> None:
            self._note(self._changed, path_decode(message.get_path(), _UNITS).decode())

        def on_new(message: Any, error: object = None, userdata: object = None) -> None:
            message.process_reply(False)
            self._note(self._appeared, message.body[0].decode())

        def on_job_removed(message: Any, error: object = None, userdata: object = None) -> None:
            message.process_reply(False)
            _, job, _, result = message.body
            if job.decode() in self._jobs:
                self._jobs.remove(job.decode())
                self._finished.append((job.decode(), result.decode()))

        self._callbacks = [on_properties, on_new, on_job_removed]
        self._bus.match_signal(_DESTINATION, None, b"org.freedesktop.DBus.Properties", b"PropertiesChanged", on_properties)
        self._bus.match_signal(_DESTINATION, _ROOT, _MANAGER, b"UnitNew", on_new)
        self._bus.match_signal(_DESTINATION, _ROOT, _MANAGER, b"JobRemoved", on_job_removed)
        self._manager(b"Subscribe")

    def _note(self, units: dict[str, None], unit: str) -> None:
        if is_model_unit(unit):
            units[unit] = None

    def _drain(self) -> None:
        """Run the callbacks of the signals received so far, then tell the peer which of its jobs have ended."""
        empty = 0
        while empty < 2:  # a step in which sd-bus only did work of its own looks empty as well
            empty = empty + 1 if self._bus.process().is_empty() else 0
        if self._bus.get_fd() < 0:
            raise DBusDisconnectedError(-errno.ENOTCONN, None, "the bus closed the connection")
        for job, result in self._finished:
            self._send({"job_removed": job, "result": result})
        self._finished.clear()

    def _announce(self) -> None:
        """Read each unit that has changed, once however many signals there were."""
        changed, self._changed, self._unread = self._changed | self._unread, {}, {}
        appeared, self._appeared = self._appeared, {}
        for unit in changed | appeared:
            try:
                if unit in changed or self._is_loaded(unit):
                    self._send({"changed": self._read(unit)})
            except DBusBaseError:  # systemd re-executes itself, or is too busy to answer: try again
                self._unread[unit] = None
            self._drain()

    def _serve(self) -> bool:
        """Carry out the requests that have arrived; False when the peer is gone, or sends a line without an end."""
        received = self._peer.recv(_RECEIVE_BYTES)
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._send(self._answer(line))
            self._drain()
        if len(self._received) > REQUEST_BYTES:
            self._send({"lost": f"a request has {REQUEST_BYTES} bytes at most"})
            return False
        return received != b""

    def _answer(self, line: bytes) -> dict[str, Any]:
        number: int | None = None
        try:
            request = parse_request(line)
            number = request.id
            if request.call not in (UnitCall.LIST, UnitCall.READ):
                self._check_template(request.unit)
            if request.call in _JOB_METHODS:
                job = self._manager(_JOB_METHODS[request.call], b"ss", request.unit, "replace").decode()
                self._jobs.add(job)
                return {"id": number, "job": job}
            return {"id": number, "value": self._requests[request.call](request)}
        except RequestError as error:
            return {"id": error.id, "error": _INVALID_ARGUMENTS, "message": str(error)}
        except _NotOursError as error:
            return {"id": number, "error": _ACCESS_DENIED, "message": str(error)}
        except DBusBaseError as error:
            return {"id": number, "error": _error_name(error), "message": _text(error.err_message)}

    def _check_template(self, unit: str) -> None:
        """Refuse a unit that is loaded from anywhere but the generator's folder: somebody's own that is named alike.

        One that is not loaded, or masked, systemd refuses to start by itself; one whose template is gone may still run, and
        must be stopped.
        """
        if self._templates is None:
            return
        path = path_encode(_UNITS, unit.encode())
        template = self._templates / f"{unit.partition('@')[0]}@.service"
        fragment = _text(self._property(path, _FRAGMENT))
        if _text(self._property(path, _PROPERTIES["load_state"])) == "loaded" and fragment != str(template):
            raise _NotOursError(f"it is loaded from {fragment or 'no file'}, not from {template}, which mmd-generator makes")

    def _list(self, request: UnitRequest) -> list[dict[str, Any]]:
        rows = self._manager(b"ListUnitsByPatterns", b"asas", [], [MODEL_UNIT_PATTERN])
        return [self._read(unit) for unit in (row[0].decode() for row in rows) if is_model_unit(unit)]

    def _is_loaded(self, unit: str) -> bool:
        try:
            self._manager(b"GetUnit", b"s", unit)
        except DBusBaseError as error:
            if _error_name(error) == "org.freedesktop.systemd1.NoSuchUnit":
                return False
            raise
        return True

    def _read(self, unit: str) -> dict[str, Any]:
        """The keys of UnitState, all of one moment: read again when the unit changed in between."""
        path = path_encode(_UNITS, unit.encode())
        changed_usec = self._property(path, _STATE_CHANGE)
        for _ in range(_READ_ATTEMPTS):
            state = {key: _text(self._property(path, where)) for key, where in _PROPERTIES.items()}
            before, changed_usec = changed_usec, self._property(path, _STATE_CHANGE)
            if changed_usec == before:
                break
        return {**state, "unit": unit, "invocation_id": bytes(state["invocation_id"]).hex(), "since": changed_usec / 1e6}

    def _property(self, path: bytes, where: tuple[bytes, bytes, bytes]) -> Any:
        return self._bus.get_property(_DESTINATION, path, *where)

    def _manager(self, method: bytes, signature: bytes = b"", *arguments: object) -> Any:
        values = apply_signature(signature, [_wire(argument) for argument in arguments])
        return self._bus.call_method(_DESTINATION, _ROOT, _MANAGER, method, values).body

    def _send(self, frame: dict[str, Any]) -> None:
        self._peer.sendall(json.dumps(frame).encode() + b"\n")


def _wire(argument: Any) -> Any:
    if isinstance(argument, str):
        return argument.encode()
    return [_wire(item) for item in argument] if isinstance(argument, list) else argument


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _error_name(error: DBusBaseError) -> str:
    """The D-Bus name, which pystemd keeps only for errors without a class of their own."""
    if error.err_name:
        return str(_text(error.err_name))
    name = type(error).__name__.removeprefix("DBus").removesuffix("Error")
    prefix = "org.freedesktop.systemd1" if name == "NoSuchUnit" else "org.freedesktop.DBus.Error"
    return f"{prefix}.{name}"


def serve(peer: socket.socket, *, user: bool, templates: Path | None = None) -> int:
    """Serve `peer`, a connected stream socket, until it is closed; the exit status.

    `templates`: the only folder whose units may be acted upon.
    """
    # It lives exactly as long as its client keeps the socket open: a Ctrl-C, or a SIGTERM to the whole unit, is for the client.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    peer.settimeout(_SEND_TIMEOUT_S)
    try:
        try:
            bus = DBus(user_mode=user)
            bus.open()
            _Worker(peer, bus, templates).run()
        except DBusBaseError as error:
            peer.sendall(json.dumps({"lost": f"{_error_name(error)}: {_text(error.err_message)}"}).encode() + b"\n")
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(_RECEIVE_BYTES):  # to close a socket with unread requests in it would discard the reason just sent
                pass
            return 1
    except (BrokenPipeError, ConnectionResetError, TimeoutError):  # the client died, or does not read
        return 1
    return 0


def main() -> int:
    """`python -m mmd.systemd.worker`: for the caller's own service manager; standard input is a stream socket."""
    with socket.socket(fileno=sys.stdin.fileno()) as peer:
        return serve(peer, user=True)


if __name__ == "__main__":
    sys.exit(main())
