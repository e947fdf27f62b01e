"""Somebody else's server: routed to, never started, stopped or put to sleep."""

import re
from collections.abc import Mapping
from typing import NoReturn

from mmd.config import Model
from mmd.engines.base import CommandContext, HttpCall, ProgressPattern
from mmd.errors import MmdError

__all__ = ["ENGINE", "External"]


class External:
    """See `mmd.engines.base.Engine`."""

    __slots__ = ()

    progress: tuple[ProgressPattern, ...] = ()
    out_of_memory: re.Pattern[str] | None = None
    uses_socket: bool = False
    can_sleep: bool = False
    sleeping: HttpCall | None = None

    def command(self, model: Model, context: CommandContext) -> NoReturn:
        raise MmdError(
            f"{model.source}: models.{model.name}: engine `external` has no command: mmd does not start it",
            hint="start the server at its `endpoint` yourself",
        )

    def environment(self, model: Model, context: CommandContext) -> Mapping[str, str]:
        return {}

    def warm_up(self, model: str) -> HttpCall | None:
        return None

    def sleep(self, level: int) -> NoReturn:
        raise MmdError("engine `external` cannot sleep: mmd does not run it")

    def wake(self, level: int) -> NoReturn:
        raise MmdError("engine `external` cannot sleep: mmd does not run it")

    def residual_bytes(self, model: Model, level: int) -> int:
        return 0

    def host_bytes(self, model: Model, level: int) -> int:
        return 0


ENGINE = External()
