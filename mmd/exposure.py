"""What a configuration opens to the network (pure): warnings, since all of it may be meant."""

from collections.abc import Iterator
from typing import NamedTuple

from mmd.addresses import parse_address
from mmd.check import Complaint
from mmd.config import Gateway, Model, PortProtocol

__all__ = ["Exposure", "gateway_exposures", "port_exposure"]

_MAKE_KEY = "make API keys: mmdctl keys add NAME"


class Exposure(NamedTuple):
    """An address that other machines reach."""

    complaint: Complaint
    closed_by_keys: bool = True
    """Whether it asks for an API key once there is one, and is no matter for a warning from then on."""


def gateway_exposures(gateway: Gateway) -> Iterator[Exposure]:
    """Of the gateway's own addresses; paths start at the top."""
    for key, addresses in (("listen", gateway.listen), ("admin_listen", gateway.admin_listen)):
        for index, address in enumerate(addresses):
            if not parse_address(address).is_loopback:
                yield Exposure((("gateway", key, index), f"other machines reach {address} and need no API key", _MAKE_KEY))


def port_exposure(model: Model) -> Exposure | None:
    """Of a model's own port; the path starts below the model."""
    if model.port is None or parse_address(model.port).is_loopback:
        return None
    if model.port_protocol is PortProtocol.TCP:
        message = f"other machines reach {model.port}, where no API key is ever asked for (port_protocol: tcp)"
        return Exposure(
            (("port",), message, "write 127.0.0.1, or see to it that a firewall says who may"), closed_by_keys=False
        )
    return Exposure((("port",), f"other machines reach {model.port} and need no API key", _MAKE_KEY))
