"""Heads of engines' answers where the engine is not alone in its origin: a page of one must not act as the gateway's.

An engine may answer any path with a page. On the gateway's own addresses, whose origin has the API and the admin API, the page
gets an opaque origin and runs no scripts (CSP, sandbox); web UIs of engines are for the ports of their models.
"""

from typing import Final

__all__ = ["SANDBOX_LINES", "sandboxed"]

SANDBOX_LINES: Final = b"X-Content-Type-Options: nosniff\r\nContent-Security-Policy: sandbox\r\n"
"""An engine's own policy holds besides: browsers enforce all of them (Content Security Policy 3, 4.2)."""

# What an answer says for all of its origin, cookies for all ports of its host; and what is said once (Fetch, 3.6).
_DROPPED: Final = frozenset(
    (
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"report-to",
        b"reporting-endpoints",
        b"service-worker-allowed",
        b"set-cookie",
        b"set-cookie2",
        b"strict-transport-security",
        b"x-content-type-options",
    )
)


def sandboxed(lines: bytes) -> bytes:
    """The lines of an answer's head for an origin that is not the engine's own."""
    kept = [line for line in lines.split(b"\r\n") if line.partition(b":")[0].lower() not in _DROPPED]
    return b"\r\n".join(kept) + SANDBOX_LINES
