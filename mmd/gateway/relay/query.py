"""Queries of targets: which model they name, and another name in its place. All else stays as the client wrote it."""

from urllib.parse import quote, unquote_to_bytes

from mmd.gateway.api_error import ApiError

__all__ = ["find", "rename"]


def _decoded(part: bytes) -> str:
    return unquote_to_bytes(part.replace(b"+", b" ")).decode("utf-8", "replace")


def find(query: bytes, name: str) -> str:
    """The value of a parameter, "" without one; ApiError when it has several: one reader takes the first, another the last."""
    values = [
        _decoded(value) for key, _, value in (part.partition(b"=") for part in query.split(b"&")) if _decoded(key) == name
    ]
    if len(values) > 1:
        raise ApiError(400, f"the query gives {name!r} more than once", code="ambiguous_query", param=name)
    return values[0] if values else ""


def rename(query: bytes, model: str) -> bytes:
    """The same query with `model=MODEL`."""
    parts = query.split(b"&")
    renamed = b"model=" + quote(model, safe="").encode()
    return b"&".join(renamed if _decoded(part.partition(b"=")[0]) == "model" else part for part in parts)
