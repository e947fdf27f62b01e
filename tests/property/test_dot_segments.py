"""No path that passes leads out of the base, whichever way a server behind us reads it."""

import posixpath
from urllib.parse import unquote_to_bytes

from hypothesis import given
from hypothesis import strategies as st

from mmd.gateway.relay.dot_segments import has_dot_segment

PIECES = st.sampled_from(
    [
        b"/",
        b"//",
        b".",
        b"..",
        b"%2e",
        b"%2E",
        b"%252e",
        b"%25%32%65",
        b"%2f",
        b"%5c",
        b"\\",
        b";",
        b"a",
        b"%61",
        b"%",
        b"%c0%ae",
    ]
)


@given(st.lists(PIECES, max_size=12))
def test_what_passes_stays_below_the_base(pieces: list[bytes]) -> None:
    path = b"/" + b"".join(pieces)
    if has_dot_segment(path):
        return
    read = path
    for _ in range(6):
        for slashes in (read, read.replace(b"\\", b"/"), read.replace(b"\xc0\xae", b".")):
            without = b"/".join(each.partition(b";")[0] for each in slashes.split(b"/"))
            for way in (slashes, without):
                assert posixpath.normpath(b"/base/x" + way).startswith(b"/base/x")
        read = unquote_to_bytes(read)


@given(st.lists(st.text("abc.-_~", min_size=1).filter(lambda text: text not in (".", "..")), max_size=6))
def test_ordinary_paths_pass(segments: list[str]) -> None:
    assert not has_dot_segment(("/" + "/".join(segments)).encode())
