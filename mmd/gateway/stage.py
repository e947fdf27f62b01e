"""What a model is doing, in one word."""

from collections.abc import Mapping

from mmd.config import EngineKind, Model
from mmd.policy.actions import Sleep, Start, Stop, Wake
from mmd.policy.events import Phase
from mmd.policy.instance import Instance
from mmd.policy.state import State
from mmd.policy.trial import verified
from mmd.status import ModelState

__all__ = ["instance_state", "model_state"]

_STATES: Mapping[Phase, ModelState] = {
    Phase.STARTING: ModelState.STARTING,
    Phase.READY: ModelState.READY,
    Phase.SLEEPING: ModelState.SLEEPING,
    Phase.STOPPING: ModelState.STOPPING,
    Phase.FAILED: ModelState.FAILED,
    Phase.STOPPED: ModelState.STOPPED,
}

# Of several instances the one that serves best speaks for the model.
_BEST_FIRST = (
    ModelState.READY,
    ModelState.DRAINING,
    ModelState.WAKING,
    ModelState.STARTING,
    ModelState.SLEEPING,
    ModelState.STOPPING,
    ModelState.FAILED,
)


def instance_state(instance: Instance) -> ModelState:
    match instance.pending:
        case Start():
            return ModelState.STARTING
        case Wake():
            return ModelState.WAKING
        case Sleep():
            return ModelState.DRAINING
        case Stop():
            return ModelState.STOPPING
    if instance.phase is Phase.READY and not instance.gate_open:
        return ModelState.DRAINING
    return _STATES[instance.phase]


def model_state(state: State, model: Model) -> ModelState:
    if model.engine is EngineKind.EXTERNAL:
        return ModelState.EXTERNAL
    states = {instance_state(instance) for instance in state.instances_of(model)}
    best = next((candidate for candidate in _BEST_FIRST if candidate in states), ModelState.STOPPED)
    failures = state.failures.get(model.name)
    if best is not ModelState.STOPPED:
        return best
    proven = verified(state, model)
    if failures and (failures.final or not proven):
        return ModelState.FAILED
    return best if proven else ModelState.PENDING
