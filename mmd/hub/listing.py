"""What a hub says of a repository, checked, and which of its files an engine needs (pure)."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from mmd.errors import MmdError

__all__ = ["HubFile", "Listing", "folder_name", "parse_listing", "parse_wanted", "selected"]

_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
_COMMIT = r"[0-9a-f]{40}"
_ETAG = r"[0-9a-f]{40}|[0-9a-f]{64}"
_FILES_MAX = 10_000

# What vLLM leaves as well: the same weights in other forms, and for other programs.
_OTHER_PROGRAMS = (
    *("*.gitattributes", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel"),
    *("original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*"),
)
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")


class HubFile(NamedTuple):
    path: str
    size_bytes: int
    etag: str
    """SHA-256 of a large file, else the SHA-1 of git's blob."""


class Listing(NamedTuple):
    """A repository at one commit."""

    commit: str
    files: tuple[HubFile, ...]


def parse_wanted(text: str) -> tuple[str, str]:
    """The repository and the revision that `ORG/NAME@REVISION` names; MmdError."""
    repository, _, revision = text.partition("@")
    if not re.fullmatch(_REPOSITORY, repository) or ".." in repository or "--" in repository:
        raise MmdError(
            f"{repository!r} is not the name of a repository", hint="write ORGANISATION/NAME, or the path of a folder"
        )
    if not re.fullmatch(_REVISION, revision) or any(part in ("", ".", "..") for part in revision.split("/")):
        raise MmdError(f"{revision!r} is not a revision", hint="a branch, a tag or a commit")
    return repository, revision


def folder_name(repository: str) -> str:
    """The folder of a repository in the cache."""
    return "--".join(("models", *repository.split("/")))


def parse_listing(raw: Any) -> Listing:
    """What `GET /api/models/NAME/revision/REVISION?blobs=true` answered; MmdError when it cannot be trusted.

    A hub, or whoever answers in its place, must not write anywhere but below the snapshot.
    """
    try:
        commit = raw["sha"]
        files = tuple(_file(each) for each in raw["siblings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MmdError(f"the hub's answer is not understood: {error!r}") from error
    if not isinstance(commit, str) or not re.fullmatch(_COMMIT, commit):
        raise MmdError(f"the hub's answer names no commit: {commit!r}")
    if len(files) > _FILES_MAX:
        raise MmdError(f"the repository has {len(files)} files; {_FILES_MAX} are taken at most")
    return Listing(commit, files)


def _file(raw: Any) -> HubFile:
    path = raw["rfilename"]
    large = raw.get("lfs")
    etag, size_bytes = (large["sha256"], large["size"]) if large else (raw["blobId"], raw["size"])
    parts = path.split("/")
    if any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts) or not path.isprintable() or "\\" in path:
        raise ValueError(f"a file named {path!r}")
    if not re.fullmatch(_ETAG, etag) or not isinstance(size_bytes, int) or size_bytes < 0:
        raise ValueError(f"{path!r} of {size_bytes!r} bytes, {etag!r}")
    return HubFile(path, size_bytes, etag)


def selected(files: Sequence[HubFile]) -> tuple[HubFile, ...]:
    """The files that an engine needs: weights in one form only, safetensors where there are any."""
    safe = any(file.path.endswith(".safetensors") for file in files)
    left_out = (*_OTHER_PROGRAMS, *(_OTHER_WEIGHTS if safe else ()))
    return tuple(file for file in files if not any(fnmatchcase(file.path, pattern) for pattern in left_out))
