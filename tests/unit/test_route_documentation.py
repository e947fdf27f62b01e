"""The table of endpoints in the README is that of the gateway, path by path and method by method."""

import re
from pathlib import Path

from mmd.gateway.relay import routing
from mmd.gateway.relay.routing import ROUTES

_README = (Path(__file__).parents[2] / "README.md").read_text()
_METHODS = {"GET", "POST", "DELETE"}


def endpoints(words: str) -> set[tuple[str, str]]:
    """Methods and paths in backquotes: `GET`, `DELETE /a`, `/b` are GET /a, DELETE /a, GET /b and DELETE /b."""
    found: set[tuple[str, str]] = set()
    methods: list[str] = []
    complete = True
    for quoted in re.findall(r"`([^`]+)`", words):
        method, _, path = quoted.rpartition(" ") if "/" in quoted else (quoted, "", "")
        if method:
            methods = [method] if complete else [*methods, method]
            complete = False
        if path:
            found |= {(each, path) for each in methods}
            complete = True
    return found


def rows() -> list[list[str]]:
    section = _README.split("\n## HTTP\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")][1:]


def test_the_table_has_every_route_and_no_other() -> None:
    documented = {each for first, *_ in rows() if "/upstream" not in first for each in endpoints(first)}
    gateway = {
        (method, path)
        for method, path in documented
        if path in {"/v1/models", "/v1/models/NAME", "/health"} or path.startswith("/api/") or "/" not in path
    }
    routes = {(method.decode(), path.decode()) for path, route in ROUTES.items() for method in route.methods - {b"HEAD"}}
    kept = {
        (method.decode(), f"/v1/responses/ID/{action}".rstrip("/"))
        for action, methods in routing._ACTIONS.items()
        for method in methods - {b"HEAD"}
    }
    assert documented - gateway == routes | kept


def test_the_table_has_every_path_that_an_engine_of_ours_may_be_read_by() -> None:
    (words,) = [cells[2] for cells in rows() if "/upstream" in cells[0]]
    assert {path for _, path in endpoints(words)} == {path.decode() for path in routing._READABLE}
