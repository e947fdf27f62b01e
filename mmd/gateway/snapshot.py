"""The gateway's state as people and programs see it: scheduler, systemd and measurements put together as `mmd.status`."""

import math
import os
import time
from collections.abc import Iterator

from mmd import __version__
from mmd.config import Config, Model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.gauges import Gauges
from mmd.gateway.memory import Memory
from mmd.gateway.outcome import held_bytes
from mmd.gateway.reckoning import reckoning
from mmd.gateway.stage import instance_state, model_state
from mmd.load import Loaded
from mmd.names import UnitName
from mmd.policy.events import Phase
from mmd.policy.instance import Instance
from mmd.policy.ledger import RAM, plus
from mmd.policy.state import State
from mmd.registry import revision
from mmd.sizes import vram_bytes
from mmd.status import GatewayStatus, GpuStatus, InstanceStatus, ModelStatus, ResourceStatus, Status

__all__ = ["Snapshot"]


class Snapshot:
    """Takes pictures. Times in the scheduler are monotonic; they leave here as Unix seconds."""

    def __init__(self, dispatcher: Dispatcher, memory: Memory, gauges: Gauges, *, scope: str) -> None:
        self._dispatcher = dispatcher
        self._memory = memory
        self._gauges = gauges
        self._scope = scope
        self._pid = os.getpid()
        self._since = time.time()
        self.workers = 1
        self.reloaded: float | None = None
        self.problems: tuple[str, ...] = ()
        self.key_problems: tuple[str, ...] = ()
        self.keys_asked_for = False
        self.loaded = Loaded(Config())
        """The configuration in use, for its warnings."""
        self.systemd = "connected"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the configuration in use permits, and is probably not meant."""
        return tuple(map(str, self.loaded.warnings_where(keys_asked_for=self.keys_asked_for)))

    def status(self) -> Status:
        self._dispatcher.survey()
        state = self._dispatcher.scheduler.state
        names = {model.id for model in state.config.models.values()}
        orphans = [instance for unit, instance in sorted(state.instances.items()) if unit.id not in names]
        models = [self.model(model) for model in state.config.models.values()]
        models += [self._orphan(orphan) for orphan in orphans]
        return Status(self._gateway(state), self._gpus(state), tuple(models), tuple(self._resources(state)))

    def _gateway(self, state: State) -> GatewayStatus:
        return GatewayStatus(
            version=__version__,
            pid=self._pid,
            since=self._since,
            listen=state.config.gateway.listen,
            scope=self._scope,
            in_flight=len(state.admitted) + sum(i.elsewhere for i in state.instances.values()),
            waiting=len(state.waiting),
            workers=self.workers,
            systemd=self.systemd,
            reloaded=self.reloaded,
            problems=self.problems + self.key_problems,
            warnings=self.warnings,
            gpu_problem=self._memory.problem,
        )

    def _gpus(self, state: State) -> tuple[GpuStatus, ...]:
        budget, free = state.budget(), state.free_now()
        return tuple(
            GpuStatus(
                index=gpu.index,
                name=gpu.name,
                uuid=gpu.uuid,
                total_bytes=gpu.total_bytes,
                budget_bytes=int(budget.get(gpu.index, 0)),
                reserved_bytes=int(budget.get(gpu.index, 0) - free.get(gpu.index, 0)),
                used_bytes=gpu.used_bytes,
            )
            for gpu in self._memory.gpus
        )

    def _resources(self, state: State) -> Iterator[ResourceStatus]:
        models, declared = state.config.models.values(), state.config.resources
        budgets, held = state.budget(), plus(instance.holds() for instance in state.instances.values())
        written = (declared.amounts, *(model.resources for model in models))
        as_size = {name for amounts in written for name, amount in amounts.items() if isinstance(amount, int)}
        uses_ram = math.isfinite(budgets[RAM]) and (RAM in held or any(model.ram_bytes for model in models))
        for name in (*((RAM,) if uses_ram else ()), *declared.names):
            unread = name in declared.commands and name not in state.gauged
            budget = None if unread or math.isinf(budgets[name]) else budgets[name]
            reserved = held.get(name, 0)
            free = None if budget is None else budget - reserved
            in_bytes = name == RAM or name in as_size | self._gauges.sizes
            problem = self._gauges.problems.get(name, "")
            yield ResourceStatus(name, budget, reserved, free, in_bytes, problem)

    def model(self, model: Model) -> ModelStatus:
        state = self._dispatcher.scheduler.state
        instances = state.instances_of(model)
        traffic = state.traffic.get(model.name)
        # A failure that an earlier gateway saw is not counted, but its unit still tells.
        failed = state.failures.get(model.name) or next((i for i in instances if i.phase is Phase.FAILED), None)
        last = max((i.last_activity for i in instances), default=0.0)
        return ModelStatus(
            name=model.name,
            id=model.id,
            engine=model.engine,
            state=model_state(state, model),
            aliases=model.aliases,
            description=model.description,
            url=model.url or "",
            port=model.port or "",
            port_protocol=str(model.port_protocol) if model.port else "",
            instances=tuple(self._instance(instance) for instance in sorted(instances, key=lambda i: i.unit)),
            vram_bytes=vram_bytes(model),
            gpus=model.gpu_count,
            revision=revision(model),
            reckoning=reckoning(state, model),
            in_flight=sum(i.load for i in instances),
            waiting=len(state.queues.get(model.name, ())),
            requests=traffic.requests if traffic else 0,
            pinned=state.is_pinned(model),
            last_activity=_unix(last) if last else None,
            reason=failed.reason if failed else "",
            tail=failed.tail if failed else (),
        )

    def _orphan(self, instance: Instance) -> ModelStatus:
        """A unit that runs although no configured model has its id; it is stopped as soon as it is idle."""
        return ModelStatus(
            name=instance.model.name if instance.model else instance.unit.id,
            id=instance.unit.id,
            engine=instance.model.engine if instance.model else "",
            state=instance_state(instance),
            description="no longer configured",
            instances=(self._instance(instance),),
            in_flight=instance.load,
        )

    def _instance(self, instance: Instance) -> InstanceStatus:
        unit = instance.unit
        seen = self._dispatcher.lifecycle.units.get(unit)
        return InstanceStatus(
            unit=str(unit),
            placement=str(unit.placement),
            state=instance_state(instance),
            since=_unix(instance.since),
            sleep_level=instance.level,
            status=seen.status_text if seen else "",
            vram_bytes=held_bytes(instance),
            in_flight=instance.load,
            pid=seen.main_pid if seen else 0,
            stale=instance.stale_since is not None,
        )

    def status_text(self, unit: UnitName) -> str:
        """What the runner last said of itself."""
        seen = self._dispatcher.lifecycle.units.get(unit)
        return seen.status_text if seen else ""


def _unix(monotonic_s: float) -> float:
    return time.time() - (time.monotonic() - monotonic_s)
