"""One installation of mmd in a real systemd, which all attacks share: a boot costs more than most of them.

A test configures the models that it needs (`installed.configure`), and leaves nothing running that another would stumble over.
Attacks are made as those make them who would: a hostile engine (engine `command`), a member of `mmd-admin`, a local user, a web
page, a careless operator. The marker `attack` keeps slow ones out of CI: `tests/run --attack` runs them.
"""

import os
from collections.abc import Iterator

import pytest
from testbed import Installation, prepared_layer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "installation" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.system)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the environment before the first test: downloads and the compiler may take longer than a test may."""
    wanted = any(item.get_closest_marker("system") for item in session.items)
    if wanted and os.geteuid() == 0 and not session.config.option.collectonly:
        prepared_layer()


@pytest.fixture(scope="session")
def installation() -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("a private systemd needs root")
    with Installation() as installation:
        installation.run("useradd", "--create-home", "eve")  # a local user with no rights at all
        installation.run("useradd", "--create-home", "--groups", "mmd-admin", "mallory")  # a hostile member of mmd-admin
        yield installation


@pytest.fixture
def installed(installation: Installation) -> Iterator[Installation]:
    """The installation, with the test in its network."""
    with installation.network():
        yield installation
