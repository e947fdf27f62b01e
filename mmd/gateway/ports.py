"""The models' own ports: listening sockets that come while the gateway runs, and who serves them.

systemd passes a service its sockets when it starts, and never again, but a port may be added or moved while streams of other
models run. So each port has a socket unit of its own, mmd-port-ID.socket. The first connection makes systemd start
mmd-port@ID.service, which hands the listening socket over to us (mmd.systemd.handport) and stays active without a process; for
as long as it is, systemd does not look at the socket. It is bound to the gateway's unit: when that has gone, systemd looks
again. Before the socket is closed or moved, the unit's stop tells us so.

A socket is served while it is the one that the configuration means: that of the model's id, at its address. Else it is kept and
nobody accepts: clients wait in the kernel until the configuration and the units agree again.
"""

import asyncio
import ipaddress
import logging
import math
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from mmd.addresses import Address, parse_address
from mmd.config import Config, Model, PortProtocol
from mmd.gateway.channel import Channel
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.port_server import PortServer
from mmd.gateway.relay.inference import Inference
from mmd.gateway.serving import Serving
from mmd.gateway.tunnel_server import TunnelServer
from mmd.systemd.activation import ListenSocket

__all__ = ["Ports", "is_port"]

_log = logging.getLogger(__name__)

_DESK = "mmd-ports"
_PORT = "mmd-port-"
_BACKLOG = 64


def is_port(name: str) -> bool:
    """Whether a listening socket that one gateway gives another is for Ports."""
    return name == _DESK or name.startswith(_PORT)


class Open(msgspec.Struct, frozen=True, tag="open"):
    """A listening socket, which comes with it, is the port of the model with this id."""

    id: str


class Close(msgspec.Struct, frozen=True, tag="close"):
    """It is not any more."""

    id: str


class Obeyed(msgspec.Struct, frozen=True, tag="obeyed"):
    """The answer."""


