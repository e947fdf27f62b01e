"""API keys: the file's format and what is wrong with it, what a key may do, how many requests it may begin."""

import re
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest

from mmd.errors import MmdError
from mmd.keys import KEY, KEY_BYTES, BadKeysError, Key, KeyRing, KeyScope, Limit, Rate, digest, key_text

PAGE = Path(__file__).parents[2] / "man/mmd-api-keys.5.scd"
SECRET = key_text(bytes(range(KEY_BYTES)))
OTHER = key_text(bytes(KEY_BYTES))
CI = Key(
    "ci",
    digest(SECRET.encode()),
    models=("demo/*", "gpt-4o*"),
    rate=Limit(60, 60),
    concurrency=4,
    created=datetime(2026, 1, 31, 12, tzinfo=UTC),
)
OPERATOR = Key("operator", digest(OTHER.encode()), KeyScope.ADMIN)
RING = KeyRing((CI, OPERATOR), 7)
HEX = sha256(b"some key").hexdigest()


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(BadKeysError) as error:
        KeyRing.parse(text, Path("/etc/mmd/api-keys.yaml"))
    return [str(problem).removeprefix("/etc/mmd/api-keys.yaml:") for problem in error.value.problems]


def usable(text: str | bytes) -> KeyRing:
    with pytest.raises(BadKeysError) as error:
        KeyRing.parse(text)
    return error.value.usable


def test_a_key_is_256_bits_and_its_whole_text_is_hashed() -> None:
    assert re.fullmatch(r"mmd-[A-Za-z0-9_-]{43}", SECRET)
    assert digest(SECRET.encode()) == sha256(SECRET.encode()).digest()
    with pytest.raises(ValueError, match="32 bytes"):
        key_text(b"short")


def test_the_file_reads_back_as_it_was_written() -> None:
    text = RING.render()
    assert KeyRing.parse(text) == RING
    assert KeyRing.parse(text.encode()) == RING
    assert SECRET not in text
    assert "created: '2026-01-31T12:00:00Z'" in text
    assert "rate: 60/min" in text


def test_a_file_by_hand_may_leave_out_all_but_the_digest() -> None:
    ring = KeyRing.parse(f"serial: 1\nkeys:\n  ci: {{sha256: {HEX}}}\n")
    assert ring.keys == (Key("ci", bytes.fromhex(HEX)),)
    times = f"serial: 1\nkeys:\n  ci: {{sha256: {HEX}, created: 2026-01-31T13:00:00.5+01:00, rate: 1000/h}}\n"
    assert KeyRing.parse(times).keys[0].created == datetime(2026, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)
    assert KeyRing.parse(times).keys[0].rate == Limit(1000, 3600)


def test_keys_are_asked_for_as_soon_as_there_is_a_file() -> None:
    assert not KeyRing().required
    assert not KeyRing.parse("serial: 0").required  # what the gateway's unit puts in place of a missing file
    assert RING.required
    assert KeyRing.parse("serial: 2\nkeys: {}\n").required
    assert KeyRing.parse("serial: 2\nkeys:\n").required


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1: is empty (remove it to ask for no keys, or: mmdctl keys add NAME)"]),
        ("- ci\n", ["1: must be a mapping of keys (write KEY: VALUE lines under it)"]),
        ("keys: [\n", ["2: not valid YAML: did not find expected node content"]),
        ("keys: {}\n", ["1: needs a serial (write serial: 1, and add 1 with each change)"]),
        ("serial: -1\n", ["1: serial: -1 is not a whole number from 0 to 1000000000000000"]),
        ("serial: 1\nkyes: {}\n", ["2: kyes: unknown key (did you mean keys?)"]),
        ("serial: 1\nkeys: [ci]\n", ["2: keys: not a mapping of names (write NAME: on a line of its own under it)"]),
        ("serial: 1\nkeys:\n  ci:\n", ["3: keys.ci: needs its sha256 (mmdctl keys add ci)"]),
        ("serial: 1\nkeys:\n  ci: 5\n", ["3: keys.ci: must be a mapping of keys (write KEY: VALUE lines under it)"]),
        ("serial: 1\nkeys:\n  ci:\n    sha255: 5\n", ["4: keys.ci.sha255: unknown key (did you mean sha256?)"]),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, expected: list[str]) -> None:
    assert problems(text) == expected
    assert usable(text).required


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("scope: root", "scope: 'root' is not use or read or admin"),
        ("rate: 60", "rate: 60 is not a rate such as 60/min (write 60/min, 5/s or 1000/h)"),
        ("rate: 0/s", "rate: '0/s' is not a rate such as 60/min (write 60/min, 5/s or 1000/h)"),
        ("rate: 5/d", "rate: '5/d' is not a rate such as 60/min (write 60/min, 5/s or 1000/h)"),
        ("concurrency: 0", "concurrency: 0 is not a whole number from 1 to 1000000"),
        ("models: []", "models: needs at least 1 item"),
        (
            "created: 2026-02-30T00:00:00Z",
            "created: '2026-02-30T00:00:00Z' is not a time (RFC 3339) (write 2026-01-31T12:00:00Z)",
        ),
        ("created: 2026-01-31", "created: '2026-01-31' is not a time (RFC 3339) (write 2026-01-31T12:00:00Z)"),
        ("created: 0001-01-01T00:00:00+01:00", "created: '0001-01-01T00:00:00+01:00' is not a time (RFC 3339)"),
        ("scope: read, models: [m]", "models: limits inference, which a key of the scope read is not good for (remove it)"),
        ("scope: read, rate: 5/s", "rate: limits inference, which a key of the scope read is not good for (remove it)"),
        ("concurrency: 2, scope: read", "concurrency: limits inference, which a key of the scope read is not good for"),
        ("scope: use, scope: admin", "scope: given twice, first in line 3"),
    ],
)
def test_a_key_with_a_mistake_is_no_key(entry: str, expected: str) -> None:
    text = f"serial: 3\nkeys:\n  bad: {{sha256: {HEX}, {entry}}}\n  ci: {{sha256: {CI.sha256.hex()}}}\n"
    (problem,) = problems(text)
    assert problem.startswith(f"3: keys.bad.{expected}")
    assert [key.name for key in usable(text).keys] == ["ci"]
    assert usable(text).find(b"some key") is None


