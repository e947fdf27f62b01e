"""A hub on loopback: what of Hugging Face's HTTP API a download needs, with a second server that has the bytes."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["COMMIT", "FakeHub", "fake_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`files` of the one repository that it has, by path; `asked`: method, host's role, path, token of each request."""

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        self.repository = repository
        self.files = dict(files)
        self.asked: list[tuple[str, str, str | None]] = []
        self.token: str | None = None
        """Without it everything is refused, if one is set."""
        self.elsewhere = ""
        """Where the bytes are; the second server when empty."""
        self.cut: dict[str, int] = {}
        """After how many bytes the connection breaks, by path, once each."""
        self.damaged: set[str] = set()
        """What arrives damaged, once each."""
        self.listing: Any = None
        """Instead of the true one; bytes as they are."""
        self.endpoint = self.bytes_at = ""

    def true_listing(self) -> Any:
        return {"sha": COMMIT, "siblings": [_sibling(path, data) for path, data in self.files.items()]}


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return {"rfilename": path, "blobId": blob, "size": len(data), **({"lfs": large} if path.endswith(".safetensors") else {})}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    role: str

    def do_GET(self) -> None:
        hub, (path, _, _) = self.hub, self.path.partition("?")
        hub.asked.append((self.role, path, self.headers.get("Authorization")))
        if self.role == "bytes":
            return self._bytes(path.removeprefix("/bytes/"))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, b"{}")
        if path == f"/api/models/{hub.repository}/revision/main":
            listing = hub.listing or hub.true_listing()
            return self._answer(200, listing if isinstance(listing, bytes) else json.dumps(listing).encode())
        name = path.removeprefix(f"/{hub.repository}/resolve/{COMMIT}/")
        if name not in hub.files:
            return self._answer(404, b"{}")
        self.send_response(302)
        self.send_header("Location", f"{hub.elsewhere or hub.bytes_at}/bytes/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _bytes(self, name: str) -> None:
        data, start = self.hub.files[name], 0
        if name in self.hub.damaged:
            self.hub.damaged.remove(name)
            data = bytes(len(data))
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : self.hub.cut.pop(name, None)])
        self.close_connection = True

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_hub(repository: str, files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    """Two servers in the caller's network: the hub, and where its bytes are."""
    hub = FakeHub(repository, files)
    servers = []
    for role in ("hub", "bytes"):
        handler = type("Handler", (_Handler,), {"hub": hub, "role": role})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
    hub.endpoint, hub.bytes_at = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
