"""Trials of models that are new: whether a definition works is known when an engine started by it has answered a request.

Until then a model is pending. It is started by the first request, or by a trial, which nobody waits for and which therefore
takes free memory only. What is known of a definition is its lesson, and is forgotten with that.
"""

from mmd.config import EngineKind, Model
from mmd.policy.activation import demands, not_before, promise
from mmd.policy.admission import misfit_of
from mmd.policy.events import Phase
from mmd.policy.instance import Failures
from mmd.policy.placing import plan
from mmd.policy.state import State

__all__ = ["begin", "make_claims", "verified"]


def verified(state: State, model: Model) -> bool:
    """Whether an engine has been ready with the present definition."""
    if model.engine is EngineKind.EXTERNAL or state.lesson_of(model.name).start_s is not None:
        return True
    up = (i for i in state.instances_of(model) if i.phase in (Phase.READY, Phase.SLEEPING))
    return any(i.stale_since is None for i in up)


def begin(state: State, name: str) -> None:
    """Try a model, which may have failed before."""
    model = state.config.models.get(name)
    if model is not None and not verified(state, model):
        state.failures.pop(name, None)
        state.trials.add(name)


def make_claims(state: State, now: float) -> None:
    """Claim free memory for the trials that have not begun; forget those that have come to an end.

    While somebody waits for memory there is none to spare for a trial.
    """
    free = not (state.trials and demands(state, now))
    for name in sorted(state.trials - state.claims.keys()):
        model = state.config.models[name]
        misfit = misfit_of(state, model)
        if verified(state, model):
            state.trials.discard(name)
        elif misfit is not None and misfit.retry_after_s is None:
            state.trials.discard(name)
            state.failures[name] = Failures(0, now, now, misfit.words, ())
        elif free and misfit is None and now >= not_before(state, model) and not _there(state, model):
            promise(state, plan(state, model, now, impatient=False, evict=False))


def _there(state: State, model: Model) -> bool:
    """Whether an instance is coming, or one by an older definition has yet to leave."""
    return any(i.changing or i.phase is not Phase.FAILED for i in state.instances_of(model))
