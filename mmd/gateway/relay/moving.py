"""Connections that leave this process as they are: their clients do not notice."""

import asyncio
import os

from mmd.gateway.api_error import ApiError

__all__ = ["detached", "discard", "no_descriptor"]


def discard(_: bytes) -> None:
    """Where bytes go after the connection is gone."""


def detached(transport: asyncio.Transport) -> int:
    """Close it without the client noticing: the connection lives on in the descriptor that this returns. Nothing is unsent.
    -1: no descriptor is left, and nothing has changed."""
    try:
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
    except OSError:
        return -1
    transport.pause_reading()
    transport.abort()
    return descriptor


def no_descriptor() -> ApiError:
    """The answer to a request that another process should have answered."""
    return ApiError(503, "the gateway has no descriptors left", code="too_many_connections", retry_after_s=1)
