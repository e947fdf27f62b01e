"""Keeps the API keys: reads them when the gateway starts, takes changes from mmdctl, and hands them on with an upgrade.

Each start of the unit brings the file as it is (LoadCredential=), and mmdctl changes the file before it tells the gateway: so
at a start the credential is the latest there is. Only what a running unit has is as old as its start. An upgrade therefore
goes by what the gateway before had in force, which that hands over, and no copy lies around to be mistaken for the latest.
"""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from mmd.answers import ApiKey, Keys, KeysTold
from mmd.errors import MmdError
from mmd.gateway.admin.route import ApiResponse, Body, Route, as_json
from mmd.gateway.api_error import ApiError
from mmd.gateway.handover import KeysTaken
from mmd.gateway.peer import peer_of
from mmd.gateway.relay.access import Access
from mmd.gateway.snapshot import Snapshot
from mmd.keys import KEYS_FILE, BadKeysError, KeyRing

if TYPE_CHECKING:
    from mmd.gateway.workers.staff import Staff

__all__ = ["Keeper"]

_log = logging.getLogger(__name__)

_PATH: Final = "/api/v1/keys"

_CLOSED = KeyRing(serial=1)
"""Keys are asked for, and there is none."""


class Keeper:
    """Of the keys that `access` goes by."""

    def __init__(self, access: Access, snapshot: Snapshot) -> None:
        self._access = access
        self._snapshot = snapshot
        self._turn = asyncio.Lock()
        self.staff: Staff | None = None
        """The workers, which go by the same keys."""
        self.relieved = False
        """Another gateway has taken over, and keeps the keys."""

    def load(self, environ: Mapping[str, str]) -> None:
        """The keys that systemd has passed (systemd.exec(5), CREDENTIALS). What cannot be read or understood lets nobody in."""
        folder = environ.get("CREDENTIALS_DIRECTORY")
        if folder is None:
            return
        try:
            text = Path(folder, KEYS_FILE).read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._use(_CLOSED, (f"{KEYS_FILE} cannot be read, so that everybody is refused: {error.strerror}",))
            return
        self._use(*_read(text))

    def inherit(self, keys: KeysTaken | None) -> None:
        """Go on with what the gateway before had in force; None: it knew of no keys."""
        if keys is None:
            return
        if keys.text != self._access.ring.render():
            ring, problems = _read(keys.text.encode())
            self._use(ring, keys.problems or problems)
            if self.staff is not None:
                self.staff.tell_keys()
        for name, full_at_s in keys.full_at_s.items():
            visitor = self._access.named(name)
            if visitor is not None:
                visitor.resume(full_at_s)

    def follow(self, text: str) -> None:
        """Go by keys that the gateway after this one has taken up, for the requests that are finished here."""
        ring, problems = _read(text.encode())
        if ring != self._access.ring and ring.serial >= self._access.ring.serial:
            self._use(ring, problems)
            if self.staff is not None:
                self.staff.tell_keys()

    def handed(self) -> KeysTaken:
        """For the gateway after this one."""
        visitors = self._access.visitors()
        rates = {each.key.name: each.full_at_s for each in visitors if each.key is not None and each.full_at_s is not None}
        return KeysTaken(self._access.ring.render(), self._snapshot.key_problems, rates)

    def in_flight(self) -> dict[str, int]:
        """How many requests of each key are under way here, by its name."""
        return {each.key.name: each.in_flight for each in self._access.visitors() if each.key is not None}

    def _use(self, ring: KeyRing, problems: tuple[str, ...]) -> None:
        self._access.use(ring)
        self._snapshot.key_problems, self._snapshot.keys_asked_for = problems, ring.required
        for problem in problems:
            _log.error("%s", problem)
        if ring.required:
            _log.info("an API key is asked for: %d are known (serial %d)", len(ring.keys), ring.serial)
        else:
            _log.info("no API key is asked for: there are none")

    # The admin API.

    def routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                _PATH,
                self.show,
                "The API keys in force",
                ApiResponse("Their names, and what they may do.", Keys),
                private=True,
            ),
            Route(
                "PUT",
                _PATH,
                self.put,
                "Other API keys from now on, in all processes when this is answered",
                ApiResponse("Those in force.", KeysTold),
                description="From root, on the admin socket: `mmdctl keys` changes the file, and then tells the gateway.",
                body=Body("The text of the file, see mmd-api-keys(5).", Any, ("application/yaml",)),
                errors=(403, 409, 413),
            ),
        ]

    async def show(self, _: web.Request) -> web.Response:
        """Names and what they may do; no digests."""
        ring = self._access.ring
        keys = tuple(msgspec.convert({"name": key.name, **key.plain()}, ApiKey) for key in ring.keys)
        return as_json(Keys(ring.serial, ring.required, keys))

    async def put(self, request: web.Request) -> web.Response:
        """Other keys from now on, in all processes when this is answered. They come from `mmdctl keys`, as the file's text."""
        peer = peer_of(request)
        if peer is None or not peer.owns_keys:
            message = "only root changes the API keys, on the admin socket: sudo mmdctl keys"
            raise ApiError(403, message, code="keys_are_roots")
        text = await request.read()
        async with self._turn:
            try:
                ring = await asyncio.to_thread(KeyRing.parse, text)
            except BadKeysError as error:
                raise ApiError(400, str(error), code="bad_keys") from None
            if self.relieved:
                message = "another gateway process has taken over meanwhile; ask again"
                raise ApiError(503, message, code="gateway_replaced", retry_after_s=1)
            now = self._access.ring
            if ring.serial < now.serial or (ring.serial == now.serial and ring != now):
                message = f"the gateway has later API keys: serial {now.serial}, these have {ring.serial}"
                raise ApiError(409, message, code="keys_are_old")
            if ring != now or self._snapshot.key_problems:
                self._use(ring, ())
                if self.staff is not None:
                    self.staff.tell_keys()
                    await self.staff.keys_known()
        return as_json(KeysTold(ring.serial, len(ring.keys)))


def _read(text: bytes) -> tuple[KeyRing, tuple[str, ...]]:
    try:
        return KeyRing.parse(text), ()
    except BadKeysError as error:
        return error.usable, tuple(f"{problem} (the other keys are in use)" for problem in error.problems)
    except MmdError as error:
        return _CLOSED, (f"{KEYS_FILE} is not understood, so that everybody is refused: {error}",)
