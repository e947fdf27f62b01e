"""Answers that engines keep (/v1/responses), and whose they are: clients ask for them by nothing but their id."""

from collections.abc import Mapping
from typing import Final

__all__ = ["KeptAnswers"]

# The oldest are forgotten first; so many are half a MiB.
_MAX: Final = 4096


class KeptAnswers:
    def __init__(self) -> None:
        self._models: dict[str, str] = {}

    @property
    def models(self) -> Mapping[str, str]:
        """The names of their models by the ids of the answers, the oldest first."""
        return self._models

    def add(self, answer: str, model: str) -> None:
        self._models.pop(answer, None)
        self._models[answer] = model
        if len(self._models) > _MAX:
            del self._models[next(iter(self._models))]
