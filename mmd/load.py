"""Reads the configuration: mmd.yaml and models.d/*.yaml become a Config, and a list of what is wrong with them.

One mistake never takes down what is right: a model with a problem is left out, a bad value elsewhere falls back to its default.
Uses PyYAML and the standard library only, without name service, network or subprocesses: the generator runs before those exist
(systemd.generator(7)).
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mmd.addresses import PortsTaken
from mmd.build import make_model, make_section, merge
from mmd.check import Complaint, read_section
from mmd.config import Config, EngineKind, Gateway, Gpus, Model, Policy, Resources
from mmd.errors import MmdError
from mmd.exposure import Exposure, gateway_exposures, port_exposure
from mmd.kinds import NAME, BadValueError
from mmd.model_settings import DEFAULTS, MODEL, PROFILE
from mmd.problem import Problem
from mmd.rules import NamesTaken, applicable, check_gateway, check_gpus, check_model, check_resources, misplaced
from mmd.scope import Scope
from mmd.secrecy import looks_secret
from mmd.setting import Section
from mmd.settings import TOP
from mmd.similar import nearest
from mmd.yamlfile import BYTES_MAX, Document, parse

__all__ = ["Loaded", "load", "load_files", "load_text", "read_bounded", "read_files"]

MODEL_KEYS = ("defaults", "profiles", "models")
"""The keys at the top whose values are made of model keys; a drop-in has `models` only."""


_UNKNOWN_MAX = 100
"""Unknown keys at a document's top that are told: for each a similar one is looked for."""


class Loaded(NamedTuple):
    """The configuration as far as it is right, and what is wrong with the rest."""

    config: Config
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    """What is permitted and probably not meant."""
    open_without_keys: tuple[Problem, ...] = ()
    """Warnings as well, but only while there are no API keys."""

    def warnings_where(self, *, keys_asked_for: bool) -> tuple[Problem, ...]:
        """All warnings that hold, with API keys or without."""
        return self.warnings if keys_asked_for else (*self.open_without_keys, *self.warnings)


def load(scope: Scope) -> Loaded:
    """The configuration in `scope.config_dir`. Never raises for what is in the files, or for their absence."""
    files, problems = read_files(scope)
    return load_files(files, scope=scope, problems=problems)


def read_files(scope: Scope) -> tuple[list[tuple[Path, bytes]], list[Problem]]:
    """What is in the files of `scope.config_dir`, mmd.yaml first, and which of them cannot be read."""
    problems: list[Problem] = []
    files: list[tuple[Path, bytes]] = []
    for file in (scope.config_file, *_drop_ins(scope.config_dir / "models.d", problems)):
        try:
            files.append((file, read_bounded(file)))
        except FileNotFoundError:
            hint = "copy the annotated default from mmd's documentation, see mmd.yaml(5)"
            problems.append(Problem(file, 0, "", "no such file", hint))
        except OSError as error:
            problems.append(Problem(file, 0, "", f"cannot be read: {error.strerror}"))
    return files, problems


def load_text(text: str | bytes, *, file: Path = Path("mmd.yaml"), scope: Scope | None = None) -> Loaded:
    """The configuration in `text`, as if it were the whole of mmd.yaml."""
    return load_files([(file, text)], scope=scope or Scope.system())


def load_files(files: Sequence[tuple[Path, str | bytes]], *, scope: Scope, problems: Iterable[Problem] = ()) -> Loaded:
    """The configuration in the texts of several files; those in a folder models.d hold models only."""
    loader = _Loader(scope, list(problems))
    loader.read([parse(text, file) for file, text in files])
    return loader.loaded()


def read_bounded(file: Path) -> bytes:
    """A file's content, or as much of it as tells that it is too large; OSError."""
    with file.open("rb") as stream:
        return stream.read(BYTES_MAX + 1)


def is_drop_in(file: Path) -> bool:
    """Whether `file` is one of models.d/*.yaml."""
    return file.parent.name == "models.d"


def _drop_ins(folder: Path, problems: list[Problem]) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(Problem(folder, 0, "", f"cannot be read: {error.strerror}"))
        return []
    problems += (
        Problem(file, 0, "", "not read: the name must end in .yaml", f"mv {file} {file.with_suffix('.yaml')}")
        for file in files
        if file.suffix in {".yml", ".json"}
    )
    return [file for file in files if file.suffix == ".yaml"]


