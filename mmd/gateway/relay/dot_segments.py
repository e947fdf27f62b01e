"""Paths that climb: `..` in any spelling that some server behind us may read as one (RFC 3986, 5.2.4 and 6.2.2).

An `external` engine may be the part of a server below a path, http://host/base, and a program may have rights of its own per
path. Whether `%2e%2e`, `..\\\\`, `%252e` or `..;x` climbs is for whoever decodes it to decide, so none of them is passed on.
"""

import re
from typing import Final
from urllib.parse import unquote_to_bytes

__all__ = ["has_dot_segment"]

_ROUNDS_MAX: Final = 4
"""A server, what is behind it, and what is behind that decode once each; what is encoded deeper must hold no dot."""
_SEPARATOR: Final = re.compile(rb"[/\\]")
_OVERLONG: Final = re.compile(rb"\xc0\xae|\xe0\x80\xae|\xf0\x80\x80\xae")
"""`.` in UTF-8 that is none, and that lenient decoders take (RFC 3629, 10)."""
_OVERLONG_SEPARATOR: Final = re.compile(rb"\xc0\xaf|\xe0\x80\xaf|\xf0\x80\x80\xaf|\xc1\x9c")


def has_dot_segment(path: bytes) -> bool:
    """Whether a segment of a request's path (without its query) is, or may be read as, `.` or `..`."""
    for _ in range(_ROUNDS_MAX):
        plain = _OVERLONG_SEPARATOR.sub(b"/", _OVERLONG.sub(b".", path))
        # Behind `;` are parameters (RFC 3986, 3.3), which some servers cut off before they look at the segment.
        if any(segment.partition(b";")[0].strip() in (b".", b"..") for segment in _SEPARATOR.split(plain)):
            return True
        decoded = unquote_to_bytes(path)
        if decoded == path:
            return False
        path = decoded
    return b"." in unquote_to_bytes(path)
