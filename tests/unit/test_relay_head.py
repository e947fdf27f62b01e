"""Heads and bodies as the relay reads them: what is refused, by name, and that no split of the bytes changes a meaning."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from relay_gateway import Script, chat_bytes, relay, run

from mmd.gateway.relay import exchange
from mmd.gateway.relay.framing import Chunked, Length, chunk, last_chunk
from mmd.gateway.relay.head import (
    HEAD_MAX_BYTES,
    MalformedError,
    RequestHead,
    RequestParser,
    ResponseHead,
    ResponseParser,
)
from mmd.gateway.relay.known import KnownHeads, KnownRequests
from mmd.gateway.relay.visitor import Visitor

_START = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n"

REFUSED_REQUESTS = {
    "content-length twice, alike": _START + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n",
    "content-length twice, different": _START + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
    "content-length as a list": _START + b"Content-Length: 3, 3\r\n\r\n",
    "content-length with a sign": _START + b"Content-Length: +3\r\n\r\n",
    "content-length negative": _START + b"Content-Length: -3\r\n\r\n",
    "content-length hexadecimal": _START + b"Content-Length: 0x3\r\n\r\n",
    "content-length with an underscore": _START + b"Content-Length: 1_0\r\n\r\n",
    "content-length empty": _START + b"Content-Length: \r\n\r\n",
    "content-length with a space inside": _START + b"Content-Length: 3 3\r\n\r\n",
    "content-length past 64 bits": _START + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "content-length of 64 bits": _START + b"Content-Length: 18446744073709551615\r\n\r\n",
    "content-length before transfer-encoding": _START + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "transfer-encoding before content-length": _START + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    "transfer-encoding twice": _START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "transfer-encoding identity": _START + b"Transfer-Encoding: identity\r\n\r\n",
    "transfer-encoding gzip, chunked": _START + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "transfer-encoding chunked, gzip": _START + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    "transfer-encoding xchunked": _START + b"Transfer-Encoding: xchunked\r\n\r\n",
    "transfer-encoding with a vertical tab": _START + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    "transfer-encoding with a parameter": _START + b"Transfer-Encoding: chunked;q=1\r\n\r\n",
    "transfer-encoding empty": _START + b"Transfer-Encoding:\r\n\r\n",
    "transfer-encoding in http/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "transfer-encoding, space before colon": _START + b"Transfer-Encoding : chunked\r\n\r\n",
    "space before colon": _START + b"X-A : b\r\n\r\n",
    "space before the first field": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "folded line": _START + b"X-A: b\r\n c\r\n\r\n",
    "folded content-length": _START + b"Content-Length: 3\r\n 4\r\n\r\n",
    "folded transfer-encoding": _START + b"Transfer-Encoding:\r\n chunked\r\n\r\n",
    "bare lf after a field": _START + b"X-A: b\nX-C: d\r\n\r\n",
    "bare lf everywhere": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare lf after the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare lf at the end": _START + b"X-A: b\r\n\n",
    "bare cr in a value": _START + b"X-A: b\rX-C: d\r\n\r\n",
    "cr cr lf": _START + b"X-A: b\r\r\n\r\n",
    "nul in a value": _START + b"X-A: b\0c\r\n\r\n",
    "nul in a name": _START + b"X\0A: b\r\n\r\n",
    "control character in a value": _START + b"X-A: b\x01c\r\n\r\n",
    "line without a colon": _START + b"X-A\r\n\r\n",
    "empty name": _START + b": b\r\n\r\n",
    "separator in a name": _START + b"X(A: b\r\n\r\n",
    "http/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "http/0.9": b"GET /\r\n\r\n",
    "rtsp": b"SETUP / RTSP/1.0\r\nHost: a\r\n\r\n",
    "method in lower case": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    "connect": b"CONNECT h:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "tabs in the request line": b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces before the target": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces behind the target": b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n",
    "space behind the version": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "control character in the target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment in the target": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without a slash": b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk of another method": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "another expectation": _START + b"Expect: 200-ok\r\nContent-Length: 3\r\n\r\n",
    "empty lines before the request": b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "garbage": b"hello\r\n\r\n",
    "head too large": _START + b"X-A: " + b"b" * HEAD_MAX_BYTES + b"\r\n\r\n",
    "too many fields": _START + b"X: y\r\n" * (HEAD_MAX_BYTES // 6 + 1) + b"\r\n",
}
"""Requests that are answered by an error, after which the connection is closed."""

REFUSED_RESPONSES = {
    "content-length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "content-length before transfer-encoding": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "transfer-encoding before content-length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    "transfer-encoding gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "bare lf": b"HTTP/1.1 200 OK\nA: b\n\n",
    "folded line": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    "space before colon": b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
    "status of two digits": b"HTTP/1.1 99 x\r\n\r\n",
    "status of four digits": b"HTTP/1.1 1000 x\r\n\r\n",
    "http/2.0": b"HTTP/2.0 200 x\r\n\r\n",
    "nul in a value": b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n",
    "bare cr in a value": b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
    "head too large": b"HTTP/1.1 200 OK\r\nA: " + b"b" * HEAD_MAX_BYTES + b"\r\n\r\n",
    "garbage": b"hello\r\n\r\n",
    "unasked 101": b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}
"""Answers of an engine that are none; the client gets a 502, and the connection to the engine is closed."""

BAD_CHUNKS = {
    "size with a sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "size with an underscore": b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n",
    "size behind a space": b" 3\r\nabc\r\n0\r\n\r\n",
    "size before a space": b"3 \r\nabc\r\n0\r\n\r\n",
    "size empty": b"\r\nabc\r\n0\r\n\r\n",
    "size negative": b"-1\r\nabc\r\n0\r\n\r\n",
    "size of 16 digits": b"1000000000000000\r\nabc\r\n",
    "size of 64 bits and one": b"10000000000000003\r\nabc\r\n0\r\n\r\n",
    "size line ended by lf": b"3\nabc\r\n0\r\n\r\n",
    "size line ended by cr": b"3\rabc\r\n0\r\n\r\n",
    "extension": b"3;a=b\r\nabc\r\n0\r\n\r\n",
    "extension with lf": b"3;\nabc\r\n0\r\n\r\n",
    "data longer than its size": b"3\r\nabcd\r\n0\r\n\r\n",
    "data ended by lf": b"3\r\nabc\n0\r\n\r\n",
    "trailer": b"3\r\nabc\r\n0\r\nX: y\r\n\r\n",
    "trailer with transfer-encoding": b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "end ended by lf": b"3\r\nabc\r\n0\r\n\n",
    "letters": b"xyz\r\n",
}

VALID_REQUEST = (
    b"POST /v1/chat/completions?x=y HTTP/1.1\r\nHost: h:1\r\nX-Tab: a\tb\r\nConnection: keep-alive, X-Hop\r\nX-Hop: secret\r\n"
    b"Authorization: Bearer k\r\nContent-Length: 42\r\n\r\n"
)


def _parse(parser: RequestParser | ResponseParser, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The head that the pieces begin with, and what follows it."""
    for number, piece in enumerate(pieces):
        end = parser.parse(piece)
        if end is not None:
            return piece[:end], piece[end:] + b"".join(pieces[number + 1 :])
    raise AssertionError("no end")


