"""A gateway's configuration in a folder, and a watch on that as mmd-reload.path has."""

import asyncio

from mmd.config import EngineKind
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.workers.staff import Staff
from mmd.load import load
from mmd.scope import Scope
from mmd.units import definition

__all__ = ["ConfigWatch"]

_GLANCE_S = 0.02


class ConfigWatch:
    """Has the gateway read its configuration whenever models.d changes, while it is `on`."""

    def __init__(self, dispatcher: Dispatcher, staff: Staff | None, scope: Scope) -> None:
        self.on = True
        self._dispatcher = dispatcher
        self._staff = staff
        self._scope = scope

    def reload(self) -> None:
        config = load(self._scope).config
        known = {m.name: definition(m, gpus=config.gpus) for m in config.models.values() if m.engine is not EngineKind.EXTERNAL}
        self._dispatcher.reconfigure(config, known, 1 << 40)
        if self._staff is not None:
            self._staff.configure(config)

    def _files(self) -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in (self._scope.config_dir / "models.d").glob("*.yaml"))

    async def watch(self) -> None:
        seen = self._files()
        while True:
            await asyncio.sleep(_GLANCE_S)
            if self.on and (now := self._files()) != seen:
                seen = now
                self.reload()