def test_a_name_or_a_digest_given_twice_is_a_mistake() -> None:
    text = f"serial: 1\nkeys:\n  a: {{sha256: {HEX}}}\n  b: {{sha256: {HEX}}}\n"
    assert problems(text) == ["4: keys.b: is the same key as a (remove one of the two)"]
    text = f"serial: 1\nkeys:\n  a: {{sha256: {HEX}}}\n  a: {{sha256: {CI.sha256.hex()}}}\n"
    assert problems(text) == ["4: keys.a: given twice, first in line 3"]
    assert usable(text).keys == ()


@pytest.mark.parametrize("name", [SECRET, "mmd-x", "", "-a", "a b", "a/b", "x" * 64, "a\\n"])
def test_names_are_plain_and_look_like_no_key(name: str) -> None:
    (problem,) = problems(f'serial: 1\nkeys:\n  "{name}": {{sha256: {HEX}}}\n')
    assert problem.startswith("3: keys: not a key's name (")
    assert SECRET not in problem


def test_nothing_shows_a_key_or_a_digest() -> None:
    shown = f"{RING!r} {RING} {CI!r} {CI.plain()}"
    wrong = [f"serial: 1\nkeys: {{a: {{sha256: {value}}}}}" for value in (SECRET, f"{HEX}a", HEX.upper(), f"[{SECRET}]")]
    wrong += [f"serial: 1\nkeys: {value}" for value in (SECRET, f"[{SECRET}]", f"{{a: {SECRET}}}", f"{{{SECRET}: }}")]
    shown += " ".join(problem for text in wrong for problem in problems(text))
    for secret in (SECRET, CI.sha256.hex(), repr(CI.sha256), HEX, HEX.upper()):
        assert secret not in shown


def test_only_the_key_itself_is_found() -> None:
    assert RING.find(SECRET.encode()) == CI
    assert RING.find(OTHER.encode()) == OPERATOR
    empty = Key("empty", digest(b""))
    for wrong in (None, b"", SECRET[:-1].encode(), SECRET.encode() + b"\n", SECRET.upper().encode(), CI.sha256, b"ci"):
        assert KeyRing((CI, empty), 1).find(wrong) is None
    assert KeyRing().find(SECRET.encode()) is None


def test_models_are_allowed_by_globs_over_name_and_aliases() -> None:
    assert CI.allows("demo/llama-8b")
    assert CI.allows("Qwen/Qwen2.5-7B", ["qwen", "gpt-4o-mini"])
    assert not CI.allows("Qwen/Qwen2.5-7B", ["qwen"])
    assert not CI.allows("DEMO/llama-8b")
    assert OPERATOR.allows("anything")


def test_rings_change_by_names_and_their_serial_grows() -> None:
    ring = KeyRing().add(CI)
    assert (ring.serial, ring.named("ci"), ring.named("cx")) == (1, CI, None)
    with pytest.raises(MmdError, match="there is a key ci already"):
        ring.add(Key("ci", digest(b"x")))
    with pytest.raises(MmdError, match=r"no key 'cii' \(did you mean ci\?\)"):
        ring.revoke("cii")
    gone = ring.revoke("ci")
    assert (gone.keys, gone.serial, gone.required) == ((), 2, True)
    with pytest.raises(MmdError, match="there are no keys"):
        gone.revoke("ci")


def test_a_rate_lets_its_number_in_at_once_and_then_evenly() -> None:
    rate = Rate(Limit(60, 60))
    assert [rate.take(1000.0) for _ in range(60)] == [0.0] * 60
    assert rate.take(1000.0) == pytest.approx(1.0, abs=1e-5)
    assert rate.take(1000.75) == pytest.approx(0.25, abs=1e-5)
    assert rate.take(1001.0) == 0.0
    assert rate.take(1001.0) > 0.9
    assert [rate.take(1011.0) for _ in range(11)].count(0.0) == 10
    assert [rate.take(9999.0) for _ in range(70)].count(0.0) == 60  # no more than full


def test_the_manual_page_has_every_field_and_its_example_is_right() -> None:
    page = PAGE.read_text()
    for field in (*KEY.entries, "serial", "keys"):
        assert f"\n*{field}*\n\t" in page
    example = page.split("```")[1]
    assert [key.name for key in KeyRing.parse(example).keys] == ["ci", "operator"]
