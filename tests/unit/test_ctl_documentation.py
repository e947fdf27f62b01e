"""The manual page and the completions of mmdctl name every command and option of its parser, and no others."""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmd.ctl.main import parser

ROOT = Path(__file__).parents[2]
MAN = ROOT / "man/mmdctl.1.scd"
BASH = ROOT / "packaging/completions/mmdctl.bash"
ZSH = ROOT / "packaging/completions/_mmdctl"
COMMON = {"-h", "--help", "--user", "--socket"}


def below(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands that a parser chooses from."""
    return next((dict(action.choices) for action in of._actions if isinstance(action, argparse._SubParsersAction)), {})


def commands() -> dict[str, argparse.ArgumentParser]:
    """By what is typed, such as `keys add`; without what only chooses between others, such as `keys`."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, command in below(parser()).items():
        found |= {f"{name} {other}": inner for other, inner in below(command).items()} or {name: command}
    return found


def options(of: argparse.ArgumentParser) -> set[str]:
    return {option for action in of._actions for option in action.option_strings}


def described() -> Iterator[tuple[str, str]]:
    """The commands in the manual page, each with its synopsis."""
    for line in MAN.read_text().splitlines():
        match = re.match(r"\*([a-z]+(?: [a-z]+)?)\*( |$)", line)
        if match and not match[1].startswith("mmdctl"):  # the synopsis of the whole, or prose
            yield match[1], line


@pytest.mark.parametrize("page", ["mmdctl.1", "mmd-gateway.8", "mmd-api-keys.5"])
def test_manual_pages_build(page: str) -> None:
    result = subprocess.run(["scdoc"], input=(ROOT / f"man/{page}.scd").read_bytes(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b".")


def test_the_manual_page_has_every_command_with_its_options() -> None:
    pages = dict(described())
    assert pages.keys() == commands().keys()
    for name, command in commands().items():
        written = set(re.findall(r"\*(--?[a-z-]+)\*", pages[name]))
        own = [set(action.option_strings) - COMMON for action in command._actions]
        assert written <= set().union(*own), name
        # Of an option's two forms, one is enough.
        assert all(written & forms for forms in own if forms), name


def test_the_manual_page_explains_every_option() -> None:
    text = MAN.read_text()
    everything = options(parser()).union(*map(options, commands().values()))
    explained = {
        option for line in text.splitlines() if re.match(r"\t*\*-", line) for option in re.findall(r"\*(--?[a-z-]+)\*", line)
    }
    assert explained == everything


def complete(*words: str) -> set[str]:
    """What bash offers after `words`, the last of which is being typed."""
    script = f'source {BASH}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mmdctl; printf "%s\\n" "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


def test_bash_completes_every_command_and_option() -> None:
    assert complete("mmdctl", "") == below(parser()).keys() | options(parser())
    assert complete("mmdctl", "--user", "sta") == {"status", "start"}
    for name, command in commands().items():
        assert complete("mmdctl", *name.split(), "-") == options(command), name
    for name, group in below(parser()).items():
        if below(group):
            assert complete("mmdctl", name, "") == below(group).keys()
            assert complete("mmdctl", name, "-") == options(group)
    assert complete("mmdctl", "sleep", "--level", "") == {"1", "2"}
    assert complete("mmdctl", "keys", "add", "ci", "--scope", "") == {"use", "read", "admin"}
    assert complete("mmdctl", "keys", "revoke", "") == set()


def test_bash_completes_names_of_models_untouched(tmp_path: Path) -> None:
    program = tmp_path / "mmdctl"
    program.write_text(f"#!/bin/sh\necho \"$*\" > {tmp_path}/asked; echo 'demo/$(id)'; echo demo/b; echo other\n")
    program.chmod(0o755)
    assert complete(str(program), "--user", "start", "demo/") == {"demo/$(id)", "demo/b"}
    assert (tmp_path / "asked").read_text() == "--user list --quiet\n"
    assert complete(str(program), "keys", "add", "ci", "--models", "o") == {"other"}


def test_zsh_completes_every_command_and_option() -> None:
    text = ZSH.read_text()
    assert set(re.findall(r"^        ['\"]([a-z]+):", text, re.MULTILINE)) == {
        word for name, group in below(parser()).items() for word in (name, *below(group))
    }
    everything = options(parser()).union(*map(options, commands().values()))
    assert set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)(?=[\[},])", text)) == everything
    zsh = shutil.which("zsh")
    assert zsh is None or subprocess.run([zsh, "-n", str(ZSH)], check=False).returncode == 0