class Ports:
    def __init__(
        self, dispatcher: Dispatcher, inference: Inference, servers: list[Serving], path: Path, sockets: Iterable[ListenSocket]
    ) -> None:
        """`servers`: all of the gateway's, to which those of the ports are added; `path`: where ports are handed over;
        `sockets`: what the gateway before this one had."""
        self._dispatcher = dispatcher
        self._inference = inference
        self._servers = servers
        self._path = path
        self._loop = asyncio.get_running_loop()
        inherited = {each.name: each.socket for each in sockets}
        self._desk = inherited.pop(_DESK, None)
        self._sockets = {name.removeprefix(_PORT): each for name, each in inherited.items() if name.startswith(_PORT)}
        """By the id of the model."""
        self._serving: dict[str, PortServer | TunnelServer] = {}
        self._channels: set[Channel] = set()
        self._turn = asyncio.Lock()
        self._listening = False

    @property
    def sockets(self) -> tuple[ListenSocket, ...]:
        """What the gateway after this one needs."""
        desk = () if self._desk is None else (ListenSocket(_DESK, self._desk),)
        return (*desk, *(ListenSocket(f"{_PORT}{name}", each) for name, each in self._sockets.items()))

    def prepare(self) -> None:
        """Make the servers of the ports that were inherited, to be started with the gateway's others."""
        for unit_id, model in _wanted(self._dispatcher.config, self._sockets).items():
            self._make(unit_id, model)

    async def listen(self) -> None:
        """From now on ports may come and go."""
        if self._desk is None:
            with suppress(FileNotFoundError):
                self._path.unlink()  # a gateway's that has gone: there is one at a time
            self._desk = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._desk.bind(str(self._path))
            self._desk.listen(_BACKLOG)
        self._desk.setblocking(False)
        self._listening = True
        self._loop.add_reader(self._desk.fileno(), self._accept)
        await self.arrange()

    async def arrange(self) -> None:
        """Serve what the configuration says, and nothing else."""
        async with self._turn:
            if not self._listening:
                return
            wanted = _wanted(self._dispatcher.config, self._sockets)
            for unit_id, server in tuple(self._serving.items()):
                model = wanted.get(unit_id)
                if model is None or model.name != server.model or _kind(model) is not type(server):
                    await self._retire(unit_id)
            for unit_id, model in wanted.items():
                if unit_id not in self._serving:
                    await self._make(unit_id, model).start()

    def _make(self, unit_id: str, model: Model) -> PortServer | TunnelServer:
        name, listening = f"{_PORT}{unit_id}", self._sockets[unit_id].dup()  # it is closed with its server
        server: PortServer | TunnelServer
        if _kind(model) is TunnelServer:
            server = TunnelServer(name, self._dispatcher, listening, model.name)
        else:
            server = PortServer(name, self._inference, (listening,), model.name)
        self._serving[unit_id] = server
        self._servers.append(server)
        return server

    async def _retire(self, unit_id: str) -> None:
        """Accept nothing more; what was accepted goes on."""
        server = self._serving.pop(unit_id)
        await server.stop_accepting()
        self._dispatcher.spawn(self._see_off(server))

    async def _see_off(self, server: PortServer | TunnelServer) -> None:
        if isinstance(server, TunnelServer):
            await server.empty()
        else:
            await server.drain(math.inf)
        self._servers.remove(server)

    # What units say.

    def _accept(self) -> None:
        assert self._desk is not None
        try:
            end, _ = self._desk.accept()
        except OSError:  # it has gone again
            return

        def hear(message: Open | Close, fds: list[int]) -> None:
            self._hear(channel, message, fds)

        channel = Channel(end, Open | Close, hear, lambda: self._channels.discard(channel))
        self._channels.add(channel)

    def _hear(self, channel: Channel, message: Open | Close, fds: list[int]) -> None:
        match message:
            case Open(unit_id):
                given = [socket.socket(fileno=fd) for fd in fds]
                for each in given[1:]:
                    each.close()
                self._dispatcher.spawn(self._obey(channel, unit_id, given[0] if given else None))
            case Close(unit_id):
                self._dispatcher.spawn(self._obey(channel, unit_id, None))

    async def _obey(self, channel: Channel, unit_id: str, given: socket.socket | None) -> None:
        async with self._turn:
            if not self._listening or channel not in self._channels:
                if given is not None:  # another gateway is told again
                    given.close()
                return
            if unit_id in self._serving:
                await self._retire(unit_id)
            before = self._sockets.pop(unit_id, None)
            if before is not None:
                before.close()
            if given is not None:
                self._sockets[unit_id] = given
        await self.arrange()
        if given is not None and unit_id not in self._serving:
            _log.warning("nobody accepts at the port of %s: the configuration says otherwise: mmdctl reload", unit_id)
        channel.send(Obeyed())

    # Leaving.

    async def hold(self) -> None:
        """Let nothing change: another gateway is told what is there. Whoever has not been answered asks again."""
        async with self._turn:
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listening and self._desk is not None:
            self._loop.remove_reader(self._desk.fileno())
        self._listening = False
        for channel in tuple(self._channels):
            channel.close()
        self._channels.clear()

    def close(self) -> None:
        """Let go of the sockets: systemd's and another gateway's are all that is left of them."""
        self._stop_listening()
        for each in (*self._sockets.values(), *((self._desk,) if self._desk is not None else ())):
            each.close()
        self._sockets.clear()
        self._desk = None


def _kind(model: Model) -> type[PortServer] | type[TunnelServer]:
    return TunnelServer if model.port_protocol is PortProtocol.TCP else PortServer


def _wanted(config: Config, sockets: dict[str, socket.socket]) -> dict[str, Model]:
    """Of the sockets those that the configuration means, by id, and the model of each."""
    by_id = {model.id: model for model in config.models.values() if model.port is not None}
    return {
        unit_id: model
        for unit_id, each in sockets.items()
        if (model := by_id.get(unit_id)) is not None and model.port is not None and _address(each) == parse_address(model.port)
    }


def _address(listening: socket.socket) -> Address:
    name = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return Address(name)
    host = str(ipaddress.IPv6Address(name[0])) if listening.family == socket.AF_INET6 else name[0]
    return Address(host, name[1])
