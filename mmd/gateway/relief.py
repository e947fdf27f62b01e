"""One gateway relieved by the next: what mmd.gateway.handover carries, put into practice on both sides."""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mmd.errors import MmdError
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.handover import Client, Predecessor, Successor, Taken, UnitTaken
from mmd.gateway.keeper import Keeper
from mmd.gateway.relay.access import Access
from mmd.gateway.serving import Serving
from mmd.names import UnitName
from mmd.policy.events import Phase
from mmd.systemd.activation import ListenSocket

if TYPE_CHECKING:
    from mmd.gateway.workers.staff import Staff

__all__ = ["Guests", "relieve"]

_log = logging.getLogger(__name__)

# How soon the successor hears that a request has ended: it may wait for this one to put the model to sleep.
_COUNT_S = 0.05


class Guests:
    """Requests that earlier gateways still serve at units that we decide about, and the connections that they send us."""

    def __init__(self, dispatcher: Dispatcher, servers: Sequence[Serving], access: Access) -> None:
        """`servers` may be made later."""
        self._dispatcher = dispatcher
        self._servers = servers
        self._access = access
        self._loop = asyncio.get_running_loop()
        self._requests: dict[Predecessor, dict[str, list[int]]] = {}
        self._keys: dict[Predecessor, dict[str, int]] = {}
        """How many requests of which API key each has under way."""
        self.none = asyncio.Event()
        """There is nobody before us any more."""
        self.none.set()
        access.changed.append(self._tell_keys)

    def welcome(self, predecessor: Predecessor) -> None:
        """Listen to a gateway before us."""
        self._requests[predecessor] = {}
        self._keys[predecessor] = {}
        self.none.clear()
        predecessor.on_client = self._take_client
        predecessor.on_count = self._count
        predecessor.on_kept = self._dispatcher.kept().inherit
        predecessor.on_kept_late = self._dispatcher.kept().add
        self._dispatcher.kept().others += 1
        predecessor.on_key = self._count_key
        predecessor.on_elder = self._take_elder
        predecessor.on_end = self._leave

    async def take_over(self, predecessor: Predecessor, taken: Taken) -> None:
        """Learn what it knew; from now on we decide."""
        known = {unit: each for name, each in taken.units.items() if (unit := UnitName.parse(name)) is not None}
        lifecycle = self._dispatcher.lifecycle
        lifecycle.inherit({unit: each.level for unit, each in known.items()})
        for unit, each in known.items():
            if unit in lifecycle.units:
                self._dispatcher.post(await lifecycle.observe(lifecycle.units[unit]))
                requests = self._dispatcher.inherit(unit, each.in_flight, each.idle_s)
                self._requests[predecessor][str(unit)] = requests
        self._dispatcher.resume()

    def _tell_keys(self) -> None:
        """Other keys are in force: also for what they still serve, which ends if its key is none any more."""
        text = self._access.ring.render()
        for predecessor in self._requests:
            predecessor.change_keys(text)

    def _take_elder(self, elder: Predecessor, in_flight: Mapping[str, int], keys: Mapping[str, int]) -> None:
        self.welcome(elder)
        elder.change_keys(self._access.ring.render())  # they may have changed while its channel went from hand to hand
        for key, count in keys.items():
            self._count_key(elder, key, count)
        for name, count in in_flight.items():
            unit = UnitName.parse(name)
            if unit is not None:
                self._requests[elder][name] = self._dispatcher.inherit(unit, count, None)

    def _count(self, predecessor: Predecessor, unit: str, count: int) -> None:
        requests = self._requests[predecessor].setdefault(unit, [])
        named = UnitName.parse(unit)
        if len(requests) < count and named is not None:  # a tunnel there is in use again after a silence
            requests += self._dispatcher.inherit(named, count - len(requests), None)
        while len(requests) > count:
            self._dispatcher.forgo(requests.pop())

    def _count_key(self, predecessor: Predecessor, key: str, count: int) -> None:
        counts = self._keys[predecessor]
        before, counts[key] = counts.get(key, 0), count
        self._access.count_elsewhere(key, count - before)

    def _leave(self, predecessor: Predecessor) -> None:
        if predecessor in self._requests:
            self._dispatcher.kept().others -= 1
        for key, count in self._keys.pop(predecessor, {}).items():
            self._access.count_elsewhere(key, -count)
        for requests in self._requests.pop(predecessor, {}).values():
            for request in requests:
                self._dispatcher.forgo(request)
        if not self._requests:
            self.none.set()

    def _take_client(self, client: Client, connection: socket.socket, read: bytes) -> None:
        server = next((each for each in self._servers if each.name == client.server), None)
        if server is None:
            _log.warning("nobody serves %s any more: a connection is closed", client.server)
            connection.close()
        else:
            self._dispatcher.spawn(server.adopt(connection, read, client.chunked, let_in=client.let_in))

    def ids(self) -> set[int]:
        """Their requests, as the scheduler knows them."""
        return {request for each in self._requests.values() for requests in each.values() for request in requests}

    def move_to(self, successor: Successor) -> None:
        """Let the next one listen to those before us."""
        for predecessor, requests in self._requests.items():
            in_flight = {unit: len(each) for unit, each in requests.items()}
            successor.elder(in_flight, self._keys[predecessor], predecessor.detach())
        self._requests.clear()
        self._keys.clear()
        self.none.set()


