"""API keys: who may ask the gateway for what (mmd-api-keys(5)).

A key is 256 random bits, written as `mmd-` and base64url. The file holds the whole key's SHA-256, which does not lead back:
a slow hash is for what people can guess, such as passwords, not for one of 2^256, and each request would have to wait for it.
Nothing here prints a key or a digest, neither `repr` nor an error.
"""

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from mmd.check import Complaint, read_section
from mmd.errors import MmdError
from mmd.key_kinds import CONCURRENCY, CREATED, DIGEST, ENTRIES, GLOBS, KEY_NAME, KEY_PREFIX, RATE, SERIAL, Limit
from mmd.kinds import BadValueError, choice
from mmd.problem import Problem
from mmd.setting import Section, Setting, by_key
from mmd.similar import nearest
from mmd.yamlfile import Document, dump
from mmd.yamlfile import parse as parse_yaml

__all__ = ["KEY", "KEYS_FILE", "KEY_BYTES", "BadKeysError", "Key", "KeyRing", "KeyScope", "Limit", "Rate", "digest", "key_text"]

KEYS_FILE = "api-keys.yaml"
"""The file's name, in the directory of mmd.yaml; also the name of the credential that the gateway's unit loads it as."""
KEY_BYTES = 32

_HEADER = """\
# API keys, mmd-api-keys(5): their SHA-256, from which no key can be told. `mmdctl keys` writes this file and keeps no comments.
"""


class KeyScope(StrEnum):
    USE = "use"
    """Inference."""
    READ = "read"
    """What is not private in the admin API over TCP, and the list of models: for scrapers and viewers."""
    ADMIN = "admin"
    """Inference, and the admin API over TCP."""


KEY = Section(
    "NAME",
    "A key.",
    by_key(
        Setting("sha256", DIGEST, "", "SHA-256 of the whole key, with its mmd-."),
        Setting(
            "scope",
            choice(KeyScope, make=KeyScope),
            "use",
            "use for inference, read to look at the admin API, admin for both and for changes.",
        ),
        Setting("models", GLOBS, "", "Globs; the models that have a matching name or alias. Without it, all models."),
        Setting("rate", RATE, "", "How many requests it may begin, at most so many at once. Without it, any number."),
        Setting("concurrency", CONCURRENCY, "", "How many requests it may have at the same time. Without it, any number."),
        Setting("created", CREATED, "", "When it was made."),
    ),
)
"""What a key's entry may hold."""
_FILE = Section(
    "",
    "The file.",
    by_key(
        Setting("serial", SERIAL, "", "Grows with each change."),
        Setting("keys", ENTRIES, "", "The keys, by name."),
    ),
)


def key_text(random: bytes) -> str:
    """The key that KEY_BYTES random bytes are written as."""
    if len(random) != KEY_BYTES:
        raise ValueError(f"a key is {KEY_BYTES} bytes")
    return KEY_PREFIX + urlsafe_b64encode(random).decode().rstrip("=")


