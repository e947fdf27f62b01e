"""Fields of a multipart/form-data body (RFC 7578), found where they lie: files in it are neither copied nor decoded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

__all__ = ["FormError", "Span", "find_fields"]

_FIELDS_MAX = 200
_NAME_MAX_BYTES = 4096

Span = tuple[int, int]
"""Where a field's value begins and ends in the body."""


class FormError(ValueError):
    """The body is not what its Content-Type says."""


class _Reader:
    """Callbacks of the parser."""

    def __init__(self) -> None:
        self.found: dict[str, Span] = {}
        self.over = False
        self._name: str | None = None
        self._file = False
        self._header = b""
        self._value = b""
        self._begin = self._end = -1

    def on_part_begin(self) -> None:
        if len(self.found) >= _FIELDS_MAX:
            raise FormError(f"more than {_FIELDS_MAX} fields")
        self._name, self._file, self._begin, self._end = None, False, -1, -1

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if len(self._value) > _NAME_MAX_BYTES:
            raise FormError("a part's header is too long")

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            self._file = b"filename" in options
        self._header = self._value = b""

    def on_part_data(self, _: bytes, start: int, end: int) -> None:
        self._begin = start if self._begin < 0 else self._begin
        self._end = end

    def on_part_end(self) -> None:
        if self._name and not self._file:
            if self._name in self.found:
                raise FormError(f"the field {self._name!r} is given twice")
            self.found[self._name] = (max(0, self._begin), max(0, self._end))

    def on_end(self) -> None:
        self.over = True


def find_fields(content_type: bytes, body: bytes) -> Mapping[str, Span]:
    """The fields that are no files, by name; FormError."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise FormError("the Content-Type must be multipart/form-data with a boundary")
    reader = _Reader()
    names = ("on_part_begin", "on_header_field", "on_header_value", "on_header_end", "on_part_data", "on_part_end", "on_end")
    try:
        callbacks = cast("MultipartCallbacks", {name: getattr(reader, name) for name in names})
        MultipartParser(boundary, callbacks).write(body)
    except FormParserError as error:
        raise FormError(str(error)) from None
    if not reader.over:
        raise FormError("the form has no end")
    return reader.found
