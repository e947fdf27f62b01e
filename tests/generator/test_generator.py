"""The generator as systemd and people run it, and what systemd says of its units."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mmd
from mmd.config import EngineKind, Filters, Gpus, Health, Idle, Limits, Listen, Model, PortProtocol, Replicas, Sim
from mmd.load import load_text
from mmd.scope import Scope
from mmd.units import definition, model_unit, render_units

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "config/examples").glob("*.yaml"))
GOOD = "models:\n  a: {gpus: 0}\n"
BAD = "models:\n  a: {gpus: 0}\n  b: {vrma: 1}\n"


def generator(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-IB", "-m", "mmd.generator", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.defpath, **environment})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "mmd.yaml").write_text(GOOD)
    return folder


def test_output(config: Path, tmp_path: Path) -> None:
    done = generator("--config-dir", config, f"--output={tmp_path / 'out'}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")) == [
        "mmd-admin-tcp.socket",
        "mmd-admin.socket",
        "mmd-fetch-a.service",
        "mmd-gateway.socket",
        "mmd-model-a@.service",
        "sockets.target.wants",
        "sockets.target.wants/mmd-admin-tcp.socket",
        "sockets.target.wants/mmd-admin.socket",
        "sockets.target.wants/mmd-gateway.socket",
    ]
    link = tmp_path / "out/sockets.target.wants/mmd-gateway.socket"
    assert link.resolve() == tmp_path / "out/mmd-gateway.socket"
    assert generator("--config-dir", config, "--output", tmp_path / "out").returncode == 0


def test_the_folders_of_systemd(config: Path, tmp_path: Path) -> None:
    (config / "mmd.yaml").write_text(BAD)
    folders = [tmp_path / name for name in ("normal", "early", "late")]
    for folder in folders:
        folder.mkdir()
    done = generator("--config-dir", config, *folders)
    assert done.returncode == 1
    assert done.stderr == f"mmd-generator: {config}/mmd.yaml:3: models.b.vrma: unknown key (did you mean vram?)\n"
    assert (folders[0] / "mmd-model-a@.service").exists()
    assert list(folders[1].iterdir()) == list(folders[2].iterdir()) == []


def test_dry_run(config: Path) -> None:
    done = generator("--config-dir", config, "--dry-run")
    assert done.returncode == 0
    assert "# /mmd-model-a@.service\n# Made by mmd-generator(8)" in done.stdout
    assert "# /sockets.target.wants/mmd-gateway.socket -> ../mmd-gateway.socket\n" in done.stdout


def test_user(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/run/user/1000"}
    done = generator("--user", tmp_path / "out", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "out").exists()
    (tmp_path / ".config/mmd").mkdir(parents=True)
    (tmp_path / ".config/mmd/mmd.yaml").write_text(GOOD)
    for argv in (["--user", "--dry-run"], ["--dry-run"]):
        scope = {} if "--user" in argv else {"SYSTEMD_SCOPE": "user"}
        done = generator(*argv, **environment, **scope)
        assert done.returncode == 0
        assert "User=" not in done.stdout
        assert f"SourcePath={tmp_path}/.config/mmd/mmd.yaml" in done.stdout


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    done = generator("--config-dir", tmp_path / "none", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "no such file" in done.stderr
    assert (tmp_path / "out/mmd-gateway.socket").exists()


def test_a_folder_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = generator("--config-dir", config, "--output", tmp_path / "file")
    assert done.returncode == 1
    assert f"{tmp_path}/file: cannot be made: File exists" in done.stderr


def test_a_unit_that_cannot_be_written_keeps_no_other_from_it(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "mmd-admin.socket").mkdir(parents=True)
    (out / "sockets.target.wants/mmd-admin.socket").mkdir(parents=True)
    done = generator("--config-dir", config, "--output", out)
    assert done.returncode == 1
    assert "mmd-admin.socket: cannot be written: Is a directory" in done.stderr
    assert "sockets.target.wants/mmd-admin.socket: cannot be linked: Is a directory" in done.stderr
    assert (out / "mmd-model-a@.service").exists()


@pytest.mark.parametrize(
    "argv", [[], ["--output"], ["--nonsense"], ["a", "b"], ["--dry-run", "a"], ["--dry-run", "--output", "x"]]
)
def test_wrong_arguments(argv: list[str]) -> None:
    done = generator(*argv)
    assert done.returncode == 2
    assert "usage: mmd-generator" in done.stderr


def test_help() -> None:
    assert generator("--help").stdout.startswith("usage: mmd-generator")


def test_imports_are_few(config: Path) -> None:
    """What would cost the 60 ms: dataclasses, argparse, jsonschema, OpenSSL, whatever asks the network or the name service."""
    path = [str(Path(mmd.__file__).parents[1]), *sys.path]
    code = "import sys; from mmd.generator import main; main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-IBS", "-c", f"import sys; sys.path[:0] = {path!r}\n{code}", "--config-dir", config, "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {
        "asyncio",
        "argparse",
        "dataclasses",
        "inspect",
        "jsonschema",
        "_ssl",
        "_hashlib",
        "socket",
        "pwd",
        "subprocess",
        "logging",
        "json",
        "difflib",
    }
    assert heavy & set(done.stderr.split()) == set()


def test_the_fingerprint_follows_what_runs() -> None:
    def fingerprint(text: str, gpus: Gpus | None = None) -> str:
        config = load_text(text).config
        return definition(config.models["a"], gpus=gpus or config.gpus)

    base = fingerprint(GOOD)
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert fingerprint("\n\n# moved\n" + GOOD) == base
    assert fingerprint("models: {a: {gpus: 0, priority: 5, aliases: [x]}}") == base
    assert fingerprint("models: {a: {gpus: 0, args: [--x]}}") != base
    assert fingerprint("models: {a: {gpus: 0, limits: {cpu_weight: 5}}}") != base
    model = load_text(GOOD).config.models["a"]
    text = model_unit(model, gpus=Gpus(), scope=Scope.system(), bin_dir="/x")
    assert f"--definition {base} \\\n" in text
    moved = model._replace(source=Path("/elsewhere.yaml"), line=7)
    assert definition(moved, gpus=Gpus()) == base


_OTHER: dict[str, Any] = {
    "name": "b", "id": "b", "engine": EngineKind.COMMAND, "aliases": ("x",), "profile": "p", "model": "/m", "venv": Path("/v"),
    "args": ("--x",), "env": {"A": "b"}, "secrets": {"A": Path("/x")}, "gpus": 1,
    "vram_bytes": 1 << 30, "params": 7e9, "precision": "fp8", "ram_bytes": 5,
    "resources": {"r": 1.0}, "sleep_level": 0, "idle": Idle(5.0), "replicas": Replicas(1, 2),
    "wake_on_request": False, "pin": True, "preload": True,
    "priority": 3, "concurrency": 4, "queue_limit": 3,
    "health": Health("/h"), "restart_on_connection_failure": False,
    "port": "/p", "port_protocol": PortProtocol.TCP, "lora": {"l": "/l"}, "filters": Filters(("f",)), "limits": Limits(5),
    "description": "d", "url": "u", "command": ("/c",), "workdir": Path("/w"), "listen": Listen.UNIX, "listen_port": 5,
    "stop_command": ("/s",), "endpoint": "http://127.0.0.1:1", "sim": Sim(9.0), "user": "u", "source": Path("/s"), "line": 3,
}  # fmt: skip


@pytest.mark.parametrize("engine", [EngineKind.VLLM, EngineKind.SIM, EngineKind.COMMAND])
@pytest.mark.parametrize("key", Model._fields)
def test_whatever_changes_the_unit_changes_the_fingerprint(key: str, engine: EngineKind) -> None:
    def text(model: Model) -> str:
        lines = model_unit(model, gpus=Gpus(), scope=Scope.system(), bin_dir="/x").splitlines()
        kept = (line for line in lines if not line.startswith(("#", "SourcePath=")))
        return re.sub("--definition [0-9a-f]+", "", "\n".join(kept))

    model = Model(name="a", id="a", engine=engine, command=("/bin/true",), model="/m0", gpus=1, vram_bytes=2 << 30)
    other = model._replace(**{key: _OTHER[key]})
    if text(model) != text(other):
        assert definition(model, gpus=Gpus()) != definition(other, gpus=Gpus())


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units of all examples, with programs that exist."""
    folder = tmp_path_factory.mktemp("units")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("mmd-runner", "mmd-gateway", "python"):
        (programs / name).symlink_to("/bin/true")
    for file in EXAMPLES:
        config = load_text(file.read_text(), file=file).config
        units = render_units(config, scope=Scope.system(), bin_dir=str(programs))
        assert units.problems == ()
        for name, text in units.files.items():
            (folder / name).write_text(text)
    user = (ROOT / "units/mmd-user@.service").read_text().replace("/usr/lib/mmd/bin", str(programs))
    (folder / "mmd-user@.service").write_text(user)
    (folder / "mmd-gateway.service").write_text(f"[Service]\nExecStart={programs}/mmd-gateway\n")
    return folder


def test_systemd_has_no_complaints(rendered: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(rendered.glob("mmd-*"))], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_models_are_sandboxed(rendered: Path) -> None:
    for unit in sorted(rendered.glob("mmd-model-*@.service")):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=30", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{unit.name}: {done.stdout[-200:]}"
