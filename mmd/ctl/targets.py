"""Which models the words of a command line mean: names, aliases, unit ids, unit names and globs."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from mmd.ctl.exits import CtlError, Exit

__all__ = ["Target", "find", "no_such_model", "select", "targets"]

_UNIT = re.compile(r"mmd-model-(?P<id>[^@]+)@[^@]*?(\.service)?")


class _Model(Protocol):
    """A model as configured (mmd.config, which costs 12 ms to import) or as the gateway tells of it (mmd.status)."""

    @property
    def name(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a model may be called."""

    name: str
    id: str
    aliases: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, self.id)


def targets(models: Iterable[_Model]) -> tuple[Target, ...]:
    return tuple(Target(model.name, model.id, model.aliases) for model in models)


def find(models: Sequence[Target], word: str) -> Target | None:
    """The model that `word` names: a name before an alias, an alias before an id, and last the name of one of its units,
    with or without a placement and `.service`."""
    unit = _UNIT.fullmatch(word)
    meanings: tuple[Callable[[Target], bool], ...] = (
        lambda model: model.name == word,
        lambda model: word in model.aliases,
        lambda model: model.id == word,
        lambda model: unit is not None and model.id == unit["id"],
    )
    return next((model for meaning in meanings for model in models if meaning(model)), None)


def select(models: Sequence[Target], words: Sequence[str]) -> list[Target]:
    """The models that `words` name or match as globs, each once, in the order of the words; CtlError when one is none."""
    selected: dict[str, Target] = {}
    for word in words:
        found = find(models, word)
        matching = [found] if found else _matching(models, word)
        if not matching:
            raise no_such_model(models, word)
        selected |= {model.name: model for model in matching}
    return list(selected.values())


def no_such_model(models: Sequence[Target], word: str) -> CtlError:
    """The error for a word that names no model, with the nearest one that does."""
    from difflib import get_close_matches  # only needed after a mistake

    known = {each.lower(): each for model in models for each in model.words}
    near = get_close_matches(word.lower(), known, n=1, cutoff=0.5) or [each for each in known if word.lower() in each]
    hint = f"did you mean {known[near[0]]}?" if near else "mmdctl list shows the models"
    return CtlError(f"no model is called {word!r}", hint=hint, exit_code=Exit.NO_SUCH_MODEL)


def _matching(models: Sequence[Target], word: str) -> list[Target]:
    if not any(character in word for character in "*?["):
        return []
    return [model for model in models if any(fnmatchcase(each, word) for each in model.words)]
