"""What mmd knows of each engine, as data: how it is started, when it is healthy, how it sleeps and wakes.

Everything here is pure. The unit generator asks for the command, the runner for health, progress and failures, the gateway for
the HTTP calls that put an engine to sleep and wake it. One module per engine; `engine(kind)` finds it.
"""

from functools import cache

from mmd.config import EngineKind
from mmd.engines.base import Engine

__all__ = ["engine"]


@cache
def engine(kind: EngineKind) -> Engine:
    """What mmd knows of engine `kind`. Imported on demand: a runner needs one of them only."""
    from importlib import import_module

    found: Engine = import_module(f"mmd.engines.{kind}").ENGINE
    return found
