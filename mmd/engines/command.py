"""Any program that serves a TCP port or a Unix socket: started and stopped, never put to sleep."""

import re
from collections.abc import Mapping

from mmd.config import Model
from mmd.engines.base import CommandContext, HttpCall, ProgressPattern
from mmd.errors import MmdError

__all__ = ["ENGINE", "Command"]


class Command:
    """See `mmd.engines.base.Engine`."""

    __slots__ = ()

    progress: tuple[ProgressPattern, ...] = ()
    out_of_memory: re.Pattern[str] | None = re.compile(r"out of memory|OutOfMemoryError", re.IGNORECASE)
    uses_socket: bool = False
    can_sleep: bool = False
    sleeping: HttpCall | None = None

    def command(self, model: Model, context: CommandContext) -> tuple[str, ...]:
        """The model's `command` and `args`. `{socket}`, `{model}` and `{id}` are expanded here; `{port}` and `{gpus}`, which
        are not known yet, by the runner."""
        if not model.command:
            raise MmdError(
                f"{model.source}: models.{model.name}: engine `command` needs a `command`",
                hint='such as command: ["/opt/server", "--port", "{port}"]',
            )
        macros = {"{socket}": context.socket, "{model}": model.model or model.name, "{id}": model.id}
        return tuple(_expand(word, macros) for word in (*model.command, *model.args))

    def environment(self, model: Model, context: CommandContext) -> Mapping[str, str]:
        return {"HOME": context.cache_dir, "XDG_CACHE_HOME": context.cache_dir}

    def warm_up(self, model: str) -> HttpCall | None:
        return None

    def sleep(self, level: int) -> tuple[HttpCall, ...]:
        raise MmdError("engine `command` cannot sleep")

    def wake(self, level: int) -> tuple[HttpCall, ...]:
        raise MmdError("engine `command` cannot sleep")

    def residual_bytes(self, model: Model, level: int) -> int:
        return 0

    def host_bytes(self, model: Model, level: int) -> int:
        return 0


def _expand(word: str, macros: Mapping[str, str]) -> str:
    for macro, value in macros.items():
        word = word.replace(macro, value)
    return word


ENGINE = Command()
