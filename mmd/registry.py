"""Models added and removed at run time: each is a file of its own in models.d, and is there only if all is right with it.

What is asked for is checked together with all the rest, by the loader that reads it afterwards; a file is written beside its
place and renamed, so that whoever reads the folder sees all of it or nothing. Who adds at the same time waits (flock(2)).
"""

import fcntl
import os
import sys
import tempfile
from _blake2 import blake2b
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from mmd.addresses import parse_address
from mmd.config import AddedPorts, Model
from mmd.errors import MmdError
from mmd.load import Loaded, load_files, read_files
from mmd.model_settings import ROOT_ONLY
from mmd.names import is_unit_id, slug
from mmd.problem import Problem
from mmd.scope import Scope, ScopeKind
from mmd.similar import nearest
from mmd.units import render_units
from mmd.yamlfile import Document, dump, parse

__all__ = ["Fault", "Registered", "RegistryError", "add", "plan", "remove", "revision"]

_HEADER = "# Made by `mmdctl add`. `mmdctl add --replace` or an editor changes it, `mmdctl remove` removes it.\n"
_MODE = 0o644
"""As the generator's units, which show the same to everybody."""

_FREE_PORT = 1024
"""Ports below are root's (ip(7), ip_unprivileged_port_start)."""

Files = list[tuple[Path, bytes]]


class Fault(StrEnum):
    """Why nothing was changed."""

    INVALID = "invalid"
    """The definition is wrong, or does not go with the other models."""
    EXISTS = "exists"
    """There is such a model, or its file."""
    UNKNOWN = "unknown"
    """There is no such model."""
    SHARED = "shared"
    """It is defined in a file that holds more than this model."""
    UNSOUND = "unsound"
    """The configuration has problems already, and would not be taken."""
    UNWRITABLE = "unwritable"
    """The folder cannot be written."""


class RegistryError(MmdError):
    """Nothing was changed. `key` is the path of the key that is wrong, joined by dots, where there is one."""

    def __init__(self, fault: Fault, message: str, *, hint: str = "", key: str = "") -> None:
        super().__init__(message, hint=hint)
        self.fault = fault
        self.key = key


class Registered(NamedTuple):
    """What was added, or would be."""

    files: Mapping[Path, str]
    """Text by file."""
    models: Mapping[str, str]
    """By name the revision of each, by which it is known that the gateway has it."""


def revision(model: Model) -> str:
    """The fingerprint of a model as configured, all of it: 16 hexadecimal digits."""
    return blake2b(repr(tuple(model)).encode(errors="backslashreplace"), digest_size=8).hexdigest()


def add(scope: Scope, models: Mapping[str, Any], *, replace: bool = False) -> Registered:
    """Write the files that define `models` (settings as in YAML, by name), all of them or none; RegistryError."""
    with _locked(_folder(scope)):
        found = plan(scope, models, replace=replace)
        _write(found.files)
    return found


def remove(scope: Scope, name: str) -> Path:
    """Remove the file that defines the model `name`, which must hold nothing else; RegistryError."""
    folder = _folder(scope)
    with _locked(folder):
        book = _Book(read_files(scope)[0])
        file = book.own_file(scope, name)
        try:
            file.unlink()
            _sync(folder)
        except OSError as error:
            raise RegistryError(Fault.UNWRITABLE, f"{file} cannot be removed: {error.strerror}") from error
    return file


