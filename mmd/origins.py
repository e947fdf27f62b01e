"""Web origins and host names: the kinds of value that settings of them have, and which origins a page of one matches."""

import re
from collections.abc import Sequence
from typing import Any

from mmd.kinds import Kind, bad_value, exactly

__all__ = ["ANY_ORIGIN", "HOST_NAME", "HOST_NAME_PATTERN", "ORIGIN", "is_open_to"]

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


# Of letters that DNS knows (RFC 952, RFC 1123), and the underscore, which container names have.
HOST_NAME_PATTERN = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*"


def _read_host(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 253 or re.fullmatch(HOST_NAME_PATTERN, value) is None:
        raise bad_value(value, HOST_NAME.noun, "write llm.example.org: a name without scheme, port or *")
    return value.lower()


HOST_NAME = Kind("a host name", {"type": "string", "maxLength": 253, "pattern": exactly(HOST_NAME_PATTERN)}, _read_host)


def is_open_to(origins: Sequence[str], origin: str, *, by_name: bool = False) -> bool:
    """Whether pages of `origin` are among `origins`; `by_name`: named, and not only by *."""
    return origin in origins or (ANY_ORIGIN in origins and not by_name)
