"""Places that an engine tells of in its answers, as its clients know them: those who reach it under /upstream/NAME."""

from mmd.gateway.relay.head import ResponseHead, head_lines

__all__ = ["relocate"]


def relocate(head: ResponseHead, host: bytes, mount: bytes) -> bytes:
    """The lines of a head whose Location, where it is one of the engine's own paths, begins with `mount`.

    Engines name themselves by the Host that they were asked for, `host`. Other servers' places stay, and so do relative ones,
    which are right already.
    """

    def moved(place: bytes) -> bytes:
        scheme, found, rest = place.partition(b"://")
        if found and scheme.lower() in (b"http", b"https"):
            authority, slash, path = rest.partition(b"/")
            return mount + slash + path if authority == host else place
        return mount + place if place.startswith(b"/") and not place.startswith(b"//") else place

    fields = [(lower, name, moved(value) if lower == b"location" else value) for lower, name, value in head.fields]
    return head_lines(head.status, head.reason, fields)
