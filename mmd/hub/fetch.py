"""mmd-fetch-<id>.service: puts the repositories that a model needs into the shared cache, unless they are there.

Everything is checked against the hashes that the hub names. What is complete is noted (`COMMIT.complete`), and the hub is not
asked again: a start does not depend on it, and a model does not change by itself. To look for a newer one remove the note.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mmd.errors import MmdError
from mmd.hub.http import Hub, HubError
from mmd.hub.listing import HubFile, Listing, folder_name, parse_listing, parse_wanted, selected

__all__ = ["FAILURE_FILE", "main"]

FAILURE_FILE = "failure"
"""In the runtime directory: why nothing was fetched. Of a run that failed, and removed by the next one."""

_PIECE_BYTES = 1 << 20
_FILES_AT_A_TIME = 4
_ATTEMPTS = 5
_BACK_OFF_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches the repositories that the arguments name, as `ORG/NAME@REVISION`."""
    directory = Path(os.environ.get("RUNTIME_DIRECTORY", "/nonexistent"))
    with suppress(OSError):
        (directory / FAILURE_FILE).unlink(missing_ok=True)
    os.umask(0o022)
    try:
        for word in sys.argv[1:] if argv is None else argv:
            _fetch(Hub.of_environment(os.environ), Path(os.environ["HF_HUB_CACHE"]), *parse_wanted(word))
    except (MmdError, OSError) as error:
        text = str(error)
        print(text, file=sys.stderr)
        with suppress(OSError):
            (directory / FAILURE_FILE).write_text(f"{text}\n")
        return 1
    return 0


def _fetch(hub: Hub, cache: Path, repository: str, revision: str) -> None:
    folder = cache / folder_name(repository)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if _is_complete(folder, revision):
            return
        try:
            listing = parse_listing(hub.listing(repository, revision))
        except HubError as error:
            if error.unreachable and _is_there(folder, revision):  # of an earlier version of mmd, which kept no notes
                print(f"{repository}: {error}; what is there is used", file=sys.stderr)
                return
            raise
        files = selected(listing.files)
        size_bytes = sum(file.size_bytes for file in files)
        print(f"fetching {repository}@{revision}: {len(files)} files, {size_bytes} bytes, commit {listing.commit}", flush=True)
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            for done in [pool.submit(_take, hub, folder, repository, listing.commit, file) for file in files]:
                done.result()
        _note(folder, revision, listing, files)
        print(f"fetched {repository}@{revision}", flush=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two models may want the same weights."""
    with (folder / ".mmd-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _commit(folder: Path, revision: str) -> str:
    with suppress(OSError):
        return (folder / "refs" / revision).read_text().strip()
    return revision


def _is_there(folder: Path, revision: str) -> bool:
    return (folder / "snapshots" / _commit(folder, revision)).is_dir()


def _is_complete(folder: Path, revision: str) -> bool:
    """Whether all files of a revision were fetched, and still are there."""
    commit = _commit(folder, revision)
    snapshot = folder / "snapshots" / commit
    try:
        paths = json.loads((folder / f"{commit}.complete").read_text())
        return all((snapshot / path).exists() for path in paths)
    except (OSError, ValueError, TypeError):
        return False


def _take(hub: Hub, folder: Path, repository: str, commit: str, file: HubFile) -> None:
    """One file, from where an earlier attempt broke off."""
    blob = folder / "blobs" / file.etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        unfinished = blob.with_name(f"{file.etag}.incomplete")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _download(hub, repository, commit, file, unfinished)
                break
            except HubError as error:
                if attempt == _ATTEMPTS or not error.unreachable:
                    raise
            time.sleep(_BACK_OFF_S * attempt)
        unfinished.replace(blob)
    link = folder / "snapshots" / commit / file.path
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name[:200]}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(blob, link.parent))
    new.replace(link)


def _download(hub: Hub, repository: str, commit: str, file: HubFile, target: Path) -> None:
    """Into `target`, after what it holds already; HubError, also for a wrong hash: the next attempt starts from nothing."""
    with target.open("a+b") as stream:
        start = stream.tell()
        if start > file.size_bytes:
            stream.truncate(0)
            start = 0
        if start < file.size_bytes:
            hub.download(repository, commit, file.path, start, lambda piece: _append(stream, piece, file))
        stream.flush()
        stream.seek(0)
        good = os.fstat(stream.fileno()).st_size == file.size_bytes and _hash(stream, file) == file.etag
        if not good:
            stream.truncate(0)
            raise HubError(f"{repository}: {file.path} arrived damaged", unreachable=True)
        os.fsync(stream.fileno())


def _append(stream: IO[bytes], piece: bytes, file: HubFile) -> None:
    if stream.tell() + len(piece) > file.size_bytes:
        raise HubError(f"{file.path} is longer than the hub says", unreachable=False)
    try:
        stream.write(piece)
    except OSError as error:
        raise HubError(f"{file.path} cannot be written: {error.strerror}", unreachable=False, hint="df /var/cache") from error


def _hash(stream: IO[bytes], file: HubFile) -> str:
    sha256 = len(file.etag) == 64
    digest = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    read: Callable[[], bytes] = lambda: stream.read(_PIECE_BYTES)  # noqa: E731 - iter() wants one without arguments
    for piece in iter(read, b""):
        digest.update(piece)
    return digest.hexdigest()


def _note(folder: Path, revision: str, listing: Listing, files: Sequence[HubFile]) -> None:
    """The revision's commit, and that it is complete: last of all."""
    if revision != listing.commit:
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        _write(ref, listing.commit)
    _write(folder / f"{listing.commit}.complete", [file.path for file in files])


def _write(path: Path, value: Any) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(value if isinstance(value, str) else json.dumps(value))
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
