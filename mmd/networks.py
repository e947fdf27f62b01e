"""Networks of IP addresses: the kind of value that a setting of them has."""

import re
from typing import Any

from mmd.kinds import Kind, bad_value, exactly

__all__ = ["NETWORK"]

_OCTET = r"(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}(?:/(?:[0-9]|[12][0-9]|3[0-2]))?"
_IPV6 = r"[0-9A-Fa-f:.]{2,45}(?:/(?:[0-9]|[1-9][0-9]|1[01][0-9]|12[0-8]))?"
_PATTERN = rf"{_IPV4}|(?=[^/]*:){_IPV6}"
_HINT = "write 10.0.0.5, 10.0.0.0/24 or 2001:db8::/64, without bits behind the prefix"


def _read(value: Any) -> str:
    """In its one form, with a prefix."""
    if not isinstance(value, str) or re.fullmatch(_PATTERN, value) is None:
        raise bad_value(value, NETWORK.noun, _HINT)
    from ipaddress import ip_network  # rarely needed, and slow to import for a generator

    try:
        return str(ip_network(value))
    except ValueError:
        raise bad_value(value, NETWORK.noun, _HINT) from None


NETWORK = Kind("an IP address or a network (CIDR)", {"type": "string", "pattern": exactly(_PATTERN)}, _read)
