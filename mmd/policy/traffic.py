"""How often a model is asked for."""

import math
from dataclasses import dataclass

__all__ = ["Traffic"]

# Half-life of the request rate: long against a swap (seconds), short against a working day.
_RATE_WINDOW_S = 300.0
# What one request adds to the rate.
_ONE = math.log(2) / _RATE_WINDOW_S


@dataclass(slots=True)
class Traffic:
    requests: int = 0
    _rate: float = 0.0
    _at: float = 0.0
    _since: float = 0.0
    """Of the first request."""

    def rate(self, now: float) -> float:
        """Requests per second over the last minutes: for comparing models, since it is too low while it builds up."""
        return self._rate * math.exp2((self._at - now) / _RATE_WINDOW_S)

    def mean_rate(self, now: float) -> float:
        """Requests per second over the last minutes, or since the first one if that is less long ago; 0: none yet."""
        seen_s = max(now - self._since, 1.0)
        return self.rate(now) / (1 - math.exp2(-seen_s / _RATE_WINDOW_S))

    def count(self, now: float, requests: int = 1) -> None:
        """Requests have come."""
        if not self.requests:
            self._since = now
        self._rate = self.rate(now) + requests * _ONE
        self._at = now
        self.requests += requests
