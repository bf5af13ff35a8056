"""How much each key may ask for in a minute. One bucket a key and kind, so memory is bounded by the keys."""

import time
from collections.abc import Callable, Iterable

from app.errors import InvalidRequest, RateLimited
from app.keys import Key

_MINUTE = 60.0

Clock = Callable[[], float]


class TokenBucket:
    """Holds a minute's worth at most, and fills evenly. Lives on the event loop."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._filled = float(per_minute), clock()

    def wait_seconds(self, amount: int) -> float:
        """How long until so much can be taken; 0 when it can be now, infinite when never."""
        if amount > self.per_minute:
            return float("inf")
        return max(0.0, (amount - self._fill()) * _MINUTE / self.per_minute)

    def take(self, amount: int) -> None:
        """Ask `wait_seconds` first."""
        self._level = self._fill() - amount

    def _fill(self) -> float:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._filled) * self.per_minute / _MINUTE)
        self._filled = now
        return self._level


class Quotas:
    """The buckets of all keys that have limits."""

    def __init__(
        self, keys: Iterable[Key], requests: int, characters: int, clock: Clock = time.monotonic
    ) -> None:
        self._buckets: dict[str, dict[str, TokenBucket]] = {}
        for key in keys:
            asked = {"requests": (key.requests, requests), "characters": (key.characters, characters)}
            limits = {kind: usual if own is None else own for kind, (own, usual) in asked.items()}
            self._buckets[key.name] = {
                kind: TokenBucket(limit, clock) for kind, limit in limits.items() if limit
            }

    def charge(self, key: Key, n_characters: int) -> None:
        """Take one request and its characters, both or none.

        Raises RateLimited, and InvalidRequest for what would be too much at any time.
        """
        amounts = {"requests": 1, "characters": n_characters}
        buckets = self._buckets[key.name]
        for kind, bucket in buckets.items():
            seconds = bucket.wait_seconds(amounts[kind])
            if seconds == float("inf"):
                raise InvalidRequest(
                    f"the request has {amounts[kind]} {kind}, the limit of this key is "
                    f"{bucket.per_minute} a minute"
                )
            if seconds:
                raise RateLimited(seconds, f"the limit of this key is {bucket.per_minute} {kind} a minute")
        for kind, bucket in buckets.items():
            bucket.take(amounts[kind])
