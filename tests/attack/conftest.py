"""One installation of mmd in a real systemd, which all attacks share: a boot costs more than most of them.

A test configures the models that it needs (`installed.configure`), and leaves nothing running that another would stumble over.
Attacks are made as those make them who would: a hostile engine (engine `command`), a member of `mmd-admin`, a local user, a web
page, a careless operator. The marker `attack` keeps slow ones out of CI: `tests/run --attack` runs them.

It also runs each of them a second time in the root of Debian 13 (`make-root`): systemd 257 asks polkit with other details.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Installation, prepared_layer

SYSTEMS: dict[str, Path | None] = {"host": None}
"""Roots by name; None is this machine's."""
if "MMD_ATTACK_ROOT" in os.environ:
    SYSTEMS["debian-13"] = Path(os.environ["MMD_ATTACK_ROOT"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "installation" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.system)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the environment before the first test: downloads and the compiler may take longer than a test may."""
    wanted = any(item.get_closest_marker("system") for item in session.items)
    if wanted and os.geteuid() == 0 and not session.config.option.collectonly:
        for system in SYSTEMS.values():
            prepared_layer(system)


@pytest.fixture(scope="session", params=SYSTEMS)
def installation(request: pytest.FixtureRequest) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("a private systemd needs root")
    with Installation(system=SYSTEMS[request.param]) as installation:
        installation.run("useradd", "--create-home", "eve")  # a local user with no rights at all
        installation.run("useradd", "--create-home", "--groups", "mmd-admin", "mallory")  # a hostile member of mmd-admin
        yield installation


@pytest.fixture
def installed(installation: Installation) -> Iterator[Installation]:
    """The installation, with the test in its network."""
    with installation.network():
        yield installation
