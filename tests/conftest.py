"""How the tests are shared out when tests/run runs all of them: two processes, of which one has a real systemd to itself."""

import pytest

_WITH_SYSTEMD = {"integration", "vllm"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        real = _WITH_SYSTEMD.intersection(item.path.parts)
        item.add_marker(pytest.mark.xdist_group("system" if real else str(item.path)))
