"""Requests that a web page may have made its visitor's browser send: from another origin, or by a name of the page's own.

A browser reaches whatever its machine reaches, loopback included, and a page needs no leave for a request that a form could
send, such as a text/plain POST that loads a model. What no page can send is an API key that it does not know. So a
request without a known key is refused if it names a foreign page (Origin, RFC 6454; Sec-Fetch-Site, Fetch Metadata), or if its
Host is no name of this machine (DNS rebinding).
"""

from collections.abc import Sequence
from re import fullmatch
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.host_names import host_of, is_address, own_names
from mmd.origins import ANY_ORIGIN, HOST_NAME_PATTERN, is_open_to

if TYPE_CHECKING:
    from mmd.config import Gateway
    from mmd.gateway.relay.head import RequestHead

__all__ = ["is_foreign", "leads_here", "page_refusal"]

_OWN_SITE: Final = frozenset((b"", b"same-origin", b"none"))
_SHOWN_MAX: Final = 100


def page_refusal(request: "RequestHead", gateway: "Gateway") -> ApiError | None:
    """403 for a request that a foreign page may have sent; None: it may go on. It is to be asked for requests without a key."""
    origins = gateway.cors_origins
    if is_foreign(request.origin, request.field(b"sec-fetch-site"), request.host or b"", origins):
        whose = f"the page {_shown(request.origin)}" if request.origin else "a page of another origin"
        message = f"{whose} asks for this without an API key, and gateway.cors_origins does not name its origin"
        return ApiError(403, message, code="foreign_page")
    if not leads_here(request.host or b"", (*gateway.hosts, *(urlsplit(each).hostname or "" for each in origins))):
        return ApiError(403, _unknown(request.host or b""), code="foreign_name")
    return None


def is_foreign(origin: bytes, site: bytes, host: bytes, origins: Sequence[str], *, by_name: bool = False) -> bool:
    """Whether a page of another origin asks that is not among `origins` (gateway.cors_origins); `by_name`: * is not enough."""
    if origin:
        if is_open_to(origins, origin.decode("ascii", "replace"), by_name=by_name):
            return False
        return origin.partition(b"://")[2].lower() != host.lower() or site not in _OWN_SITE
    # Links and images name no origin: only * covers them.
    return site not in _OWN_SITE and (by_name or ANY_ORIGIN not in origins)


def leads_here(host: bytes, hosts: Sequence[str]) -> bool:
    """Whether a Host is an address, or a name of this machine or one of `hosts`. Its port is no matter: proxies and containers
    have others."""
    name = host_of(host)
    return is_address(host) or (name != "" and (name in hosts or name in own_names()))


def _unknown(host: bytes) -> str:
    name = host_of(host)
    if fullmatch(HOST_NAME_PATTERN, name) is None:
        return f"{_shown(host)} is no name of this machine; ask it by its address, or send an API key"
    return (
        f"{name} is no name that this machine knows for its own. If it is one, write gateway: {{hosts: [{name}]}} into "
        "/etc/mmd/mmd.yaml (a user's own instance: ~/.config/mmd/mmd.yaml), then: mmdctl reload; a request with an API key "
        "needs no such line"
    )


def _shown(text: bytes) -> str:
    return repr(text.decode("ascii", "replace")[:_SHOWN_MAX])