async def relieve(
    command: Sequence[str],
    sockets: Sequence[ListenSocket],
    dispatcher: Dispatcher,
    servers: Sequence[Serving],
    guests: Guests,
    staff: "Staff | None",
    keeper: Keeper,
    announce: Callable[[int], None],
) -> bool:
    """Start a successor by `command` and hand everything over to it, after `announce` was told its process id.

    Returns when nothing is left to do here. False: it did not come up, and nothing has changed.
    """
    gone = asyncio.Event()
    successor = Successor(gone.set)
    try:
        process_id = await successor.start(command, sockets)
        await dispatcher.pause()
        if gone.is_set():
            raise MmdError("the fresh gateway ended before it could take over", hint="journalctl -u mmd-gateway")
    except MmdError as error:
        _log.error("the gateway goes on as it is: %s", error)
        successor.dismiss()
        dispatcher.resume()
        return False
    announce(process_id)
    known = _known(dispatcher, guests.ids())
    successor.keep(dispatcher.kept().all())
    dispatcher.kept().told = successor.keep_late
    successor.on_keys = keeper.follow
    successor.take(known, keeper.handed())
    keeper.relieved = True
    theirs = guests.ids()
    guests.move_to(successor)
    for server in servers:
        server.hand_over(partial(_give, successor, server.name))
    if staff is not None:
        staff.leave(partial(_give, successor, staff.name))
    dispatcher.retire()
    _log.info("process %d takes over; %d requests are finished here", process_id, sum(u.in_flight for u in known.values()))
    told = {unit: each.in_flight for unit, each in known.items()}
    keys_told: dict[str, int] = {}
    _tell_keys(successor, keeper, keys_told)
    while any(server.connections for server in servers) or not (staff is None or staff.left):
        if gone.is_set():
            for server in servers:
                server.leaving, server.heir = True, None
        await asyncio.sleep(_COUNT_S)
        dispatcher.survey()
        for unit, each in _known(dispatcher, theirs).items():
            if each.in_flight != told.get(unit):
                told[unit] = each.in_flight
                successor.count(unit, each.in_flight)
        _tell_keys(successor, keeper, keys_told)
    return True


def _tell_keys(successor: Successor, keeper: Keeper, told: dict[str, int]) -> None:
    for key, count in keeper.in_flight().items():
        if count != told.get(key, 0):
            told[key] = count
            successor.count_key(key, count)


def _give(successor: Successor, server: str, connection: int, read: bytes, chunked: bool | None, let_in: bool) -> None:
    successor.give(Client(server, chunked, let_in), connection, read)


def _known(dispatcher: Dispatcher, theirs: set[int]) -> dict[str, UnitTaken]:
    """What we know of the units, the requests of others apart."""
    now = asyncio.get_running_loop().time()
    return {
        str(unit): UnitTaken(
            level=instance.level if instance.phase is Phase.SLEEPING else 0,
            in_flight=len(instance.in_flight - theirs) + instance.elsewhere,
            idle_s=now - instance.last_activity if instance.last_activity else None,
        )
        for unit, instance in dispatcher.scheduler.state.instances.items()
        if instance.phase in (Phase.READY, Phase.SLEEPING)
    }
