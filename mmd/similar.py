"""The name that somebody meant who wrote another one (pure).

difflib compares two names in about 0.1 ms, which is too long for each of hundreds. So only the few names that share most
letters and pairs of letters with the word are compared; to find these takes a set operation for each name.
"""

from collections.abc import Iterable
from itertools import pairwise

__all__ = ["Names", "nearest"]

# Beyond this a word is nobody's name, and not worth a search.
_WORD_MAX = 200

# Letters of a word that are looked at. Names that differ behind them look alike, and either is a good hint.
_LETTERS_MAX = 64

# How many names difflib compares.
_CANDIDATES = 8


def _features(word: str) -> frozenset[str]:
    """Its letters and its pairs of letters."""
    return frozenset((*word, *map("".join, pairwise(word))))


class Names:
    """Names that are searched more than once: what can be known of them in advance is."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [(_features(name[:_LETTERS_MAX].lower()), name) for name in names]

    def nearest(self, word: str, cutoff: float = 0.6) -> str | None:
        """The one that `word` most looks like; None: none of them does. `cutoff`: how much, from 0 to 1."""
        if len(word) > _WORD_MAX:
            return None
        from difflib import get_close_matches  # only needed after a mistake, and slow to import for a generator
        from heapq import nlargest

        word = word[:_LETTERS_MAX].lower()
        features = _features(word)
        size = len(features)
        shared = ((len(features & each) / (size + len(each) or 1), name) for each, name in self._names)
        candidates = {name[:_LETTERS_MAX].lower(): name for share, name in nlargest(_CANDIDATES, shared) if share > 0}
        found = get_close_matches(word, candidates, n=1, cutoff=cutoff)
        return candidates[found[0]] if found else None


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` most looks like."""
    return Names(words).nearest(word)