def plan(scope: Scope, models: Mapping[str, Any], *, replace: bool = False) -> Registered:
    """What `add` would write; RegistryError when it would refuse."""
    if not models:
        raise RegistryError(Fault.INVALID, "there is no model in it", hint="write NAME: and its settings under that")
    files, problems = read_files(scope)
    book = _Book(files)
    drafts: dict[Path, tuple[str, str]] = {}
    for name, settings in models.items():
        file = _place(scope, book, name, settings, replace=replace)
        if file in drafts:
            message = f"{drafts[file][0]!r} and {name!r} have the same unit id, {file.stem}"
            raise RegistryError(Fault.INVALID, message, hint="give one of the two an id of its own")
        drafts[file] = (name, _text(name, settings))
    texts = {file: text for file, (_, text) in drafts.items()}
    whole = {**dict(files), **{file: text.encode() for file, text in texts.items()}}
    main, *drop_ins = sorted(whole, key=lambda file: (file != scope.config_file, file))
    loaded = load_files([(file, whole[file]) for file in (main, *drop_ins)], scope=scope, problems=problems)
    _check_rights(loaded, scope, models)
    _examine(loaded, scope, texts, before=load_files(files, scope=scope, problems=problems).problems)
    return Registered(texts, {name: revision(loaded.config.models[name]) for name in models})


def _folder(scope: Scope) -> Path:
    return scope.config_dir / "models.d"


class _Book:
    """Which file defines which models, whatever else is wrong with them."""

    def __init__(self, files: Files) -> None:
        self._documents = {file: parse(text, file) for file, text in files}
        self.files = {name: file for file, document in self._documents.items() for name in _names(document)}

    def holds(self, file: Path) -> list[str]:
        """The models in a file; none when there is no such file."""
        return _names(self._documents[file]) if file in self._documents else []

    def own_file(self, scope: Scope, name: str) -> Path:
        """The file in models.d that defines `name` and nothing else."""
        file = self.files.get(name)
        if file is None:
            match = nearest(name, self.files)
            hint = f"did you mean {match}?" if match else "mmdctl list shows the models"
            raise RegistryError(Fault.UNKNOWN, f"no file defines the model {name!r}", hint=hint)
        document = self._documents[file]
        place = f"{file}:{document.line(('models', name))}"
        if file == scope.config_file:
            raise RegistryError(Fault.SHARED, f"{name} is defined in {place}", hint="change it there, then: mmdctl reload")
        others = [each for each in _names(document) if each != name]
        if others or set(document.value) != {"models"} or document.problems:
            beside = ", ".join(others) or "what is wrong with it"
            raise RegistryError(
                Fault.SHARED, f"{name} is defined in {place}, beside {beside}", hint="change it there, then: mmdctl reload"
            )
        return file


def _names(document: Document) -> list[str]:
    models = document.value.get("models") if isinstance(document.value, dict) else None
    return [str(name) for name in models] if isinstance(models, dict) else []


def _place(scope: Scope, book: _Book, name: str, settings: object, *, replace: bool) -> Path:
    """The file that is to hold a model: where it is now, else one by its unit id."""
    if name in book.files:
        if not replace:
            message = f"there is a model {name!r} already, in {book.files[name]}"
            added = book.files[name] != scope.config_file
            hint = "--replace puts the new definition in its place" if added else "change it there, then: mmdctl reload"
            raise RegistryError(Fault.EXISTS, message, hint=hint)
        return book.own_file(scope, name)
    chosen = settings.get("id") if isinstance(settings, Mapping) else None
    try:
        unit_id = str(chosen) if chosen is not None else slug(name)
    except MmdError as error:
        raise RegistryError(Fault.INVALID, error.message, hint=error.hint, key=f"models.{name}.id") from error
    if not is_unit_id(unit_id):
        hint = "lower-case letters, digits, and . _ - after the first character"
        key = f"models.{name}.id"
        raise RegistryError(Fault.INVALID, f"{key}: {unit_id!r} is not a unit id", hint=hint, key=key)
    file = _folder(scope) / f"{unit_id}.yaml"
    if os.path.lexists(file):
        holds = ", ".join(book.holds(file)) or "no model that can be read"
        message = f"there is a file {file} already, which holds {holds}"
        raise RegistryError(Fault.EXISTS, message, hint="give the model another id")
    return file


