"""Properties: a ring reads back as it is, whatever is in it; nothing but a key itself is found; a rate holds in every span."""

import string
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mmd.keys import KEY_BYTES, BadKeysError, Key, KeyRing, KeyScope, Limit, Rate, digest, key_text
from mmd.kinds import NAME, BadValueError

SECRETS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).map(key_text)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,20}", fullmatch=True).filter(lambda name: not name.startswith("mmd-"))
LIMITS = st.builds(Limit, st.integers(1, 999_999), st.sampled_from([1, 60, 3600]))


def readable(text: str) -> bool:
    try:
        NAME.read(text)
    except BadValueError:
        return False
    return True


_GLOB = st.text(min_size=1, max_size=30) | st.text(string.printable[:95] + "*?[", min_size=1, max_size=10)
GLOBS = _GLOB.filter(readable)
CREATED = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis's way


@st.composite
def rings(draw: st.DrawFn) -> tuple[KeyRing, dict[str, Key]]:
    """A ring, and its keys by what clients would show."""
    secrets = draw(st.lists(SECRETS, max_size=5, unique=True))
    names = draw(st.lists(NAMES, min_size=len(secrets), max_size=len(secrets), unique=True))
    keys = {}
    for secret, name in zip(secrets, names, strict=True):
        scope = draw(st.sampled_from(KeyScope))
        # A key to look with has no limits of inference.
        limits: tuple[tuple[str, ...], Limit | None, int | None] = ((), None, None)
        if scope is not KeyScope.READ:
            globs, rate = tuple(draw(st.lists(GLOBS, max_size=3))), draw(st.none() | LIMITS)
            limits = (globs, rate, draw(st.none() | st.integers(1, 1_000_000)))
        keys[secret] = Key(name, digest(secret.encode()), scope, *limits, draw(st.none() | CREATED))
    return KeyRing(tuple(keys.values()), draw(st.integers(0, 10**15))), keys


@given(rings())
def test_a_ring_reads_back_as_it_is(made: tuple[KeyRing, dict[str, Key]]) -> None:
    ring, keys = made
    text = ring.render()
    assert KeyRing.parse(text) == ring
    assert all(secret not in text and secret not in repr(ring) for secret in keys)
    assert all(key.sha256.hex() not in repr(ring) for key in ring.keys)


@given(rings(), st.data())
def test_nothing_but_a_key_itself_is_found(made: tuple[KeyRing, dict[str, Key]], data: st.DataObject) -> None:
    ring, keys = made
    for secret, key in keys.items():
        assert ring.find(secret.encode()) == key
        at = data.draw(st.integers(0, len(secret) - 1))
        for wrong in (
            secret[:at],
            secret[at:] if at else "",
            secret[:at] + "~" + secret[at + 1 :],
            secret + " ",
            secret.swapcase(),
        ):
            assert wrong == secret or ring.find(wrong.encode()) is None
    other = data.draw(st.binary(max_size=60))
    assert (ring.find(other) is not None) == (other.decode("latin-1") in keys)


@given(st.text() | st.binary() | st.from_regex(r"(serial: [0-9]?\n?)?(keys: ?[a{}]{0,3})?", fullmatch=True))
def test_no_text_opens_the_door_by_mistake(text: str | bytes) -> None:
    try:
        ring = KeyRing.parse(text, Path("api-keys.yaml"))
    except BadKeysError as error:
        ring = error.usable
    assert ring.required or b"serial" in (text.encode() if isinstance(text, str) else text)


@given(LIMITS, st.lists(st.floats(0, 100, allow_nan=False), max_size=200), st.floats(0, 1e7))
def test_a_rate_holds_in_every_span_of_time(limit: Limit, pauses: list[float], now_s: float) -> None:
    rate = Rate(limit)
    taken: list[float] = []
    for pause in pauses:
        wait_s = rate.take(now_s)
        if wait_s == 0:
            taken.append(now_s)
        else:
            assert 0 < wait_s <= limit.period_s / limit.requests + 1e-5
            now_s += wait_s
            assert rate.take(now_s) == 0, "who waits as long as told is let in"
            taken.append(now_s)
        now_s += pause * limit.period_s / limit.requests / 50
    interval_s = limit.period_s / limit.requests
    for first in range(0, len(taken), 7):
        for last in range(first, len(taken)):
            assert last - first + 1 <= limit.requests + (taken[last] - taken[first] + 1e-5) / interval_s + 1
