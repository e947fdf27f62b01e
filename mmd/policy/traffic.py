"""How often a model is asked for."""

import math
from dataclasses import dataclass

__all__ = ["Traffic"]

# Half-life of the request rate: long against a swap (seconds), short against a working day.
_RATE_WINDOW_S = 300.0
_RATE_OF_ONE = math.log(2) / _RATE_WINDOW_S


@dataclass(slots=True)
class Traffic:
    requests: int = 0
    _rate: float = 0.0
    _at: float = 0.0

    def rate(self, now: float) -> float:
        """Requests per second over the last minutes: for comparing models, since it is too low while it builds up."""
        return self._rate * math.exp2((self._at - now) / _RATE_WINDOW_S)

    def count(self, now: float) -> None:
        """A request has come."""
        self._rate = self.rate(now) + _RATE_OF_ONE
        self._at = now
        self.requests += 1