def _text(name: str, settings: object) -> str:
    key = f"models.{name}"
    try:
        text = _HEADER + dump({"models": {name: settings}})
    except RecursionError as error:
        raise RegistryError(Fault.INVALID, f"{key}: nested too deeply", key=key) from error
    if parse(text, Path()).problems:  # half a surrogate pair, which JSON can say
        raise RegistryError(Fault.INVALID, f"{key}: holds something that YAML cannot say", key=key)
    return text


def _examine(loaded: Loaded, scope: Scope, drafts: Mapping[Path, str], *, before: Sequence[Problem]) -> None:
    """RegistryError when something is wrong with the whole. What is wrong elsewhere may be the new model's fault: an alias of
    another one that it has for a name."""
    units = render_units(loaded.config, scope=scope, bin_dir=str(Path(sys.executable).parent))
    problems = (*loaded.problems, *units.problems)
    new = [problem for problem in problems if problem.file in drafts or problem not in before]
    if new:
        told = "\n".join(str(problem) if problem.file not in drafts else _without_place(problem) for problem in new)
        raise RegistryError(Fault.INVALID, told, key=new[0].key)
    if problems:
        message = f"the configuration has problems already, so that nothing new is taken: {problems[0]}"
        raise RegistryError(Fault.UNSOUND, message, hint="correct that first: mmdctl check")


def _check_rights(loaded: Loaded, scope: Scope, models: Mapping[str, Any]) -> None:
    """RegistryError when a model is given what only root may give. What root's defaults and profiles say is root's choice.

    Members of mmd-admin add models by the registrar, and root writes files: so this is checked here, before a file is written,
    and not by the loader. A user's own instance belongs to who adds.
    """
    if scope.kind is ScopeKind.USER:
        return
    for name, settings in models.items():
        given = sorted(ROOT_ONLY & set(settings)) if isinstance(settings, Mapping) else []
        if given:
            key = f"models.{name}.{given[0]}"
            raise RegistryError(Fault.INVALID, f"{key}: only root may set it", hint=f"by hand, in {scope.config_file}", key=key)
        model, gateway = loaded.config.models.get(name), loaded.config.gateway
        if model is None or model.port is None or gateway.added_ports is AddedPorts.ANY:
            continue
        address = parse_address(model.port)
        if address.port and address.port in {parse_address(each).port for each in (*gateway.listen, *gateway.admin_listen)}:
            # `localhost` is [::1] first (RFC 6724): who means the gateway would ask the model.
            key = f"models.{name}.port"
            message = f"{key}: {model.port} has the number of a port of the gateway"
            raise RegistryError(Fault.INVALID, message, hint="choose another number", key=key)
        if address.port and (address.port < _FREE_PORT or not address.is_loopback):
            key = f"models.{name}.port"
            message = f"{key}: {model.port} is not a loopback address with a port of at least {_FREE_PORT}"
            hint = f"write 127.0.0.1:{max(address.port, _FREE_PORT)}, or gateway: {{added_ports: any}} in {scope.config_file}"
            raise RegistryError(Fault.INVALID, message, hint=hint, key=key)


def _without_place(problem: Problem) -> str:
    """The problem without the file and line that nobody has seen yet."""
    return str(problem).removeprefix(f"{problem.file}:{problem.line}: ").removeprefix(f"{problem.file}: ")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder for us alone; it is made where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RegistryError(Fault.UNWRITABLE, f"{folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(files: Mapping[Path, str]) -> None:
    """All of the files, or none as far as what can go wrong is known before the first is in its place."""
    written: dict[Path, Path] = {}
    try:
        for file, text in files.items():
            descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
            written[file] = Path(name)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fchmod(descriptor, _MODE)
                os.fsync(descriptor)
        for file, draft in written.items():
            draft.replace(file)
        for folder in {file.parent for file in files}:
            _sync(folder)
    except OSError as error:
        where = error.filename or next(iter(files))
        raise RegistryError(Fault.UNWRITABLE, f"{where} cannot be written: {error.strerror}") from error
    finally:
        for draft in written.values():
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """A name that was changed survives a loss of power once its folder has reached the disk (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
