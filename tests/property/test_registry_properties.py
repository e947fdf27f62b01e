"""An addition that is taken leaves every other model as it was, and its removal the files; a refused one changes nothing."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mmd.load import Loaded, load
from mmd.registry import RegistryError, add, remove, revision
from mmd.scope import Scope

_MAIN = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
resources: {license: 2}
defaults: {engine: sim, vram: 1GiB}
profiles: {small: {vram: 2GiB}}
models:
  base: {aliases: [b, other], id: base}
  org/b: {lora: {org/l: /x}}
"""
_NAMES = st.sampled_from(
    ["base", "b", "other", "org/b", "org-b", "org/l", "new", "New", "no", "1e5", "~", "x: y", "é", ""]
) | st.text(max_size=6)
_VALUES = st.none() | st.booleans() | st.integers(-1, 40) | st.floats() | _NAMES | st.lists(_NAMES, max_size=3)
_SETTINGS = st.dictionaries(
    st.sampled_from(["id", "aliases", "profile", "vram", "gpus", "args", "engine", "description", "lora", "pin", "nonsense"]),
    st.sampled_from(["small", "2GiB", "auto", "sim", "base", ["b"], ["new"], {"lo": "/x"}, True, 1]) | _VALUES,
    max_size=4,
)


def _files(scope: Scope) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in scope.config_dir.rglob("*") if path.is_file()}


def _added(scope: Scope, models: dict[str, Any], *, replace: bool) -> dict[str, str] | None:
    before = _files(scope)
    try:
        return dict(add(scope, models, replace=replace).models)
    except RegistryError:
        assert _files(scope) == before
        return None


def _check(scope: Scope, before: Loaded, models: dict[str, Any], revisions: dict[str, str]) -> None:
    loaded = load(scope)
    assert loaded.problems == ()
    assert {name: revision(loaded.config.models[name]) for name in models} == revisions
    others = {name: model for name, model in before.config.models.items() if name not in models}
    assert {name: model for name, model in loaded.config.models.items() if name not in models} == others
    assert loaded.config._replace(models={}) == before.config._replace(models={})


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.dictionaries(_NAMES, _SETTINGS, max_size=2), st.booleans()), min_size=1, max_size=4))
def test_what_is_taken_leaves_all_others_alone(additions: list[tuple[dict[str, Any], bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scope = Scope.system()._replace(config_dir=Path(folder))
        scope.config_file.write_text(_MAIN)
        (scope.config_dir / "models.d").mkdir()
        empty = _files(scope)
        taken: set[str] = set()
        for models, replace in additions:
            before = load(scope)
            revisions = _added(scope, models, replace=replace)
            if revisions is not None:
                _check(scope, before, models, revisions)
                taken |= models.keys()
        for name in taken:
            remove(scope, name)
        assert _files(scope) == empty
