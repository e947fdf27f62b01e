"""Named resources in `mmdctl status`."""

import json
from dataclasses import replace
from pathlib import Path

from mmd.ctl.context import Context
from mmd.ctl.terminal import Terminal
from mmd.ctl.view import overview
from mmd.scope import Scope
from mmd.status import GatewayStatus, GpuStatus, ResourceStatus, Status

GIB = 1 << 30
STATUS = Status(
    GatewayStatus("0.1.0", 1, 0.0),
    gpus=(GpuStatus(0, "Simulated", "", 24 * GIB, 23 * GIB, 14 * GIB, 12 * GIB),),
    resources=(
        ResourceStatus("ram", 60.0 * GIB, 15.0 * GIB, 45.0 * GIB, in_bytes=True),
        ResourceStatus("license", 2.0, 2.0, 0.0),
        ResourceStatus("scratch", 3.5, 4.0, -0.5),
        ResourceStatus(
            "tape", None, 1.0, None, problem="tape-free: exit status 1: no\x1b[31m tape; until it tells, it limits nothing"
        ),
    ),
)


def lines(status: Status) -> list[str]:
    return overview(Context(Scope.system(), Path("x.sock"), Terminal(unicode=True)), status, 10.0)


def test_each_resource_has_a_line_beside_the_gpus() -> None:
    assert [line.rstrip() for line in lines(STATUS)[1:6]] == [
        "GPU 0    Simulated  ██████████░░░░░░░░░░  12.0 / 24.0 GiB  models 14.0 of 23.0 GiB",
        "ram                 █████░░░░░░░░░░░░░░░  15.0 / 60.0 GiB  45.0 GiB free",
        "license             ████████████████████            2 / 2  0 free",
        "scratch             ████████████████████          4 / 3.5  0 free",
        "tape                                                    1  not known what is free",
    ]


def test_what_is_wrong_with_a_gauge_is_a_problem() -> None:
    shown = lines(STATUS)
    problem = "  resource tape: tape-free: exit status 1: no tape; until it tells, it limits nothing"
    assert shown[shown.index("Problems") + 1 :] == [problem]


def test_the_status_of_resources_survives_json() -> None:
    assert Status.from_json(json.loads(json.dumps(STATUS.to_json()))) == STATUS


def test_a_gateway_that_says_nothing_of_resources_is_understood() -> None:
    raw = STATUS.to_json()
    del raw["resources"]
    assert Status.from_json(raw) == replace(STATUS, resources=())
