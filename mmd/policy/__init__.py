"""Which models hold which GPU, and who waits: the scheduler, a pure state machine.

Events go in (`mmd.policy.events`), actions come out (`mmd.policy.actions`); there is no clock, no I/O and no asyncio in here.
The same events at the same times give the same actions, which is what makes the policy testable by property and by replay.
"""

from mmd.policy.scheduler import Scheduler

__all__ = ["Scheduler"]
