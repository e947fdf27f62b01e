"""An upgrade without a gap: a gateway hands its sockets, and what it knows, to a fresh one, and finishes what it has in hand.

The fresh process (successor) gets ready beside the old one (predecessor): it reads the configuration and takes over what runs,
without deciding anything. If it does not come that far, nothing has changed. Then, within one turn of the old one's event
loop, the old one stops accepting and deciding and sends what the other needs; connections wait in the kernel for the few
milliseconds until the successor accepts. Idle connections and requests that still wait for their model move over as they are;
answers under way stay with the predecessor, however long, and each of their connections moves over when its answer has ended.
The successor counts the requests that it does not see, so that no model is taken from under them.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import msgspec

from mmd.errors import MmdError
from mmd.gateway.channel import Channel, connection_of, from_memory, in_memory
from mmd.systemd.activation import ListenSocket

__all__ = ["Client", "KeysTaken", "Predecessor", "Successor", "Taken", "UnitTaken"]

_log = logging.getLogger(__name__)

# A fresh gateway is there within a second; on a machine that is busy loading models it takes longer.
_PREPARED_WITHIN_S = 30.0

# A message has room for 64 descriptors (mmd.gateway.channel), and models' ports may be more.
_SOCKETS_AT_ONCE = 60


class Sockets(msgspec.Struct, frozen=True, tag=True):
    """What systemd listens on: names, and a descriptor each."""

    names: list[str]
    more: bool = False
    """Another message follows with more of them."""


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The successor could go on from here."""


class KeysChanged(msgspec.Struct, frozen=True, tag=True):
    """Other API keys are in force: what a predecessor still serves by one that is none any more has to end. A predecessor of a
    version that does not know this message leaves it out (mmd.gateway.channel)."""

    text: str
    """As mmd.keys renders it."""


class UnitTaken(msgspec.Struct, frozen=True):
    """What the predecessor knows of a unit."""

    level: int
    in_flight: int
    idle_s: float | None


class Taken(msgspec.Struct, frozen=True, tag=True):
    """From now on the successor decides. Descriptor: a memory file with `KeysTaken`."""

    units: dict[str, UnitTaken]


class KeysTaken(msgspec.Struct, frozen=True):
    """The API keys that are in force."""

    text: str
    """As mmd.keys renders it."""
    problems: tuple[str, ...]
    full_at_s: dict[str, float]
    """What has been counted against their rates, by their names; of the monotonic clock."""


class InFlight(msgspec.Struct, frozen=True, tag=True):
    """How many requests the predecessor still serves at a unit."""

    unit: str
    count: int


class Kept(msgspec.Struct, frozen=True, tag=True):
    """Engines keep these answers: ids and models. Descriptor: of a memory file with the list as JSON."""


class KeptLate(msgspec.Struct, frozen=True, tag=True):
    """So does the engine of `model` the answer to a request that the predecessor still serves."""

    answer: str
    model: str


class KeyInUse(msgspec.Struct, frozen=True, tag=True):
    """How many requests of an API key, by its name, the predecessor still has under way."""

    key: str
    count: int


class Client(msgspec.Struct, frozen=True, tag=True):
    """A client's connection, see Channel.send_connection."""

    server: str
    chunked: bool | None = None
    """Of an event stream whose head the client has already."""
    let_in: bool = False
    """Its request has been counted against the limits of its key."""


class Elder(msgspec.Struct, frozen=True, tag=True):
    """A predecessor's own predecessor, which still serves something: the end of its channel, and what it serves."""

    in_flight: dict[str, int]
    keys: dict[str, int] = {}
    """See KeyInUse."""


_ToSuccessor = Sockets | Taken | Kept | KeptLate | InFlight | KeyInUse | Client | Elder

_FromSuccessor = Prepared | KeysChanged

_decode_kept = msgspec.json.Decoder(list[tuple[str, str]]).decode


