"""Fields of a multipart/form-data body (RFC 7578), found where they lie: files in it are neither copied nor decoded.

Whoever the form is for reads it again, with a parser of its own. What two parsers would read differently is refused, as in
heads: a boundary that is not followed by a line's end, a folded header, a field's name with escapes in it or in extended form.
"""

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["FormError", "Span", "find_fields"]

_PARTS_MAX: Final = 1000  # as Starlette
_HEAD_MAX_BYTES: Final = 8192

# Lines of a part's head, and parameters of a line. Senders write three and two; 800 in each of 1,000 parts took 3 s to read.
_LINES_MAX: Final = 16

# RFC 2046, 5.1.1. Some clients' are longer than the 70 characters that it allows.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,199}[0-9A-Za-z'()+_,./:=?-]")
_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER: Final = re.compile(rb"[ \t]*;[ \t]*(" + _TOKEN + rb')=(?:"((?:[^"\\]|\\.)*)"|(' + _TOKEN + rb"))")
_LINE: Final = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([^\r\n\x00]*)")

# Transfer encodings that change nothing (RFC 2045, 6.2). RFC 7578, 4.7 deprecates the others, and not every parser knows them.
_IDENTITY: Final = frozenset((b"7bit", b"8bit", b"binary"))

Span = tuple[int, int]
"""Where a field's value begins and ends in the body."""


class FormError(ValueError):
    """The body is not what its Content-Type says, or not in one way only."""


def find_fields(content_type: bytes, body: bytes) -> Mapping[str, list[Span]]:
    """The fields that are no files, by name, in their order; FormError."""
    delimiter = b"--" + _boundary(content_type)
    found: dict[str, list[Span]] = {}
    # What comes before the first boundary counts for nothing (RFC 2046, 5.1.1).
    at = len(delimiter) + (0 if body.startswith(delimiter) else _next(body, delimiter, 0) + 2)
    for _ in range(_PARTS_MAX):
        if body.startswith(b"--", at):
            if body[at + 2 : at + 4] not in (b"", b"\r\n"):
                raise FormError("its last boundary is not the end of a line")
            return found
        if not body.startswith(b"\r\n", at):
            raise FormError("a boundary is not the end of a line")
        head = at + 2
        end = body.find(b"\r\n\r\n", at, head + _HEAD_MAX_BYTES)
        start = end + 4
        if end < head or body.startswith(delimiter, start):
            raise FormError("a part has no head, or its head no end")
        stop = _next(body, delimiter, start)
        name = _field_name(body[head:end])
        if name is not None:
            found.setdefault(name, []).append((start, stop))
        at = stop + 2 + len(delimiter)
    raise FormError(f"it has more than {_PARTS_MAX} parts")


def _next(body: bytes, delimiter: bytes, start: int) -> int:
    found = body.find(b"\r\n" + delimiter, start)
    if found < 0:
        raise FormError("it has no end")
    return found


def _boundary(content_type: bytes) -> bytes:
    kind, parameters = _parameters(content_type)
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise FormError("the Content-Type must be multipart/form-data with a boundary")
    return boundary


def _field_name(head: bytes) -> str | None:
    """The name of a part's field; None for a file."""
    lines: dict[bytes, bytes] = {}
    if head.count(b"\r\n") >= _LINES_MAX:
        raise FormError(f"the head of a part has more than {_LINES_MAX} lines")
    for line in head.split(b"\r\n"):
        matched = _LINE.fullmatch(line)
        if matched is None or matched[1].lower() in lines:
            raise FormError("a line in the head of a part is none, or there twice")
        lines[matched[1].lower()] = matched[2]
    kind, parameters = _parameters(lines.get(b"content-disposition", b""))
    if kind != b"form-data" or b"name" not in parameters:
        raise FormError("a part does not say which field it is")
    name = parameters[b"name"]
    if b"\\" in name or b"name*" in parameters:
        raise FormError("a field's name is written in a way that not everybody understands")
    if b"filename" in parameters or b"filename*" in parameters:
        return None
    if lines.get(b"content-transfer-encoding", b"8bit").strip().lower() not in _IDENTITY:
        raise FormError("a field has a transfer encoding")
    return name.decode("utf-8", "replace")


def _parameters(value: bytes) -> tuple[bytes, Mapping[bytes, bytes]]:
    """What comes before the parameters of a header field, and these by their names, both in lower case."""
    kind, found = value.partition(b";")[0], dict[bytes, bytes]()
    at = len(kind)
    while (matched := _PARAMETER.match(value, at)) is not None:
        name = matched[1].lower()
        if len(found) == _LINES_MAX:
            raise FormError(f"a header field has more than {_LINES_MAX} parameters")
        if name in found:
            raise FormError(f"{name.decode()} is given twice")
        found[name] = matched[3] if matched[2] is None else matched[2]
        at = matched.end()
    if value[at:].strip(b" \t;"):
        raise FormError("the parameters of a header field make no sense")
    return kind.strip(b" \t").lower(), found