def digest(key: bytes) -> bytes:
    """What the file keeps of a key."""
    return sha256(key).digest()


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one key, which is not the key."""

    name: str
    sha256: bytes = field(repr=False)
    scope: KeyScope = KeyScope.USE
    models: tuple[str, ...] = ()
    """Globs (fnmatch, case counts); empty: every model."""
    rate: Limit | None = None
    """How many requests it may begin, see Rate; None: any number."""
    concurrency: int | None = None
    """How many requests it may have at the same time, waiting ones among them; None: any number."""
    created: datetime | None = None
    """In UTC."""

    def allows(self, model: str, aliases: Iterable[str] = ()) -> bool:
        """Whether it may use the model of that name: one of its globs matches the name or an alias."""
        names = (model, *aliases)
        return not self.models or any(fnmatchcase(name, glob) for glob in self.models for name in names)

    def plain(self) -> dict[str, Any]:
        """Its entry as YAML and JSON have it, less the digest; what is not set is absent."""
        plain: dict[str, Any] = {"scope": str(self.scope)}
        if self.models:
            plain["models"] = list(self.models)
        if self.rate is not None:
            plain["rate"] = str(self.rate)
        if self.concurrency is not None:
            plain["concurrency"] = self.concurrency
        if self.created is not None:
            plain["created"] = CREATED.write(self.created)
        return plain


class Rate:
    """Holds requests to a limit: a token bucket that begins full and is filled evenly, so that `requests` may come at once.

    It is kept as one time (GCRA). When the keys change it may stay in use while the key's limit is the same.
    """

    __slots__ = ("_interval_s", "_slack_s", "full_at_s", "limit")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._interval_s = limit.period_s / limit.requests
        # A microsecond, so that a rounding error does not send away a client that waited for as long as it was told.
        self._slack_s = limit.period_s - self._interval_s + 1e-6
        self.full_at_s = float("-inf")
        """When the bucket will be full again."""

    def take(self, now_s: float) -> float:
        """Lets a request in and returns 0; or returns in how many seconds one will be, and takes nothing. `now_s` is of a
        monotonic clock."""
        due_s = max(self.full_at_s, now_s)
        wait_s = due_s - now_s - self._slack_s
        if wait_s > 0:
            return wait_s
        self.full_at_s = due_s + self._interval_s
        return 0.0


# What limits inference; it would say nothing of a key that is good for none.
_OF_INFERENCE: Final = ("models", "rate", "concurrency")
_READS_ONLY: Final = "limits inference, which a key of the scope read is not good for"


def _reads_only(values: Mapping[str, Any]) -> bool:
    return values.get("scope") is KeyScope.READ


class BadKeysError(MmdError):
    """A keys file with mistakes. `usable` is what is right in it; it asks for keys, since a mistake must not open the door."""

    def __init__(self, problems: tuple[Problem, ...], usable: "KeyRing") -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__("\n".join(map(str, self.problems)))
        self.usable = usable


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of a file. Without any, and with serial 0, it stands for a file that does not exist."""

    keys: tuple[Key, ...] = ()
    serial: int = 0
    """Grows with each change: of two rings, the one with the greater serial is the later one."""

    @property
    def required(self) -> bool:
        """Whether clients need a key. When the last key is revoked they still do, and none has one."""
        return self.serial > 0 or bool(self.keys)

    def find(self, presented: bytes | None) -> Key | None:
        """The key that a client has presented, or None. How long it takes tells how many keys there are, and no more."""
        if not presented:
            return None
        hashed = digest(presented)
        found = None
        for key in self.keys:  # to the end, wherever it is found
            if hmac.compare_digest(hashed, key.sha256):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    def add(self, key: Key) -> "KeyRing":
        """The next ring, with `key`; MmdError when there is one of its name."""
        if self.named(key.name):
            raise MmdError(f"there is a key {key.name} already", hint=f"choose another name, or: mmdctl keys revoke {key.name}")
        return KeyRing((*self.keys, key), self.serial + 1)

    def revoke(self, name: str) -> "KeyRing":
        """The next ring, without the key `name`; MmdError when there is none."""
        if self.named(name) is None:
            names = [key.name for key in self.keys]
            match = nearest(name, names)
            known = f"there are {', '.join(names)}" if names else "there are no keys"
            raise MmdError(f"there is no key {name!r}", hint=f"did you mean {match}?" if match else known)
        return KeyRing(tuple(key for key in self.keys if key.name != name), self.serial + 1)

    def render(self) -> str:
        """The file's text, which `parse` reads back as it is."""
        entries = {key.name: {"sha256": DIGEST.write(key.sha256), **key.plain()} for key in self.keys}
        return _HEADER + dump({"serial": self.serial, "keys": entries})

    @classmethod
    def parse(cls, text: str | bytes, file: Path = Path(KEYS_FILE)) -> "KeyRing":
        """The ring in a file's text; BadKeysError, which names file, line and key of every mistake."""
        reader = _Reader(parse_yaml(text, file))
        ring = reader.read()
        if reader.problems:
            raise BadKeysError(tuple(reader.problems), KeyRing(ring.keys, max(ring.serial, 1)))
        return ring


class _Reader:
    """Turns a document into a ring and collects what is wrong with it."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.problems = [problem for _, problem in document.problems]

    def read(self) -> KeyRing:
        if self._document.value is None:
            if not self.problems:  # what `: >api-keys.yaml` leaves; without any keys anybody would get in
                self._complain([((), "is empty", "remove it to ask for no keys, or: mmdctl keys add NAME")])
            return KeyRing()
        complaints: list[Complaint] = []
        values = read_section(_FILE, self._document.value, (), complaints)
        if isinstance(self._document.value, dict) and "serial" not in self._document.value:
            complaints.append(((), "needs a serial", "write serial: 1, and add 1 with each change"))
        self._complain(complaints)
        found = (self._key(name, raw) for name, raw in values.get("keys", {}).items())
        keys: dict[bytes, Key] = {}
        for key in [key for key in found if key is not None]:
            other = keys.setdefault(key.sha256, key)
            if other is not key:
                self._complain([(("keys", key.name), f"is the same key as {other.name}", "remove one of the two")])
        return KeyRing(tuple(keys.values()), values.get("serial", 0))

    def _key(self, name: str, raw: Any) -> Key | None:
        """The key of that name; None when anything is wrong with it."""
        path = ("keys", name)
        try:
            KEY_NAME.read(name)
        except BadValueError as error:  # without the name: it may be a key
            line = self._document.line(path)
            self.problems.append(Problem(self._document.file, line, "keys", error.message, error.hint))
            return None
        complaints: list[Complaint] = []
        values = read_section(KEY, raw, path, complaints)
        if not complaints and "sha256" not in values:
            complaints.append((path, "needs its sha256", f"mmdctl keys add {name}"))
        complaints += [
            ((*path, each), _READS_ONLY, "remove it") for each in _OF_INFERENCE if _reads_only(values) and each in values
        ]
        self._complain(complaints)
        if complaints or any(where[:2] == path for where, _ in self._document.problems):
            return None
        return Key(name=name, **values)

    def _complain(self, complaints: Iterable[Complaint]) -> None:
        for path, message, hint in complaints:
            key = ".".join(map(str, path))
            self.problems.append(Problem(self._document.file, self._document.line(path), key, message, hint))
