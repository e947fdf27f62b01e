"""JSON bodies that msgspec does not take: small ones are read by json, large ones are refused before anything is built."""

import subprocess
import sys

import pytest

from mmd.config import Filters
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.document import find_names, rewrite

_MIB = 1 << 20
_ODD = {
    "NaN": b'{"model": "m", "stream": true, "a": [NaN, %b]}',
    "Infinity": b'{"model": "m", "stream": true, "a": [-Infinity, %b]}',
    "surrogate": b'{"model": "m", "stream": true, "a": ["\\ud800", %b]}',
    "mark": b'\xef\xbb\xbf{"model": "m", "stream": true, "a": [%b]}',
}

# What the refusal of a body takes in memory beyond the body itself, in a process that does nothing else.
_PROBE = """
import resource, sys
from mmd.config import Filters
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.document import find_names, rewrite
body = eval(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    eval(sys.argv[2])
    code = ""
except ApiError as error:
    code = error.code
    assert len(error.message) < 500
print(code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def probe(body: str, call: str) -> tuple[str, int]:
    """The error's code, and by how many MiB the process has grown."""
    out = subprocess.run([sys.executable, "-c", _PROBE, body, call], check=True, capture_output=True, text=True).stdout
    code, _, grown = out.strip().rpartition(" ")
    return code, int(grown)


@pytest.mark.parametrize("kind", _ODD)
def test_small_ones_are_read(kind: str) -> None:
    body = _ODD[kind] % b"1"
    found = find_names(body)
    assert (found.model, found.stream) == ("m", True)
    assert b'"other"' in rewrite(body, "other", Filters())


@pytest.mark.parametrize("kind", _ODD)
def test_large_ones_are_refused_with_the_reason(kind: str) -> None:
    body = _ODD[kind] % (b"1," * _MIB + b"1")
    for read in (lambda: find_names(body), lambda: rewrite(body, "other", Filters())):
        with pytest.raises(ApiError, match="NaN, Infinity") as caught:
            read()
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_utf_16_is_read_up_to_a_mebibyte() -> None:
    text = '{"model": "m", "a": "%s"}'
    assert find_names((text % "x").encode("utf-16")).model == "m"
    with pytest.raises(ApiError, match="UTF-8"):
        find_names((text % ("x" * _MIB)).encode("utf-16"))


@pytest.mark.parametrize("call", ["find_names(body)", "rewrite(body, 'other', Filters())"])
def test_nan_in_a_large_body_costs_no_memory(call: str) -> None:
    """It took 1.7 GB, and as many seconds, during which nothing else moved."""
    code, grown = probe("b'{\"model\": \"m\", \"a\": [' + b'1,' * (31 << 20) + b'NaN]}'", call)
    assert (code, grown < 40) == ("invalid_json", True), grown


def test_a_large_body_that_ends_in_the_middle_costs_no_memory() -> None:
    code, grown = probe('b\'{"model": "m", "a": [\' + b\'1,\' * (31 << 20)', "find_names(body)")
    assert (code, grown < 40) == ("invalid_json", True), grown


def test_millions_of_keys_are_not_taken_apart() -> None:
    """To write such a document again took 1 GB and 4.6 s."""
    body = 'b\'{"model": "m",\' + b",".join(b\'"%x" : 1\' % number for number in range(3_000_000)) + b"}"'
    code, grown = probe(body, "rewrite(body, 'other', Filters())")
    assert (code, grown < 40) == ("too_many_keys", True), grown
    assert probe(body, "find_names(body)")[0] == "", "as it is, it passes"


def test_large_text_with_colons_is_written_again() -> None:
    body = b'{"model": "m", "messages": [{"content": "%b"}]}' % (b"10:20:30 " * 200_000)
    assert rewrite(body, "other", Filters()) == body.replace(b'"model": "m"', b'"model":"other"').replace(
        b'", "mess', b'","mess'
    ).replace(b'"messages": ', b'"messages":')
