"""The users of models: one for each unit id, by names that Linux takes."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from mmd.names import is_model_user, is_unit_id, model_user

_IDS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)


@given(_IDS)
@example("a" * 22)
@example("a" * 23)
@example("a.b")
@example("0")
@example("x" * 63)
def test_a_user_is_one_that_systemd_and_shadow_take(unit_id: str) -> None:
    name = model_user(unit_id)
    assert is_unit_id(unit_id)
    assert re.fullmatch(r"[a-z_][a-z0-9_-]*", name)  # useradd(8); systemd.io/USER_NAMES, strict
    assert len(name) <= 31
    assert is_model_user(name)


@given(_IDS, _IDS)
@example("a.b", "a_b")
@example("a.b", "a-b")
@example("x" * 63, "x" * 62)
def test_no_two_ids_have_one_user(first: str, second: str) -> None:
    assert (model_user(first) == model_user(second)) is (first == second)


@given(_IDS)
def test_no_id_spells_the_user_of_another(unit_id: str) -> None:
    """A member of mmd-admin chooses ids."""
    spelled = model_user(unit_id).removeprefix("mmd-m-")
    if spelled != unit_id:
        assert model_user(spelled) != model_user(unit_id)


@given(st.text() | st.from_regex(r"mmd-m-.*", fullmatch=True))
@example("root")
@example("mmd-m-a\n")
@example("mmd-m-")
@example("mmd-m--a")
def test_what_is_no_models_user_is_told(name: str) -> None:
    if is_model_user(name):
        assert re.fullmatch(r"mmd-m-[a-z0-9][a-z0-9-]{0,22}", name)


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True))
def test_a_user_is_not_found_by_trying_ids(unit_id: str) -> None:
    """Members of mmd-admin choose ids: one with another model's user would read its cache and its secrets."""
    said, _, digest = model_user(unit_id).removeprefix("mmd-m-").rpartition("-")
    assert model_user(unit_id) == f"mmd-m-{unit_id}" or (len(digest) >= 16 and len(said) <= 6)


@given(_IDS, _IDS)
@example("m", "m")
def test_a_model_that_is_roots_has_no_user_of_another(private: str, other: str) -> None:
    """A member of mmd-admin may have had a model of the same id, and left programs in its cache."""
    assert model_user(private, private=True) != model_user(other)
    assert is_model_user(model_user(private, private=True))
    assert (model_user(private, private=True) == model_user(other, private=True)) is (private == other)