class Successor:
    """A fresh gateway, as the one before it sees it."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        """`on_end`: it has gone."""
        self._on_end = on_end
        self.on_keys: Callable[[str], None] | None = None
        """Is called with other API keys, as mmd.keys renders them, when they are in force there."""
        self._channel: Channel | None = None
        self._process_id: int | None = None
        self._prepared: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, command: Sequence[str], sockets: Sequence[ListenSocket]) -> int:
        """Start it by `command` and wait until it is prepared: its process id. MmdError when it does not come that far."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process_id = _spawn(command, theirs.fileno())
        self._channel = Channel(ours, _FromSuccessor, self._hear, self._ended)
        for begin in range(0, len(sockets), _SOCKETS_AT_ONCE):
            some, more = sockets[begin : begin + _SOCKETS_AT_ONCE], begin + _SOCKETS_AT_ONCE < len(sockets)
            self._channel.send(Sockets([each.name for each in some], more), *(os.dup(each.socket.fileno()) for each in some))
        try:
            async with asyncio.timeout(_PREPARED_WITHIN_S):
                await self._prepared
        except TimeoutError:
            raise MmdError(f"the fresh gateway was not prepared within {_PREPARED_WITHIN_S:g} s") from None
        return self._process_id

    def _hear(self, message: _FromSuccessor, _: list[int]) -> None:
        match message:
            case Prepared() if not self._prepared.done():
                self._prepared.set_result(None)
            case KeysChanged(text) if self.on_keys is not None:
                self.on_keys(text)

    def _ended(self) -> None:
        if not self._prepared.done():
            error = MmdError("the fresh gateway ended before it was prepared", hint="journalctl -u mmd-gateway")
            self._prepared.set_exception(error)
        else:
            self._on_end()

    def take(self, units: Mapping[str, UnitTaken], keys: KeysTaken) -> None:
        """Let it decide and accept."""
        assert self._channel is not None
        self._channel.send(Taken(dict(units)), in_memory(msgspec.json.encode(keys)))

    def keep(self, answers: list[tuple[str, str]]) -> None:
        """Let it know which engines keep which answers."""
        assert self._channel is not None
        self._channel.send(Kept(), in_memory(msgspec.json.encode(answers)))

    def keep_late(self, answer: str, model: str) -> None:
        assert self._channel is not None
        self._channel.send(KeptLate(answer, model))

    def elder(self, in_flight: Mapping[str, int], keys: Mapping[str, int], end: socket.socket) -> None:
        """Let it hear from a predecessor of ours, by the end of its channel."""
        assert self._channel is not None
        self._channel.send(Elder(dict(in_flight), dict(keys)), end.detach())

    def count(self, unit: str, in_flight: int) -> None:
        assert self._channel is not None
        self._channel.send(InFlight(unit, in_flight))

    def count_key(self, key: str, in_flight: int) -> None:
        assert self._channel is not None
        self._channel.send(KeyInUse(key, in_flight))

    def give(self, client: Client, connection: int, data: bytes) -> None:
        """Hand a connection over, with what was read of it."""
        assert self._channel is not None
        self._channel.send_connection(client, connection, data)

    def dismiss(self) -> None:
        """End one that is of no use."""
        if self._channel is None or not self._channel.open:
            return
        self._channel.close()
        if self._process_id is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process_id, signal.SIGKILL)  # its channel was open a moment ago, so the process id is still its


def _spawn(command: Sequence[str], end: int) -> int:
    """Start it as a child of systemd, which would not notice the end of a main process that is somebody else's: by a shell that
    starts it and ends, as daemons used to."""
    environment = {key: value for key, value in os.environ.items() if key != "WATCHDOG_PID"}  # it is meant for this process
    argv = ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *command, "--take-over", str(end)]
    done = subprocess.run(argv, check=True, pass_fds=(end,), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return int(done.stdout)


class Predecessor:
    """The gateway before this one, or one before that, as the fresh one sees it."""

    def __init__(self, end: socket.socket) -> None:
        self.sockets: asyncio.Future[tuple[ListenSocket, ...]] = asyncio.get_running_loop().create_future()
        self._sockets: list[ListenSocket] = []
        self.taken: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        self.keys: KeysTaken | None = None
        """With `taken`; None: of a version that knows none."""
        self.on_client: Callable[[Client, socket.socket, bytes], None] | None = None
        self.on_count: Callable[[Predecessor, str, int], None] | None = None
        self.on_kept: Callable[[list[tuple[str, str]]], None] | None = None
        self.on_kept_late: Callable[[str, str], None] | None = None
        self.on_key: Callable[[Predecessor, str, int], None] | None = None
        self.on_elder: Callable[[Predecessor, Mapping[str, int], Mapping[str, int]], None] | None = None
        self.on_end: Callable[[Predecessor], None] | None = None
        self._channel = Channel(end, _ToSuccessor, self._hear, self._ended)

    def prepared(self) -> None:
        self._channel.send(Prepared())

    def change_keys(self, text: str) -> None:
        """Let what it still serves go by these API keys."""
        self._channel.send(KeysChanged(text))

    def detach(self) -> socket.socket:
        """The end of its channel, for another successor."""
        return self._channel.detach()

    def _hear(self, message: _ToSuccessor, fds: list[int]) -> None:
        match message:
            case Sockets(names, more):
                made = (socket.socket(fileno=fd) for fd in fds)
                self._sockets += (ListenSocket(name, each) for name, each in zip(names, made, strict=True))
                if not more:
                    self.sockets.set_result(tuple(self._sockets))
            case Taken():
                self.keys = msgspec.json.decode(from_memory(fds[0]), type=KeysTaken) if fds else None
                self.taken.set_result(message)
            case Kept():
                answers = _decode_kept(from_memory(fds[0]))
                if self.on_kept is not None:
                    self.on_kept(answers)
            case KeptLate(answer, model) if self.on_kept_late is not None:
                self.on_kept_late(answer, model)
            case InFlight(unit, count) if self.on_count is not None:
                self.on_count(self, unit, count)
            case KeyInUse(key, count) if self.on_key is not None:
                self.on_key(self, key, count)
            case Client():
                if self.on_client is not None:
                    self.on_client(message, *connection_of(fds))
            case Elder(in_flight, keys) if self.on_elder is not None:
                self.on_elder(Predecessor(socket.socket(fileno=fds[0])), in_flight, keys)

    def _ended(self) -> None:
        for future in (self.sockets, self.taken):
            if not future.done():
                future.set_exception(MmdError("the gateway before this one has gone"))
        if self.on_end is not None:
            self.on_end(self)

    def close(self) -> None:
        with suppress(OSError):
            self._channel.close()
