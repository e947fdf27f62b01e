"""Fixtures over a private real systemd; see testbed.py. Tests that use them get the marker `system`."""

import os
from collections.abc import Iterator

import pytest
from testbed import Installation, Testbed, prepared_layer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "root_only" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.system)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the environment before the first test: downloads and the compiler may take longer than a test may."""
    wanted = any(item.get_closest_marker("system") for item in session.items)
    if wanted and os.geteuid() == 0 and not session.config.option.collectonly:
        prepared_layer()


@pytest.fixture(scope="session")
def root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("a private systemd needs root")


@pytest.fixture(scope="module")
def booted(root_only: None) -> Iterator[Testbed]:
    """A bare systemd with the checkout visible at its path; nothing of mmd installed."""
    with Testbed() as testbed:
        yield testbed


@pytest.fixture(scope="module")
def installed(root_only: None) -> Iterator[Installation]:
    """mmd as packaging/up installs it, with a simulated 24 GiB GPU and no models; the module's tests are in its network."""
    with Installation() as installation, installation.network():
        yield installation
