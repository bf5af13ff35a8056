"""What every lane has: a bounded door on the event loop's side, turns on the device thread's side."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from app.engine.errors import Draining, EngineError

DRAIN_RETRY_SECONDS = 5.0


class Lane(Protocol):
    """The small face that the device worker sees."""

    name: str

    def has_work(self) -> bool:
        """Does anything wait or run? Any thread."""

    def turn(self) -> list[Handover]:
        """One step or one batch, on the device thread; what it produced."""

    def fail_all(self, error: EngineError) -> list[Handover]:
        """Give up everything that waits or runs, on the device thread."""

    def begin_drain(self) -> None:
        """Refuse new work from now on; what is accepted goes on. Any thread."""


class Receiver(Protocol):
    """A piece of work that takes what the device produced for it, on the event loop."""

    def deliver(self, delivery: object, /) -> None: ...


class Handover:
    """Something for a receiver, carried from the device thread to the event loop."""

    __slots__ = ("delivery", "receiver")

    def __init__(self, receiver: Receiver, delivery: object) -> None:
        self.receiver, self.delivery = receiver, delivery

    def complete(self) -> None:
        """On the event loop."""
        self.receiver.deliver(self.delivery)


class Door:
    """Open, or draining; and how long a refused client should wait."""

    def __init__(self) -> None:
        self.draining = False
        self._ends: deque[float] = deque(maxlen=64)

    def check(self) -> None:
        """Raises `Draining` when closed."""
        if self.draining:
            raise Draining(DRAIN_RETRY_SECONDS)

    def note_end(self) -> None:
        """An item ended: the pace from which waits are estimated."""
        self._ends.append(time.monotonic())

    def retry_after(self, n_waiting: int) -> float:
        """Seconds until as many items as wait now have probably ended, between 1 and 60."""
        ends = list(self._ends)
        if len(ends) < 2:
            return 1.0
        pace = (time.monotonic() - ends[0]) / len(ends)
        return min(60.0, max(1.0, pace * n_waiting))
