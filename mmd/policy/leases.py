"""Leases: which instances other processes (the gateway's workers) may admit requests to without asking.

A lease stands while every request for the model would be let in at once. Whatever is to happen to an instance, its lease ends
first: it is recalled, and nothing is done before all who hold it have said that they admit no more. So the scheduler never acts
on an instance that somebody is just sending a request to; requests let in before are counted (`Instance.elsewhere`).
"""

from mmd.names import UnitName
from mmd.policy.actions import Action, Lend, Recall
from mmd.policy.events import Surveyed
from mmd.policy.instance import Instance
from mmd.policy.state import State

__all__ = ["learn_survey", "lend_and_recall", "returned"]


def lend_and_recall(state: State) -> list[Action]:
    """Lend what may be lent, recall what may not be lent any more."""
    actions: list[Action] = []
    for unit in sorted(state.lent - state.recalled):
        instance = state.instances.get(unit)
        if instance is None or not _lendable(state, instance):
            state.recalled.add(unit)
            actions.append(Recall(unit))
    if state.lending:
        for instance in state.instances.values():
            if instance.unit not in state.lent and _lendable(state, instance):
                state.lent.add(instance.unit)
                actions.append(Lend(instance.unit))
    return actions


def _lendable(state: State, instance: Instance) -> bool:
    """Whether workers need not ask. For a model with a limit of requests in flight they must."""
    model = instance.model
    if model is None or model.concurrency or model.name in state.queues or state.paused:
        return False
    return instance.usable and instance.release is None and instance.stale_since is None and not instance.wanted


def returned(state: State, unit: UnitName) -> None:
    """A recalled lease has ended everywhere."""
    state.lent.discard(unit)
    state.recalled.discard(unit)
    instance = state.instances.get(unit)
    if instance is not None:
        instance.wanted = False


def learn_survey(state: State, survey: Surveyed, now: float) -> None:
    """Take over what the holders of leases did."""
    for unit, tally in survey.tallies.items():
        instance = state.instances.get(unit)
        if instance is None:
            continue
        instance.elsewhere = tally.in_flight
        instance.last_activity = max(instance.last_activity, tally.last_activity)
        if tally.arrived and instance.model is not None:
            state.traffic_of(instance.model.name).count(now, tally.arrived)
