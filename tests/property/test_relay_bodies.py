"""Bodies of requests: what is changed in them, and what another reader finds in those that are passed on."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import MultipartReader
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd.config import Filters
from mmd.gateway.relay.document import find_names, rewrite
from mmd.gateway.relay.form import FormError, find_fields

_BOUNDARY = "a-bcd"
_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"

# Documents.

_NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_SPACE = st.text(" \t\r\n", max_size=2)
_KEYS = st.sampled_from(["a", "b", "é", 'quo"te', "temperature", "models", ""]) | _TEXTS.filter(lambda key: key != "model")


@st.composite
def _string(draw: st.DrawFn) -> str:
    return json.dumps(draw(_TEXTS), ensure_ascii=draw(st.booleans()))


def _lists(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(_SPACE, st.lists(values, max_size=3)).map(lambda found: f"[{found[0]}{','.join(found[1])}]")


def _objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(_string(), _SPACE, values), max_size=3)
    return pairs.map(lambda found: "{" + ",".join(f"{key}{space}:{value}" for key, space, value in found) + "}")


_VALUES = st.recursive(
    _NUMBERS | _string() | st.sampled_from(["true", "false", "null"]),
    lambda inner: _lists(inner) | _objects(inner),
    max_leaves=8,
)


def _read(text: str | bytes) -> dict[str, object]:
    """With numbers as they are written; of keys that come twice the last."""
    found = json.loads(text, parse_float=lambda digits: ("number", digits), parse_int=lambda digits: ("number", digits))
    assert isinstance(found, dict)
    return found


@given(
    st.lists(st.tuples(_KEYS, _VALUES), max_size=6),
    st.integers(0, 6),
    _SPACE,
    st.lists(_KEYS, max_size=3),
    st.dictionaries(_KEYS, st.none() | st.booleans() | _TEXTS | st.lists(_TEXTS), max_size=3),
)
def test_a_rewritten_document_is_the_same_to_the_digit(
    pairs: list[tuple[str, str]], at: int, space: str, strip: list[str], changes: dict[str, object]
) -> None:
    members = [f"{json.dumps(key)}:{space}{value}" for key, value in pairs]
    members.insert(at, f'{space}"model"{space}:"alias"')
    text = "{" + f",{space}".join(members) + "}" + space
    assert find_names(text.encode()).model == "alias"
    wanted = {key: value for key, value in _read(text).items() if key not in strip} | changes | {"model": "m"}
    assert _read(rewrite(text.encode(), "m", Filters(tuple(strip), changes))) == wanted


# Forms.

_BITS = (
    b"\r\n",
    b"\r",
    b"\n",
    b"-",
    b"--",
    b"a",
    b"a-bcd",
    b"\r\n--a-bc",
    b"\r\n--a-bc\r\n--a-b",
    b"\r\n--",
    b"--a-bcd--",
    b"x" * 9000,
    b"\xff",
)
_CONTENT = st.lists(st.sampled_from(_BITS) | st.binary(max_size=4), max_size=6).map(b"".join)
_PARTS = st.lists(st.tuples(st.sampled_from(["model", "stream", "file", "g[]", "é"]), st.booleans(), _CONTENT), max_size=5)


def _head(name: str, *, file: bool) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{"; filename=x" if file else ""}\r\n'.encode()


def _written(parts: list[tuple[str, bool, bytes]]) -> bytes:
    delimiter = b"--" + _BOUNDARY.encode()
    return (
        b"".join(b"%b\r\n%b\r\n%b\r\n" % (delimiter, _head(name, file=file), value) for name, file, value in parts)
        + delimiter
        + b"--\r\n"
    )


def _ours(body: bytes) -> list[tuple[str, bytes]]:
    found = find_fields(_TYPE.encode(), body)
    spans = sorted((span, name) for name, spans in found.items() for span in spans)
    return [(name, body[start:end]) for (start, end), name in spans]


def _theirs(body: bytes) -> list[tuple[str, bytes]]:
    """What aiohttp finds, a parser that the simulated engine reads forms with."""

    async def read() -> list[tuple[str, bytes]]:
        loop = asyncio.get_running_loop()
        stream = aiohttp.StreamReader(BaseProtocol(loop), 1 << 20, loop=loop)
        stream.feed_data(body)
        stream.feed_eof()
        found = []
        reader = MultipartReader({"Content-Type": _TYPE}, stream)
        while (part := await reader.next()) is not None:
            assert isinstance(part, aiohttp.BodyPartReader)
            value = await part.read()
            if part.filename is None:
                # Bytes that are no UTF-8 are surrogates to it.
                name = (part.name or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                found.append((name, bytes(value)))
        return found

    return asyncio.run(read())


@given(_PARTS)
@settings(max_examples=150)
def test_the_fields_of_a_form_are_those_that_another_parser_finds(parts: list[tuple[str, bool, bytes]]) -> None:
    body = _written(parts)
    if any(b"\r\n--a-bcd" in b"\r\n" + value + b"\r" for _, _, value in parts):
        # A boundary within a value: whatever follows it, it is never a part of that value.
        try:
            assert all(b"\r\n--a-bcd" not in value for _, value in _ours(body))
        except FormError:
            return
    else:
        assert _ours(body) == [(name, value) for name, file, value in parts if not file]
    assert _ours(body) == _theirs(body)


@given(_PARTS.filter(bool), st.data())
@settings(max_examples=300)
def test_no_form_is_read_in_two_ways(parts: list[tuple[str, bool, bytes]], data: st.DataObject) -> None:
    """Of a form that is damaged anywhere, or complemented, either nothing is read or what another parser reads."""
    body = _written([(name, file, value[:20]) for name, file, value in parts])
    at = data.draw(st.integers(0, len(body)))
    cut = data.draw(st.integers(0, 8))
    more = data.draw(
        st.sampled_from((b"", b" ", b'"', b";", b"\\", b":", b"; name=model", b"; filename=y", b"\r\n\r\n", *_BITS))
    )
    body = body[:at] + more + body[at + cut :]
    try:
        found = _ours(body)
    except FormError:
        return
    try:
        theirs = _theirs(body)
    except Exception:  # it refuses more than we do
        return
    assert found == theirs


def test_a_form_of_thousands_of_boundaries_takes_no_time() -> None:
    body = b"--a-bcd\r\n" * 200_000
    with pytest.raises(FormError):
        find_fields(_TYPE.encode(), body)


@pytest.mark.parametrize(
    ("parameters", "lines"),
    [("", "".join(f"\r\nh{number}: x" for number in range(20))), ("".join(f"; p{number}=x" for number in range(20)), "")],
    ids=["lines", "parameters"],
)
def test_the_head_of_a_part_is_short(parameters: str, lines: str) -> None:
    """800 of either in each of 1,000 parts took 3 s to read, during which nothing else moved."""
    head = f'Content-Disposition: form-data; name="model"{parameters}{lines}'
    with pytest.raises(FormError, match="more than 16"):
        find_fields(_TYPE.encode(), f"--{_BOUNDARY}\r\n{head}\r\n\r\nm\r\n--{_BOUNDARY}--\r\n".encode())