class _Draft(NamedTuple):
    """A model on its way: its own keys, and where they are."""

    name: str
    document: Document
    line: int
    values: dict[str, Any]
    good: bool

    @property
    def place(self) -> str:
        return f"{self.document.file}:{self.line}"


class _Loader:
    """Collects what the files hold; a file's sections first, all models last."""

    def __init__(self, scope: Scope, problems: list[Problem]) -> None:
        self._scope = scope
        self._problems = problems
        self._order: dict[Path, int] = {}
        self._top: dict[str, Any] = {"gateway": Gateway(), "gpus": Gpus(), "resources": Resources(), "policy": Policy()}
        self._defaults: dict[str, Any] = {}
        self._profiles: dict[str, dict[str, Any]] = {}
        self._bad_profiles: set[str] = set()
        self._main: Document | None = None
        self._drafts: dict[str, _Draft] = {}
        self._models: dict[str, Model] = {}
        self._exposed: list[Problem] = []
        self._exposed_for_good: list[Problem] = []

    def read(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self._order[document.file] = len(self._order)
            self._problems += (problem for _, problem in document.problems)
            if document.value is None:
                continue
            if not isinstance(document.value, dict):
                self._complain(document, [((), "must be a mapping of keys", "write KEY: VALUE lines")])
                continue
            drop_in = is_drop_in(document.file)
            self._unknown(document, ("models",) if drop_in else (*TOP.entries, *MODEL_KEYS))
            if not drop_in:
                self._main = document
                self._sections(document)
                self._layers(document)
            self._read_models(document)
        self._make_models()

    def loaded(self) -> Loaded:
        problems = sorted(self._problems, key=lambda problem: (self._order.get(problem.file, -1), problem.line))
        config = Config(**self._top, models=self._models)
        return Loaded(config, tuple(problems), tuple(self._exposed_for_good), tuple(self._exposed))

    def _look_for_exposures(self) -> None:
        """What other machines reach, and what all users here can read."""
        for exposure in gateway_exposures(self._top["gateway"]):
            if self._main is not None:
                self._note(exposure, self._problem(self._main, *exposure.complaint))
        written: dict[tuple[Path, int], Problem] = {}
        for model in self._models.values():
            if (exposure_of_port := port_exposure(model)) is not None:
                self._note(exposure_of_port, self._problem_of(self._drafts[model.name], *exposure_of_port.complaint))
            for name in filter(looks_secret, model.env):
                hint = f"put the value into a file of root's, and write secrets: {{{name}: /etc/mmd/secrets/{name.lower()}}}"
                warning = self._problem_of(self._drafts[model.name], ("env", name), "every user here can read it", hint)
                written.setdefault((warning.file, warning.line), warning)  # once, where many models have it from the defaults
        self._exposed_for_good += written.values()

    def _note(self, exposure: Exposure, problem: Problem) -> None:
        (self._exposed if exposure.closed_by_keys else self._exposed_for_good).append(problem)

    def _complain(self, document: Document, complaints: Iterable[Complaint]) -> None:
        self._problems += (self._problem(document, *complaint) for complaint in complaints)

    def _problem(self, document: Document, path: tuple[str | int, ...], message: str, hint: str) -> Problem:
        return Problem(document.file, document.line(path), ".".join(map(str, path)), message, hint)

    def _unknown(self, document: Document, known: tuple[str, ...]) -> None:
        for key in islice((key for key in document.value if key not in known), _UNKNOWN_MAX):
            match = nearest(key, known)
            hint = f"did you mean {match}?" if match else f"known: {', '.join(known)}"
            self._complain(document, [((key,), "unknown key", hint)])

    def _section(self, document: Document, section: Section) -> tuple[Any, list[Complaint]]:
        complaints: list[Complaint] = []
        values = read_section(section, document.value.get(section.key), (section.key,), complaints)
        return make_section(section, values), complaints

    def _sections(self, document: Document) -> None:
        for key, entry in TOP.entries.items():
            assert isinstance(entry, Section)
            value, complaints = self._section(document, entry)
            below: list[Complaint] = []
            if isinstance(value, Gateway):
                value = check_gateway(value, below, scope=self._scope)
            elif isinstance(value, Gpus):
                value = check_gpus(value, below)
            elif isinstance(value, Resources):
                value = check_resources(value, below)
            self._top[key] = value
            self._complain(document, complaints)
            self._complain(document, (((key, *path), message, hint) for path, message, hint in below))

    def _layers(self, document: Document) -> None:
        complaints: list[Complaint] = []
        self._defaults = read_section(DEFAULTS, document.value.get("defaults"), ("defaults",), complaints)
        self._complain(document, complaints)
        for name, raw in self._named(document, "profiles"):
            complaints = []
            self._profiles[name] = read_section(PROFILE, raw, ("profiles", name), complaints)
            self._complain(document, complaints)
            if complaints or self._faulty(document, ("profiles", name)):
                self._bad_profiles.add(name)

    def _read_models(self, document: Document) -> None:
        lines = document.lines("models")
        for name, raw in self._named(document, "models"):
            first = self._drafts.get(name)
            if first is not None:
                self._complain(document, [(("models", name), f"already defined at {first.place}", "remove one of the two")])
                continue
            complaints: list[Complaint] = []
            values = read_section(MODEL, raw, ("models", name), complaints)
            self._complain(document, complaints)
            good = not complaints and not self._faulty(document, ("models", name))
            self._drafts[name] = _Draft(name, document, lines[name], values, good)

    def _named(self, document: Document, key: str) -> Iterable[tuple[str, Any]]:
        """The entries of a mapping whose keys people choose."""
        raw = document.value.get(key)
        if raw is not None and not isinstance(raw, dict):
            self._complain(document, [((key,), "must be a mapping of names", "write NAME: on a line of its own under it")])
            return
        for name, value in (raw or {}).items():
            try:
                NAME.read(name)
            except BadValueError as error:
                self._complain(document, [((key, name), error.message, error.hint)])
                continue
            yield name, value

    def _faulty(self, document: Document, path: tuple[str, ...]) -> bool:
        """Whether the YAML below `path` is wrong, such as a key given twice."""
        return any(len(where) > len(path) and where[: len(path)] == path for where, _ in document.problems)

    def _make_models(self) -> None:
        taken = NamesTaken({name: draft.place for name, draft in self._drafts.items()})
        ports = PortsTaken(self._top["gateway"])
        for draft in self._drafts.values():
            if not draft.good:  # what else is wrong with it may well follow from that
                continue
            before = len(self._problems)
            model = self._merge(draft)
            if model is None:
                continue
            self._complain_of(draft, taken.check(model))
            self._complain_of(draft, ports.check(model))
            self._complain_of(draft, check_model(model, scope=self._scope, resources=self._top["resources"]))
            if len(self._problems) == before:
                taken.add(model)
                ports.add(model)
                self._models[model.name] = model
        self._look_for_exposures()

    def _merge(self, draft: _Draft) -> Model | None:
        """The model with its layers merged; None when they cannot be."""
        name = draft.values.get("profile", self._defaults.get("profile"))
        profile = self._profiles.get(name, {}) if name else {}
        if name and name not in self._profiles:
            match = nearest(name, self._profiles)
            hint = f"did you mean {match}?" if match else "define it under `profiles:`"
            self._complain_of(draft, [(("profile",), f"no profile {name!r}", hint)])
            return None
        if name in self._bad_profiles:
            self._complain_of(draft, [(("profile",), f"profile {name!r} has a problem", "see there")])
            return None
        own = merge(profile, draft.values)
        engine = own.get("engine", self._defaults.get("engine", EngineKind.VLLM))
        self._complain_of(draft, misplaced(own, engine))
        try:
            values = merge(applicable(self._defaults, engine), applicable(own, engine))
            return make_model(draft.name, values, source=draft.document.file, line=draft.line)
        except MmdError as error:
            self._complain_of(draft, [((), error.message, error.hint)])
            return None

    def _complain_of(self, draft: _Draft, complaints: Iterable[Complaint]) -> None:
        """Complaints about a model, placed where the key is written: in the model, its profile, or the defaults."""
        self._problems += (self._problem_of(draft, *complaint) for complaint in complaints)

    def _problem_of(self, draft: _Draft, path: tuple[str | int, ...], message: str, hint: str) -> Problem:
        full = ("models", draft.name, *path)
        layers = [(draft.document, full)]
        if self._main is not None:
            profile = draft.values.get("profile", self._defaults.get("profile", ""))
            layers += [(self._main, ("profiles", profile, *path)), (self._main, ("defaults", *path))]
        document, where = next((layer for layer in layers if layer[0].has(layer[1])), layers[0])
        return Problem(document.file, document.line(where), ".".join(map(str, full)), message, hint)
