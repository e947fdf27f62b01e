"""What the deciding process and a worker say to each other, over a `mmd.gateway.channel`."""

from typing import Final

import msgspec

from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.counters import Counters

__all__ = [
    "Accept",
    "Admitted",
    "Ask",
    "AskProgress",
    "Begin",
    "CancelRequest",
    "Configured",
    "Connection",
    "Counted",
    "Drained",
    "Finish",
    "Found",
    "GiveBack",
    "Kept",
    "Keyed",
    "KeysKnown",
    "Lease",
    "Leave",
    "ListRequests",
    "Lost",
    "Progress",
    "Pulse",
    "Refused",
    "Revoke",
    "Revoked",
    "ToDecider",
    "ToWorker",
]


# Of the text of an error. What an engine wrote may be of any length, and nobody reads that much.
_TEXT_MAX: Final = 32768


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Get ready. Descriptors: the tally's memory, the configuration as in Configured, and the listening sockets."""


class Accept(msgspec.Struct, frozen=True, tag=True):
    """From now on take connections from the listening sockets."""


class Configured(msgspec.Struct, frozen=True, tag=True):
    """A configuration is in force. Descriptor: a memory file with the pickled mmd.config.Config."""


class Keyed(msgspec.Struct, frozen=True, tag=True):
    """These API keys are in force. Descriptor: a memory file with the pickled mmd.keys.KeyRing. Answered by KeysKnown."""


class KeysKnown(msgspec.Struct, frozen=True, tag=True):
    """No request is let in by the keys before these any more."""


class Lease(msgspec.Struct, frozen=True, tag=True):
    """Requests for `model` may go to `unit` without asking, counted in `slot` of the tally. Again: the endpoint is another."""

    unit: str
    model: str
    slot: int
    endpoint: str


class Revoke(msgspec.Struct, frozen=True, tag=True):
    """No more, see Lease. Answered by Revoked."""

    unit: str


class Revoked(msgspec.Struct, frozen=True, tag=True):
    unit: str


class Drained(msgspec.Struct, frozen=True, tag=True):
    """The last request at a unit whose lease has ended is over."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """A request without a lease wants `model`. `number`, the worker's, is what Admitted, Refused and GiveBack say of it."""

    number: int
    model: str
    wait_s: float | None
    """See Gate.request."""


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Nobody listened at `unit`: the request, asked for or not, waits for another instance."""

    number: int
    model: str
    unit: str
    wait_s: float | None


class GiveBack(msgspec.Struct, frozen=True, tag=True):
    """A request that was asked for is over."""

    number: int


class Admitted(msgspec.Struct, frozen=True, tag=True):
    number: int
    unit: str
    endpoint: str | None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request gets this error."""

    number: int
    status: int
    message: str
    code: str
    param: str | None
    retry_after_s: float | None
    tail: tuple[str, ...]

    @classmethod
    def of(cls, number: int, error: ApiError) -> "Refused":
        message, tail = _shortened(error.message, error.tail)
        return cls(number, error.status, message, error.code, error.param, error.retry_after_s, tail)

    def error(self) -> ApiError:
        return ApiError(
            self.status,
            self.message,
            code=self.code,
            param=self.param,
            retry_after_s=self.retry_after_s,
            tail=self.tail,
        )


def _shortened(message: str, tail: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """An error's text within `_TEXT_MAX` characters: the beginning of the message and the last lines, which say most."""
    if len(message) > _TEXT_MAX:
        message = f"{message[:_TEXT_MAX]}..."
    room, kept = _TEXT_MAX, list[str]()
    for line in reversed(tail):
        if len(line) >= room:
            break
        room -= len(line) + 1
        kept.append(line)
    return message, tuple(reversed(kept))


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The engine of `model` keeps an answer by this id."""

    answer: str
    model: str


class AskProgress(msgspec.Struct, frozen=True, tag=True):
    """What does a request that was asked for wait for? Answered by Progress."""

    number: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    number: int
    words: str


class Connection(msgspec.Struct, frozen=True, tag=True):
    """A client's connection is the other's to serve, see Channel.send_connection."""

    chunked: bool | None = None
    """Of an event stream whose head the client has already."""


class Counted(msgspec.Struct, frozen=True):
    """Counters on their way: msgspec asks a class for its annotations, and a compiled one has lost them."""

    requests: int
    statuses: dict[int, int]
    received_bytes: int
    sent_bytes: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, found: Counters) -> "Counted":
        return cls(
            found.requests,
            found.statuses,
            found.received_bytes,
            found.sent_bytes,
            found.prompt_tokens,
            found.completion_tokens,
        )

    def counters(self) -> Counters:
        return Counters(
            self.requests,
            self.statuses,
            self.received_bytes,
            self.sent_bytes,
            self.prompt_tokens,
            self.completion_tokens,
        )


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """Sent regularly: the worker turns."""

    connections: int
    counters: dict[str, Counted]
    """What has come since the last one, by model name."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Another gateway accepts: send every connection back as soon as nothing is answered on it."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Accept nothing more, answer what was accepted within `timeout_s`, and end."""

    timeout_s: float


class ListRequests(msgspec.Struct, frozen=True, tag=True):
    """Which requests are in hand? Answered by Found."""

    number: int


class CancelRequest(msgspec.Struct, frozen=True, tag=True):
    """End the one with this id, if it is yours. Answered by Found."""

    number: int
    request: str


class Found(msgspec.Struct, frozen=True, tag=True):
    """The requests that were asked for. Descriptor: a memory file with JSON, a list of mmd.status.RequestStatus."""

    number: int


ToWorker = (
    Begin
    | Accept
    | Configured
    | Keyed
    | Lease
    | Revoke
    | Admitted
    | Refused
    | Progress
    | Connection
    | Leave
    | Finish
    | ListRequests
    | CancelRequest
)
ToDecider = Revoked | KeysKnown | Drained | Found | Kept | Ask | Lost | GiveBack | AskProgress | Connection | Pulse
