"""The rules of the house that a program can check: formatters, linters, types, layers, lengths."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = sorted((CHECKOUT / "mmd").rglob("*.py"))
TEST_FOLDERS = sorted({path.parent for path in (CHECKOUT / "tests").rglob("*.py")})

MODULE_LINES = 800
FUNCTION_LINES = 60

ADAPTERS = {"gpu", "sim.ledger", "systemd"}
PROGRAMS = {"client", "ctl", "gateway", "generator", "hub", "model_user", "registrar", "runner", "sim"}
EFFECTS = {"aiohttp", "asyncio", "pynvml", "pystemd", "rich", "sdnotify", "subprocess", "threading", "time", "uvloop"}
"""What a pure module does not import: it has no clock, no processes, no network."""


def run(*argv: str | Path) -> None:
    done = subprocess.run([str(word) for word in argv], cwd=CHECKOUT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, argv))}\n{done.stdout}{done.stderr}"


def scripts() -> list[Path]:
    """Our shell scripts, by their first line."""
    folders = ("packaging", "tests", ".ci")
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return sorted(path for path in files if path.read_bytes()[:11].startswith((b"#!/bin/bash", b"#!/bin/sh")))


def layer(name: str) -> int:
    """0 pure, 1 adapter, 2 program: a module of mmd (`gpu.nvml`) may be imported by its own layer and those above."""
    parts = name.split(".")
    if {parts[0], ".".join(parts[:2])} & ADAPTERS:
        return 1
    return 2 if parts[0] in PROGRAMS else 0


def imports(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(module: Path) -> str:
    """`gpu.nvml` for mmd/gpu/nvml.py."""
    return ".".join(module.relative_to(CHECKOUT / "mmd").with_suffix("").parts).removesuffix(".__init__")


def short(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def test_ruff_check() -> None:
    run(sys.executable, "-m", "ruff", "check", "setup.py", "mmd", "tests", "packaging")


def test_ruff_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", "setup.py", "mmd", "tests", "packaging")


@pytest.mark.timeout(240)
def test_types_of_the_package() -> None:
    run(sys.executable, "-m", "mypy", "--strict", "setup.py", "mmd", "packaging/lib/first_request.py")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("folder", TEST_FOLDERS, ids=short)
def test_types_of_the_tests(folder: Path) -> None:
    """Each folder by itself: several have a conftest.py, which are modules of the same name."""
    run(sys.executable, "-m", "mypy", "--strict", *sorted(folder.glob("*.py")))


@pytest.mark.parametrize("script", scripts(), ids=short)
def test_shellcheck(script: Path) -> None:
    run("shellcheck", "--external-sources", "--check-sourced", "--source-path", CHECKOUT, script)


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_imports_point_inwards(module: Path) -> None:
    own = name_of(module)
    for imported in imports(module):
        top, _, other = imported.partition(".")
        if top == "mmd" and other:
            assert layer(other) <= layer(own), f"{short(module)} imports {imported}"
            between_programs = layer(own) == layer(other) == 2 and own.split(".")[0] != other.split(".")[0]
            assert not between_programs, f"{short(module)}: one program imports another, {imported}"
        elif layer(own) == 0:
            assert top not in EFFECTS, f"{short(module)} is pure and imports {imported}"


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_modules_and_functions_stay_short(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{short(module)}:{node.lineno}: {node.name} is too long"


def test_our_programs_take_no_modules_from_elsewhere() -> None:
    """-I: neither a working directory nor PYTHONPATH adds to what a process of ours imports, not even what an engine wrote."""
    for unit in sorted((CHECKOUT / "units").rglob("*.service")):
        for line in unit.read_text().splitlines():
            assert "bin/python" not in line or "bin/python -I " in line, f"{short(unit)}: {line}"
    for module in MODULES:
        started = re.findall(r'sys\.executable, *("[^"]*")', module.read_text())
        assert set(started) <= {'"-I"'}, short(module)


def compiled_modules() -> list[Path]:
    """What setup.py compiles."""
    for node in ast.parse((CHECKOUT / "setup.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "COMPILED":
            assert node.value is not None
            return [CHECKOUT / name for name in ast.literal_eval(node.value)]
    raise AssertionError("setup.py: no COMPILED")


@pytest.mark.parametrize("module", compiled_modules(), ids=short)
def test_compiled_classes_have_no_defaults_of_none(module: Path) -> None:
    """mypyc leaves an attribute undefined whose class-level default is None, unless it knows the type; dataclasses are well."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ClassDef) and not node.decorator_list:
            for default in (each for each in node.body if isinstance(each, ast.AnnAssign) and each.value is not None):
                none = isinstance(default.value, ast.Constant) and default.value.value is None
                assert not none, f"{short(module)}:{default.lineno}: set it in __init__"


def test_no_two_test_modules_have_the_same_name() -> None:
    """pytest takes modules by their base names, where folders are no packages."""
    names = Counter(path.name for path in (CHECKOUT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
