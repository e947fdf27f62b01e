"""Web origins: the kind of value that a setting of them has, and which of them a page of an origin matches."""

import re
from collections.abc import Sequence
from typing import Any

from mmd.kinds import Kind, bad_value, exactly

__all__ = ["ANY_ORIGIN", "ORIGIN", "is_open_to"]

ANY_ORIGIN = "*"

# As a browser writes them (RFC 6454, 6.2): a page is known by these very bytes. Not only http: browsers' extensions and
# programs made of web pages have schemes of their own (chrome-extension://, vscode-webview://, tauri://).
_PATTERN = r"\*|[a-z][a-z0-9+.-]*://[a-z0-9._~-]+(?::[0-9]{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:.]+\](?::[0-9]{1,5})?"
_HINT = "write https://app.example or http://localhost:3000: scheme, host and port in lower case, without a path; * for all"


def _read(value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(_PATTERN, value) is None:
        raise bad_value(value, ORIGIN.noun, _HINT)
    return value


ORIGIN = Kind("a web origin or *", {"type": "string", "pattern": exactly(_PATTERN)}, _read)


def is_open_to(origins: Sequence[str], origin: str, *, by_name: bool = False) -> bool:
    """Whether pages of `origin` are among `origins`; `by_name`: named, and not only by *."""
    return origin in origins or (ANY_ORIGIN in origins and not by_name)
