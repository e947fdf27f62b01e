"""A unit of the attacker's own content with the name of a model's unit: StartTransientUnit of org.freedesktop.systemd1(5).

systemd 257 asks polkit for it with the `unit` and `verb` of StartUnit, so a rule that goes by the names of models' units grants
it. polkit is not told what the unit runs, and as which user.
"""

import re
import subprocess

import pytest
from testbed import Installation

_PROOF = "/root/was-here"
_KINDS = {
    "service": ("--wait",),
    "timer": ("--on-active=0", "--timer-property=AccuracySec=1ms"),
    "path": ("--path-property=PathExists=/",),
}
"""What starts the unit; systemd-run makes a timer or path unit of the same name as well."""


def attempt(installed: Installation, user: str | None, kind: str) -> subprocess.CompletedProcess[str]:
    """A unit that runs as root, by systemd-run as `user`; None is root."""
    command = ["systemd-run", "--no-ask-password", "--collect", "--unit=mmd-model-evil@0", *_KINDS[kind]]
    return installed.run(*command, "--property=User=root", "touch", _PROOF, user=user, check=False)


@pytest.fixture(autouse=True)
def without_traces(installed: Installation) -> None:
    installed.systemctl("stop", "mmd-model-evil@0.timer", "mmd-model-evil@0.path", check=False)
    installed.run("rm", "-f", _PROOF)


@pytest.mark.parametrize("kind", _KINDS)
def test_root_makes_such_a_unit(installed: Installation, kind: str) -> None:
    """The commands work, so a refusal is one of polkit's."""
    done = attempt(installed, None, kind)
    assert done.returncode == 0, done.stderr
    installed.wait_until(lambda: installed.path(_PROOF).exists())


@pytest.mark.parametrize("user", ["mmd", "mmd-fetch", "eve", "mallory"])
@pytest.mark.parametrize("kind", _KINDS)
def test_other_users_make_no_unit(installed: Installation, user: str, kind: str) -> None:
    done = attempt(installed, user, kind)
    assert done.returncode != 0, f"{user} has made a unit that runs as root"
    assert re.search("authentication|access denied|not permitted", done.stderr, re.IGNORECASE), done.stderr
    assert not installed.path(_PROOF).exists()


def test_debian_13_has_its_own_systemd(installation: Installation, request: pytest.FixtureRequest) -> None:
    """So that what passes there was tried on it, not on the host's."""
    version = int(re.findall(r"\d+", installation.systemctl("--version"))[0])
    assert version >= 257 or "debian-13" not in request.node.name
