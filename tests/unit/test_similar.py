"""The nearest of thousands of names, cheaply; and no more searches than there is time for."""

import random
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd.config import Config, EngineKind, Model
from mmd.gateway import api_error
from mmd.gateway.api_error import NAME_MAX, no_such_model
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.kept import KeptAnswers
from mmd.gateway.relay.routing import ROUTES
from mmd.similar import Names, nearest

_WORDS = ("qwen", "llama", "mistral", "gemma", "phi", "instruct", "chat", "base", "7b", "70b", "awq", "coder", "vision")


def names(count: int) -> list[str]:
    dice = random.Random(1)
    return [f"{dice.choice(_WORDS)}-{number}/{dice.choice(_WORDS)}-{dice.choice(_WORDS)}" for number in range(count)]


def config_of(*found: str) -> Config:
    return Config(models={name: Model(name, f"m{number}", EngineKind.SIM) for number, name in enumerate(found)})


@pytest.fixture(autouse=True)
def _unspent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_error, "_known", api_error._Known())


def test_what_looks_alike_is_found() -> None:
    known = ["Qwen/Qwen2.5-7B-Instruct", "llama-3", "sql", "ab"]
    for word, near in (
        ("qwen/qwen2.5-7b-instruct", known[0]),
        ("Qwen/Qwen2.5-7B-Instuct", known[0]),
        ("lama-3", "llama-3"),
        ("sq l", "sql"),
        ("ba", None),
        ("xyz", None),
        ("", None),
    ):
        assert nearest(word, known) == near, word
    assert nearest("x", []) is None


def test_of_thousands_of_names_the_one_with_a_letter_less_is_found() -> None:
    known = names(3000)
    search = Names(known)
    for name in known[::30]:
        assert search.nearest(name[:7] + name[8:]) == name


@given(st.text(max_size=250), st.lists(st.text(max_size=250), max_size=20))
def test_it_is_one_of_them_or_none(word: str, known: list[str]) -> None:
    found = nearest(word, known)
    assert found is None or found in known
    if len(word) <= 200 and word.lower().strip() and word in known:
        assert found is not None
        assert found[:64].lower() == word[:64].lower()


def test_few_names_are_compared_letter_by_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes 0.1 ms for each: not time but the number of comparisons is what is bounded."""
    import difflib

    compared: list[int] = []

    def count(_: str, words: Iterable[str], **__: float) -> list[str]:
        compared.append(len(list(words)))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", count)
    Names(names(5000)).nearest("mistral-instruct")
    assert 0 < compared[0] <= 8


def test_searches_have_a_budget_of_time() -> None:
    """Who asks faster than that is told that there is no such model, and no more."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.002
        return now[0]

    known, config = api_error._Known(clock), config_of("mistral-7b")
    found = [known.nearest("mistral-7c", config) for _ in range(200)]
    assert found[0] == "mistral-7b"
    assert 40 < sum(each is not None for each in found) < 120
    now[0] += 60.0
    assert known.nearest("mistral-7c", config) == "mistral-7b"


def test_the_hint_is_of_the_configuration_in_force() -> None:
    assert "'mistral-7b'" in no_such_model("mistral-7c", config_of("mistral-7b")).message
    assert "'mistral-8b'" in no_such_model("mistral-7c", config_of("mistral-8b")).message


@pytest.mark.parametrize("size", [NAME_MAX + 1, 1 << 20])
def test_a_name_of_a_mebibyte_is_neither_searched_nor_repeated(size: int) -> None:
    config = config_of(*names(500))
    request = RequestHead()
    body = b'{"model": "%b"}' % (b"x" * size)
    with pytest.raises(api_error.ApiError) as caught:
        ROUTES[b"/v1/chat/completions"].aim(request, body, config, KeptAnswers())
    assert caught.value.status == 404
    assert len(caught.value.message) < 400
    assert api_error._known._config is None, "no search"
    name = "x" * size
    tracemalloc.start()
    try:
        no_such_model(name, config)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
