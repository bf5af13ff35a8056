"""How much each key may ask for in a minute. One bucket a key and kind, so memory is bounded by the keys."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Literal

from app.errors import InvalidRequest, RateLimited
from app.keys import Key

_MINUTE = 60.0

Clock = Callable[[], float]
Kind = Literal["requests", "characters"]


class TokenBucket:
    """Holds a minute's worth at most, and fills evenly. Lives on the event loop."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._filled = float(per_minute), clock()

    def wait_seconds(self, amount: int) -> float:
        """How long until so much can be taken; 0 when it can be now, infinite when never."""
        if amount > self.per_minute:
            return math.inf
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
        self._buckets: dict[str, dict[Kind, TokenBucket]] = {}
        for key in keys:
            asked: dict[Kind, tuple[int | None, int]] = {
                "requests": (key.requests, requests),
                "characters": (key.characters, characters),
            }
            limits = {kind: usual if own is None else own for kind, (own, usual) in asked.items()}
            self._buckets[key.name] = {
                kind: TokenBucket(limit, clock) for kind, limit in limits.items() if limit
            }

    def charge(self, key: Key, kind: Kind, amount: int) -> None:
        """Take so much of a key's minute. Raises RateLimited, and InvalidRequest for what is never there."""
        bucket = self._buckets[key.name].get(kind)
        if bucket is None:
            return
        seconds = bucket.wait_seconds(amount)
        if seconds == math.inf:
            raise InvalidRequest(
                f"the request has {amount} {kind}, the limit of this key is {bucket.per_minute} a minute"
            )
        if seconds:
            raise RateLimited(seconds, f"the limit of this key is {bucket.per_minute} {kind} a minute")
        bucket.take(amount)
