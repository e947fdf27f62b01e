"""The relay: HTTP/1 between clients, engines and the gateway's own application. README.md beside this file is its design."""

import sys

__all__ = ["compiled"]


def compiled() -> bool:
    """Whether the relay that was imported is an extension (setup.py) or runs as it is written."""
    return not str(sys.modules[f"{__name__}.client"].__file__).endswith(".py")