def _read_body(pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The content of the chunked body that the pieces begin with, and what follows it."""
    body, content = Chunked(), b""
    for number, piece in enumerate(pieces):
        found, rest = body.feed(piece)
        content += found
        if rest is not None:
            return content, rest + b"".join(pieces[number + 1 :])
    raise AssertionError("no end")


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


@pytest.mark.parametrize("name", REFUSED_REQUESTS)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_request_of_two_meanings_is_refused(name: str, step: int) -> None:
    data = REFUSED_REQUESTS[name]
    with pytest.raises(MalformedError):
        _parse(RequestParser(), [data[start : start + step] for start in range(0, len(data), step)])


@pytest.mark.parametrize("name", [name for name in REFUSED_RESPONSES if name != "unasked 101"])
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_an_answer_of_two_meanings_is_refused(name: str, step: int) -> None:
    data = REFUSED_RESPONSES[name]
    with pytest.raises(MalformedError):
        _parse(ResponseParser(), [data[start : start + step] for start in range(0, len(data), step)])


@given(st.lists(st.integers(0, 400)))
def test_no_split_changes_a_request(cuts: list[int]) -> None:
    parser = RequestParser()
    _, rest = _parse(parser, _split(VALID_REQUEST + b"body\r\n\r\n", cuts))
    head = parser.head
    assert rest == b"body\r\n\r\n"
    assert (head.method, head.target, head.path) == (b"POST", b"/v1/chat/completions?x=y", b"/v1/chat/completions")
    assert (head.length, head.chunked, head.keep_alive, head.host) == (42, False, True, b"h:1")
    assert head.fields == [(b"x-tab", b"X-Tab", b"a\tb"), (b"authorization", b"Authorization", b"Bearer k")]
    assert head.engine_lines == b"X-Tab: a\tb\r\n", "neither credentials nor what Connection names"


@given(st.lists(st.integers(0, 200)))
def test_no_split_changes_an_answer(cuts: list[int]) -> None:
    parser = ResponseParser()
    data = b"HTTP/1.1 404 Not Found\r\nServer: x\r\nX-A: b\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    _parse(parser, _split(data, cuts))
    head = parser.head
    assert (head.status, head.chunked, head.length, head.keep_alive) == (404, True, None, False)
    assert head.lines == b"HTTP/1.1 404 Not Found\r\nX-A: b\r\n"


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.lists(st.integers(0, 4000)), st.binary(max_size=20))
def test_no_split_changes_a_chunked_body(contents: list[bytes], cuts: list[int], after: bytes) -> None:
    data = b"".join(map(chunk, contents)) + last_chunk
    assert _read_body(_split(data + after, cuts)) == (b"".join(contents), after)


@pytest.mark.parametrize("name", BAD_CHUNKS)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_chunked_body_of_two_meanings_is_refused(name: str, step: int) -> None:
    data = BAD_CHUNKS[name]
    with pytest.raises(MalformedError):
        _read_body([data[start : start + step] for start in range(0, len(data), step)])


def test_a_length_takes_what_is_its_own() -> None:
    body = Length(5)
    assert body.feed(b"abc") == (b"abc", None)
    assert body.feed(b"defg") == (b"de", b"fg")
    assert Length(0).feed(b"GET") == (b"", b"GET")


def test_a_known_head_is_found_whatever_its_length() -> None:
    known: KnownHeads[RequestHead] = KnownHeads()
    head = b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: %b\r\nX-A: b\r\n\r\n"
    parser = RequestParser()
    assert parser.parse(head % b"42") == len(head % b"42")
    known.learn(parser.head, head % b"42")
    for _ in range(2):  # among all, then as the last one
        assert known.find(head % b"7" + b"body...") == (parser.head, 7, len(head % b"7"))
    for digits in (b"+7", b"", b"7 ", b"0x7", b"7, 7", b"9" * 16, b"\xb2"):
        assert known.find(head % digits) is None, digits
    assert known.find(head.replace(b"X-A: b", b"X-A: c") % b"42") is None
    assert known.find((head % b"42")[:-2]) is None, "incomplete"


def test_digits_of_another_field_are_not_taken_for_a_length() -> None:
    known: KnownHeads[ResponseHead] = KnownHeads()
    head = b"HTTP/1.1 200 OK\r\nX-Strength: 5\r\nContent-Length: 3\r\n\r\n"
    parser = ResponseParser()
    parser.parse(head)
    known.learn(parser.head, head)
    assert known.find(head) is None
    assert known.find(head.replace(b"5", b"6")) is None


@given(st.binary(max_size=200))
def test_known_heads_never_take_what_the_parser_would_not(data: bytes) -> None:
    known: KnownHeads[RequestHead] = KnownHeads()
    parser = RequestParser()
    parser.parse(VALID_REQUEST)
    known.learn(parser.head, VALID_REQUEST)
    assert known.find(VALID_REQUEST) is not None, "and it is the last one, which is tried first"
    mangled = VALID_REQUEST.replace(b"42", data) + b"\r\n\r\n"
    found = known.find(mangled)
    if found is not None:
        again = RequestParser()
        assert again.parse(mangled) == found[2]
        assert again.head.length == found[1]
        assert again.head.fields == found[0].fields


# Heads with credentials.

_KEYED = b"POST / HTTP/1.1\r\nHost: a\r\n%bAccept: */*\r\nContent-Length: 42\r\n\r\n"


def learned(known: KnownRequests, data: bytes) -> RequestHead:
    parser = RequestParser()
    assert parser.parse(data) == len(data)
    known.learn(parser.head, data)
    return parser.head


def remembered(value: object, seen: set[int]) -> str:
    """Everything that can be reached from it, as text."""
    if id(value) in seen:
        return ""
    seen.add(id(value))
    parts = [value] if isinstance(value, bytes | str) else []
    children = list(value.items()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple | set) else []
    if type(value).__module__.startswith("mmd."):
        children = [getattr(value, name) for name in dir(value) if not name.startswith("__")]
    return " ".join([*map(str, parts), *(remembered(each, seen) for each in children)])


@pytest.mark.parametrize(
    "field",
    [b"Authorization: Bearer %b", b"authorization: %b", b"X-Api-Key: %b", b"x-api-key: %b", b"X-API-Key: %b"],
)
def test_a_head_is_known_whatever_its_credential_which_is_not_remembered(field: bytes) -> None:
    known = KnownRequests()
    head = learned(known, _KEYED % (field % b"first" + b"\r\n"))
    for key in (b"first", b"second", b"x" * 300, b"ength:", b"7"):
        for digits in (b"42", b"7"):
            data = (_KEYED % (field % key + b"\r\n")).replace(b"42", digits)
            found = known.find(data + b"body")
            assert found is not None, key
            again = RequestParser()
            assert again.parse(data) == found[2]
            assert again.head.fields == found[0].fields
            assert (again.head.length, again.head.engine_lines) == (found[1], found[0].engine_lines)
            if digits == b"42":
                assert found[0].visitor is None, "whose it is, is found out for each"
            found[0].is_from(Visitor(None, "nobody"), edition := object())
            again_found = known.find(data + b"body")
            assert again_found is not None
            assert (again_found[0].visitor, again_found[0].edition) == (found[0].visitor, edition), "unless it comes again"
    assert head.fields != known.find(data)[0].fields  # type: ignore[index]
    kept = remembered(known, set())
    assert "Host: a" in kept
    for secret in ("first", "second", "xxxx"):
        assert secret not in kept


def test_a_known_head_with_a_credential_lacks_nothing() -> None:
    """It is a copy: an attribute that is added to heads has to be copied as well."""
    known, key = KnownRequests(), b"Authorization: Bearer first\r\n"
    more = b"Origin: http://b\r\nX-Forwarded-For: 192.0.2.1\r\nX-Request-Id: a\r\nX-MMD-Wait: 1\r\nExpect: 100-continue\r\n"
    more += b"Connection: upgrade, x\r\nUpgrade: websocket\r\nSec-Fetch-Site: cross-site\r\n"
    data = _KEYED.replace(b"POST /", b"GET /upstream/m/?a=b").replace(b"Content-Length: 42\r\n", b"") % (key + more)
    parsed = learned(known, data)
    found = known.find(data)
    assert found is not None
    for name in (name for name in dir(parsed) if not name.startswith("__") and not callable(getattr(parsed, name))):
        if name not in ("key_index", "known", "key_digest"):
            assert getattr(found[0], name) == getattr(parsed, name), name


@pytest.mark.parametrize(
    "fields",
    [
        b"Cookie: secret=1\r\n",
        b"Proxy-Authorization: Basic secret\r\n",
        b"pROXY-aUTHORIZATION: Basic secret\r\n",
        b"Authorization: Bearer secret\r\nX-Api-Key: secret\r\n",
        b"Authorization: Bearer secret\r\nCookie: a=b\r\n",
        b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.secret\r\n",
        b"aUthorization: Bearer secret\r\nauthorization: Bearer secret\r\n",
        b"AUTHORIZATION: Bearer secret\r\n",
        b"api-key: secret\r\n",
        b"X-Auth-Token: secret\r\n",
        b"X-Session: secret\r\n",
        b"Authorization: Digest a=secret, b=2\r\n",
        b"Authorization: Bearer secret \xff\r\n",
        b"X-Note: authorization: secret\r\n",
        b"Referer: http://a/?access_token=secret\r\n",
        b"Connection: x-api-key\r\nX-Api-Key: secret\r\n",
    ],
)
def test_a_head_with_any_other_secret_is_not_remembered(fields: bytes) -> None:
    known = KnownRequests()
    learned(known, _KEYED % fields)
    assert known.find(_KEYED % fields) is None
    assert "secret" not in remembered(known, set())


@pytest.mark.parametrize("target", [b"/x?key=secret", b"/x?a=1&access_token=secret", b"http://user:secret@a/"])
def test_a_secret_in_the_target_is_not_remembered(target: bytes) -> None:
    known = KnownRequests()
    learned(known, (_KEYED % b"").replace(b" / ", b" %b " % target))
    assert "secret" not in remembered(known, set())


@given(st.binary(max_size=60), st.binary(max_size=60), st.booleans())
@example(b"Bearer x\r\nContent-Length: 5", b"42", True)
@example(b"Bearer ength: 5", b"42", True)
@example(b"x, y", b"42", True)
@example(b" x", b"42", True)
@example(b"", b"42", True)
def test_known_credentials_never_take_what_the_parser_would_not(key: bytes, digits: bytes, twice: bool) -> None:
    known = KnownRequests()
    learned(known, _KEYED % b"Authorization: Bearer first\r\n")
    if twice:
        assert known.find(_KEYED % b"Authorization: Bearer first\r\n") is not None, (
            "and it is the last one, which is tried first"
        )
    data = (_KEYED % b"Authorization: Bearer first\r\n").replace(b"Bearer first", key).replace(b"42", digits)
    found = known.find(data)
    if found is not None:
        again = RequestParser()
        assert again.parse(data) == found[2]
        assert (again.head.length, again.head.fields) == (found[1], found[0].fields)


def test_an_answer_with_a_cookie_is_not_remembered(tmp_path: Path) -> None:
    async def check() -> None:
        head = b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nSet-Cookie: secret\r\nContent-Length: 2\r\n\r\n{}"
        async with relay(tmp_path, Script(head, head)) as running:
            connection = await running.connect()
            for _ in range(2):
                assert (await connection.ask(chat_bytes()))[0] == 200
        assert b"secret" not in repr(list(exchange._known._heads)).encode()

    run(check())
