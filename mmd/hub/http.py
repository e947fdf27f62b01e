"""The two calls of a hub's HTTP API: what a repository holds, and the bytes of a file."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple

from mmd.errors import MmdError

__all__ = ["Hub", "HubError"]

_ENDPOINT = "https://huggingface.co"
_SILENCE_S = 60.0
"""How long nothing may come before an attempt counts as failed; HF_HUB_DOWNLOAD_TIMEOUT changes it."""
_LISTING_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20


class HubError(MmdError):
    """`unreachable`: it may be another time."""

    def __init__(self, message: str, *, unreachable: bool, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.unreachable = unreachable


class _SameHost(urllib.request.HTTPRedirectHandler):
    """A hub sends to other hosts for the bytes: the token is not for those, nor is anything but HTTP followed."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise urllib.error.URLError(f"it sends to {newurl!r}")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


class Hub(NamedTuple):
    endpoint: str
    token: str
    silence_s: float = _SILENCE_S

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Hub":
        """HF_ENDPOINT; the token from a credential of the unit (LoadCredential=), HF_TOKEN, or `hf auth login` in HF_HOME.

        The last is everybody's, and so for the usual hub only: whoever may add a model may name another one.
        """
        endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or _ENDPOINT
        if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
            raise MmdError(f"HF_ENDPOINT: {endpoint!r} is no address of a hub", hint="https://host")
        folder = environment.get("CREDENTIALS_DIRECTORY")
        files = [Path(folder, "HF_TOKEN")] if folder else []
        usual = not {"HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR"} & {name for name, value in environment.items() if value}
        home = environment.get("HF_HOME") if usual else None
        tokens = [*map(_read, files), environment.get("HF_TOKEN", ""), *([_read(Path(home, "token"))] if home else [])]
        try:
            silence_s = max(1.0, float(environment.get("HF_HUB_DOWNLOAD_TIMEOUT") or _SILENCE_S))
        except ValueError:
            silence_s = _SILENCE_S
        return cls(endpoint, next((token.strip() for token in tokens if token.strip()), ""), silence_s)

    def listing(self, repository: str, revision: str) -> Any:
        """What the hub says of a revision, as JSON; HubError."""
        url = f"{self.endpoint}/api/models/{repository}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
        text = bytearray()

        def take(piece: bytes) -> None:
            text.extend(piece)
            if len(text) > _LISTING_BYTES:
                raise HubError(f"{url}: more than {_LISTING_BYTES} bytes", unreachable=False)

        self._get(url, {}, take)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise HubError(f"{url}: the answer is no JSON", unreachable=False) from error

    def download(self, repository: str, commit: str, path: str, start: int, take: Callable[[bytes], None]) -> None:
        """Calls `take` for each piece of a file, from byte `start` on; HubError."""
        url = f"{self.endpoint}/{repository}/resolve/{commit}/{urllib.parse.quote(path)}"
        self._get(url, {"Range": f"bytes={start}-"} if start else {}, take)

    def _get(self, url: str, headers: Mapping[str, str], take: Callable[[bytes], None]) -> None:
        always = {"User-Agent": "mmd", "Accept-Encoding": "identity"}
        request = urllib.request.Request(url, headers={**always, **headers})  # noqa: S310 - the endpoint is http or https
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.build_opener(_SameHost()).open(request, timeout=self.silence_s) as answer:
                if "Range" in headers and answer.status != 206:
                    raise HubError(f"{url}: it does not go on where it broke off", unreachable=False)
                while piece := answer.read(_PIECE_BYTES):
                    take(piece)
        except urllib.error.HTTPError as error:
            error.close()
            raise _refused(url, error.code) from error
        except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
            if isinstance(error, urllib.error.URLError):
                raise HubError(f"{url}: {error.reason}", unreachable=True, hint="the network, or a proxy in `env`") from error
            raise HubError(f"{url}: {error}", unreachable=True) from error


def _refused(url: str, status: int) -> HubError:
    hints = {
        401: "no such model, or one that needs a token",
        403: "accept the model's terms at the hub, with the account of the token",
        404: "no such model or revision: see `model` and `args`",
    }
    return HubError(f"{url}: HTTP status {status}", unreachable=status >= 500 or status == 429, hint=hints.get(status, ""))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
