"""What a D-Bus worker takes for a request: exactly its own form, whatever else an attacker may send."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd.names import is_model_unit
from mmd.systemd.request import REQUEST_BYTES, RequestError, UnitCall, UnitRequest, parse_request

UNIT = "mmd-model-qwen@0-1.service"


def line(**request: object) -> bytes:
    return json.dumps({"id": 1, **request}).encode()


def test_every_call() -> None:
    assert parse_request(line(call="list")) == UnitRequest(1, UnitCall.LIST)
    for call in ("read", "processes", "start", "stop", "restart", "reset_failed"):
        assert parse_request(line(call=call, unit=UNIT)) == UnitRequest(1, UnitCall(call), UNIT)
    kill = line(call="kill", unit=UNIT, whom="all", signal=9)
    assert parse_request(kill) == UnitRequest(1, UnitCall.KILL, UNIT, "all", 9)


@pytest.mark.parametrize(
    "unit",
    [
        "",
        "mmd-gateway.service",
        "dbus.service",
        "mmd-model-x@0.socket",
        "mmd-model-x@0.service\n",
        "\nmmd-model-x@0.service",
        "mmd-model-x@0.service\0",
        "mmd-model-../@0.service",
        "mmd-model-..@0.service",
        "mmd-model-x/../../y@0.service",
        "mmd-model-x@.service",
        "mmd-model-x.service",
        "mmd-model-X@0.service",
        "mmd-model-\u212a@0.service",  # lower() makes a k of it
        "mmd-model-x@\u0661.service",  # a digit to str.isdigit
        "mmd-model-x@00.service",
        "mmd-model-x@1-0.service",
        "mmd-model-x@0-0.service",
        "mmd-model-x@0-.service",
        "mmd-model-x@%i.service",
        "mmd-model-x@0\\x2d1.service",
        "mmd-model-*@*.service",
        f"mmd-model-{'x' * 64}@0.service",
        f"mmd-model-x@{'9' * 5000}.service",
        f"mmd-model-x@{'-'.join(map(str, range(100)))}.service",
        "\ud800",
        None,
        0,
        True,
        ["mmd-model-x@0.service"],
        {"unit": UNIT},
    ],
)
@pytest.mark.parametrize("call", ["read", "start", "stop"])
def test_no_other_units(call: str, unit: object) -> None:
    with pytest.raises(RequestError):
        parse_request(line(call=call, unit=unit))


@pytest.mark.parametrize(
    "request_",
    [
        {"call": "reload_daemon"},
        {"call": "StartTransientUnit", "unit": UNIT},
        {"call": "__class__", "unit": UNIT},
        {"call": ["start"], "unit": UNIT},
        {"call": None},
        {},
        {"call": "list", "unit": UNIT},
        {"call": "start"},
        {"call": "start", "unit": UNIT, "mode": "isolate"},
        {"call": "start", "unit": UNIT, "signal": 9},
        {"call": "list", "id": 0},
        {"call": "list", "id": -1},
        {"call": "list", "id": 1.0},
        {"call": "list", "id": True},
        {"call": "list", "id": "1"},
        {"call": "list", "id": 10**300},
        {"call": "kill", "unit": UNIT},
        {"call": "kill", "unit": UNIT, "whom": "all", "signal": 19},
        {"call": "kill", "unit": UNIT, "whom": "all", "signal": "9"},
        {"call": "kill", "unit": UNIT, "whom": "all", "signal": 9.0},
        {"call": "kill", "unit": UNIT, "whom": "all\n", "signal": 9},
    ],
)
def test_no_other_requests(request_: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        parse_request(line(**request_))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"list"',
        b"{",
        b"[" * (REQUEST_BYTES - 1),
        b'{"a":' * (REQUEST_BYTES // 5),
        b'{"id":1,"call":"list"}\xff',
        b'{"id":NaN,"call":"list"}',
        b'{"id":Infinity,"call":"list"}',
        b'{"id":' + b"9" * 2000 + b',"call":"list"}',
        b'{"id":1,"call":"list","call":"list"}',
        '{"id":1,"call":"list"}'.encode("utf-16"),
        b"\xef\xbb\xbf" + b'{"id":1,"call":"list"}',
        b'{"id":1,"call":"list"}' + b" " * REQUEST_BYTES,
        b'{"id":1,"call":"list"} {}',
    ],
)
def test_no_other_json(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_request(raw)


def test_the_id_comes_back_with_the_refusal() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(b'{"id":12,"call":"format the disk"}')
    assert caught.value.id == 12


def sound(raw: bytes) -> None:
    """Whatever comes, it is refused or is a request of our own form."""
    try:
        request = parse_request(raw)
    except RequestError:
        return
    assert request.call in UnitCall
    assert request.call is UnitCall.LIST or is_model_unit(request.unit)
    assert request.unit.isascii()


@given(st.binary(max_size=3000))
def test_any_bytes(raw: bytes) -> None:
    sound(raw)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([UNIT, "all", *UnitCall]),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from(["id", "call", "unit", "whom", "signal", "mode"]), _ANYTHING))
def test_any_object(request_: dict[str, Any]) -> None:
    sound(json.dumps(request_).encode())


@given(st.text(alphabet="mdel-@.servic0129\n\0/\\ xcpu", max_size=40).map(lambda tail: f"mmd-model-{tail}"))
def test_any_name(unit: str) -> None:
    sound(line(call="start", unit=unit))
