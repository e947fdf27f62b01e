"""Unit ids, placements, unit names."""

import pytest

from mmd.errors import MmdError
from mmd.names import CPU, Placement, UnitName, is_unit_id, slug


@pytest.mark.parametrize(
    ("name", "unit_id"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen-qwen2.5-7b-instruct"),
        ("tiny", "tiny"),
        ("  A b ", "a-b"),
        ("/srv/models/x", "srv-models-x"),
        ("模型 7b", "7b"),
        ("x" * 100, "x" * 63),
        ("a_b:c", "a_b-c"),
    ],
)
def test_slug(name: str, unit_id: str) -> None:
    assert slug(name) == unit_id
    assert is_unit_id(unit_id)


@pytest.mark.parametrize("name", ["", "模型", "---", "/"])
def test_no_slug(name: str) -> None:
    with pytest.raises(MmdError, match="no unit id can be made"):
        slug(name)


@pytest.mark.parametrize("text", ["", "A", "-a", ".a", "a@b", "a/b", "a\n", "a" * 64])
def test_no_unit_id(text: str) -> None:
    assert not is_unit_id(text)


@pytest.mark.parametrize(("placement", "instance"), [(Placement((0,)), "0"), (Placement((0, 1, 12)), "0-1-12"), (CPU, "cpu")])
def test_placement_round_trips(placement: Placement, instance: str) -> None:
    assert str(placement) == instance
    assert Placement.parse(instance) == placement
    assert UnitName.parse(str(UnitName("m", placement))) == UnitName("m", placement)


@pytest.mark.parametrize("instance", ["", "gpu", "1-0", "0-0", "-1", "0-", "1,2"])
def test_no_placement(instance: str) -> None:
    with pytest.raises(MmdError):
        Placement.parse(instance)
    assert UnitName.parse(f"mmd-model-x@{instance}.service") is None


@pytest.mark.parametrize(
    "unit", ["mmd-gateway.service", "mmd-model-x.service", "mmd-model-X@0.service", "mmd-model-x@0.socket"]
)
def test_other_units_are_not_ours(unit: str) -> None:
    assert UnitName.parse(unit) is None
