"""What no well-meaning client sends: requests of two meanings, broken framing, odd pieces, clients that leave half-way.

All of it comes from a random.Random, so that a seed tells what was sent. What a correct reader would take the bytes for is told
by h11, which shares no code with the gateway.
"""

import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from random import Random
from typing import NamedTuple

import h11

__all__ = ["Attack", "Ending", "Request", "attack", "read_answers", "read_requests"]

_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/v1/realtime?model=MODEL",
    "/upstream/MODEL/v1/chat/completions",
    "/upstream/MODEL/health",
    "/upstream/MODEL//sleep?level=2",
    "/upstream/MODEL/%2e%2e/sleep",
    "/upstream/MODEL/collective_rpc",
    "/v1/responses/resp_x",
    "/v1/models",
    "/v1/models/MODEL",
    "/health",
    "/sleep",
    "/",
    "*",
    "http://x/v1/chat/completions",
    "//v1/chat/completions",
    "/v1/chat/completions/../../sleep",
    "/\x7f",
    "/" + "a" * 40_000,
)
_METHODS = ("POST", "POST", "POST", "POST", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PRI", "post", "")
_VERSIONS = ("1.1", "1.1", "1.1", "1.1", "1.0", "1.2", "2.0", "0.9", "1.1 ", "1.10", "")
_ENDS = ("\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r", "\r\r\n")
_FRAMING = (
    "Content-Length: LENGTH",
    "Content-Length: LENGTH",
    "Content-Length: LENGTH",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked",
    "Content-Length: LESS",
    "Content-Length: MORE",
    "Content-Length: +LENGTH",
    "Content-Length: -1",
    "Content-Length: 0xLENGTH",
    "Content-Length: LENGTH, LENGTH",
    "Content-Length: LENGTH\r\nContent-Length: LESS",
    "Content-Length: LENGTH\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: LESS",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding:\r\n chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Content-Length: 99999999999999999999",
    "Content-Length: ",
    "Content_Length: LENGTH",
    "X: y\r\nContent-Length: LENGTH",
)
_FIELDS = (
    "Host: localhost",
    "Host: y",
    "Host: x, y",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: Content-Length",
    "Connection: Transfer-Encoding, Host",
    "Connection: Upgrade\r\nUpgrade: websocket",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    "Expect: 100-continue",
    "Expect: 200-ok",
    "Content-Type: application/json",
    "Content-Type: multipart/form-data; boundary=b",
    'Content-Type: multipart/form-data; boundary=""',
    "Authorization: Bearer mmd-x",
    "x-api-key: \xff",
    "Origin: null",
    "X-Y: a\x00b",
    "X-Y: a\rb",
    "X-Y: caf\xe9",
    "X Y: z",
    ": z",
    "no colon",
    " folded: z",
    "Trailer: Content-Length",
    "TE: trailers",
    "Cookie: " + "c" * 5000,
    "X-Long: " + "l" * 40_000,
)


class Ending(StrEnum):
    """What the client does when everything is sent."""

    WAIT = "wait"
    """For answers."""
    FINISH = "finish"
    """Shuts its side."""
    LEAVE = "leave"
    """Closes at once."""
    RESET = "reset"
    """Closes so that the kernel sends a reset."""


class Attack(NamedTuple):
    pieces: tuple[bytes, ...]
    """To be sent one by one."""
    ending: Ending

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


class Request(NamedTuple):
    method: bytes
    target: bytes
    body: bytes


def attack(random: Random, model: str) -> Attack:
    """One connection's worth, one to four requests after one another, aimed at `model`."""
    requests = [_request(random, model) for _ in range(random.choice((1, 1, 2, 4)))]
    data = b"".join(requests)
    for _ in range(random.choice((0, 0, 0, 1, 3))):
        data = _mutate(random, data)
    return Attack(tuple(_split(random, data)), random.choice((Ending.WAIT,) * 6 + tuple(Ending)))


def _request(random: Random, model: str) -> bytes:
    body = _body(random, model)
    framing = random.choice(_FRAMING)
    if "chunked" in framing:
        body = _chunks(random, body)
    fields = [random.choice(_FIELDS) for _ in range(random.choice((0, 0, 1, 3)))]
    if random.random() < 0.95:
        fields.insert(0, "Host: localhost")
    if random.random() < 0.01:
        fields += ["X: y"] * 9000
    fields.insert(random.randint(0, len(fields)), framing)
    path = random.choice(_PATHS if random.random() < 0.5 else _PATHS[:5]).replace("MODEL", model)
    path += f"{'&' if '?' in path else '?'}n={random.getrandbits(48)}"  # no two are the same
    end = "\r\n" if random.random() < 0.9 else random.choice(_ENDS)
    lines = [f"{random.choice(_METHODS)} {path} HTTP/{random.choice(_VERSIONS)}", *fields, "", ""]
    head = end.join(lines)
    for word, value in (("LENGTH", len(body)), ("LESS", len(body) // 2), ("MORE", len(body) + 7)):
        head = head.replace(word, str(value))
    return head.encode("latin-1") + body


def _body(random: Random, model: str) -> bytes:
    # Something that a reader that is out of step would take for a request.
    hidden = "POST /sleep HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    bodies: Sequence[Callable[[], bytes]] = (
        lambda: json.dumps({"model": model, "messages": [{"role": "user", "content": hidden}], "max_tokens": 2}).encode(),
        lambda: json.dumps({"model": model, "stream": True, "prompt": "x", "input": "x", "max_tokens": 2}).encode(),
        lambda: json.dumps({"model": random.choice((None, 7, [], {}, True, "", "nobody", "\ud800", "x" * 5000))}).encode(),
        lambda: b'{"model": "%b", "model": "other", "x": NaN}' % model.encode(),
        lambda: b'{"model": "%b", "x": %b' % (model.encode(), b"[" * random.choice((5, 3000))),
        lambda: json.dumps({"model": model}).encode("utf-16"),
        lambda: random.randbytes(random.choice((0, 1, 300, 70_000))),
        lambda: hidden.encode(),
        lambda: b"",
        lambda: _form(random, model),
    )
    return random.choice(bodies)()


def _form(random: Random, model: str) -> bytes:
    field = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % model.encode()
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n%b\r\n' % random.randbytes(200)
    end = random.choice((b"--b--\r\n", b"--b--", b"--b\r\n", b"", b"--c--\r\n"))
    return b"".join(random.sample((field, file, field), random.randint(0, 3))) + end


def _chunks(random: Random, body: bytes) -> bytes:
    """As chunks, well made or not."""
    out, rest = b"", body
    while rest:
        size = random.randint(1, max(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        said = (
            f"{len(piece):x}" if random.random() < 0.97 else random.choice(("-1", "0x5", "+5", " 5", "5 ", "", "g", "f" * 17))
        )
        extension = "" if random.random() < 0.97 else random.choice((";a=b", ";", ";a\n", ";" + "e" * 20_000))
        end = "\r\n" if random.random() < 0.98 else random.choice(("\n", "", "\r", "\r\n\r\n"))
        out += f"{said}{extension}{end}".encode() + piece + end.encode()
    last = (
        "0\r\n\r\n"
        if random.random() < 0.9
        else random.choice(("0\n\n", "0\r\nContent-Length: 5\r\n\r\n", "00\r\n\r\n", "", "0\r\n"))
    )
    return out + last.encode()


def _mutate(random: Random, data: bytes) -> bytes:
    """Change, insert, remove or repeat something somewhere."""
    at = random.randint(0, len(data))
    length = random.choice((1, 1, 2, 20))
    kind = random.randrange(4)
    if kind == 0:
        return data[:at] + random.randbytes(length) + data[at + length :]
    if kind == 1:
        return data[:at] + random.choice((b"\r\n", b"\n", b"\0", b" ", b"\xff", b"0\r\n\r\n", b": ")) + data[at:]
    if kind == 2:
        return data[:at] + data[at + length :]
    return data[: at + length] + data[at:]


def _split(random: Random, data: bytes) -> list[bytes]:
    """Into pieces as a network would, or as nobody would."""
    kind = random.randrange(4)
    if kind < 2 or not data:
        return [data]
    if kind == 2:
        cuts = sorted(random.randint(0, len(data)) for _ in range(random.randint(1, 6)))
        return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
    begin = random.randint(0, len(data))
    few = data[begin : begin + 12]
    return [piece for piece in (data[:begin], *(few[i : i + 1] for i in range(len(few))), data[begin + 12 :]) if piece]


def read_requests(data: bytes) -> list[Request]:
    """The whole requests at the beginning of a connection's bytes, until one that h11 refuses."""
    found: list[Request] = []
    while data:
        reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        reader.receive_data(data)
        head: h11.Request | None = None
        body = b""
        try:
            while not isinstance(event := reader.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:  # it wants more, or the connection is another protocol's
                    return found
        except h11.RemoteProtocolError:
            return found
        assert head is not None
        found.append(Request(head.method, head.target, body))
        data = reader.trailing_data[0]
    return found


def read_answers(data: bytes, methods: Sequence[bytes]) -> list[int]:
    """The statuses of the answers in a connection's bytes, the last of which may be incomplete; ValueError when there is
    anything else in it. `methods`: of the requests, as far as they are known; all others are taken for GET."""
    statuses: list[int] = []
    while data:
        method = methods[len(statuses)] if len(statuses) < len(methods) else b"GET"
        reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(data)
        try:
            while not isinstance(event := reader.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    statuses.append(event.status_code)
                elif not isinstance(event, h11.Data | h11.InformationalResponse):
                    return statuses
        except h11.RemoteProtocolError as error:
            raise ValueError(f"{error} in {data[:300]!r}") from error
        data = reader.trailing_data[0]
    return statuses
