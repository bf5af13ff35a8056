"""What every lane has: a bounded door on the event loop's side, turns on the device thread's side."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from app import metrics
from app.engine.errors import Draining, EngineError, Overloaded, RequestTooLarge
from app.engine.scheduler import QueueLimits, fits

log = logging.getLogger("app.engine")

DRAIN_RETRY_SECONDS = 5.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0
_TELLING_ENDS = 8  # so many make a pace

T = TypeVar("T")
R = TypeVar("R")
D = TypeVar("D")
D_contra = TypeVar("D_contra", contravariant=True)


class Receiver(Protocol[D_contra]):
    """A piece of work that takes what the device produced for it, on the event loop."""

    def deliver(self, delivery: D_contra, /) -> None: ...


def check_fits(n_items: int, n_tokens: int, limits: QueueLimits) -> None:
    """Raises `RequestTooLarge` for what would not fit into an empty queue: trying again cannot help."""
    if not fits(n_items, n_tokens, limits):
        raise RequestTooLarge(n_items, n_tokens, limits.max_queue_items, limits.max_queue_tokens)


class Door:
    """Open, or draining; how many are inside; how long the queue is in seconds.

    `max_wait_seconds` bounds what is accepted to what will probably be begun by then.
    Lives on the event loop, all but `draining`, which any thread may set. It is read under the lane's
    lock, so that nothing slips in behind the last look into the queue.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.draining = False
        self.max_wait_seconds = math.inf
        self._clock = clock
        self.n_inside = 0  # accepted, and not yet handed its end
        self._busy_since = 0.0
        self._ends: deque[float] = deque(maxlen=64)
        self._last_pace = 0.0  # seconds an item, from when there was enough to tell

    def check(self) -> None:
        """Raises `Draining` when closed."""
        if self.draining:
            raise Draining(DRAIN_RETRY_SECONDS)

    def enter(self, n_items: int) -> None:
        """Items were accepted."""
        if self.n_inside == 0:  # the pause is no work
            self._busy_since = self._clock()
            self._ends.clear()
        self.n_inside += n_items

    def leave(self) -> None:
        """An item was handed its end."""
        self.n_inside -= 1
        self._ends.append(self._clock())
        if len(self._ends) >= _TELLING_ENDS:
            self._last_pace = self._pace()

    def check_wait(self, n_before: int, n_waiting: int | None = None) -> None:
        """Raises `Overloaded` when the items that come first will take longer than the limit.

        `n_waiting` is how many wait, where some of them come later. An empty lane begins at once, however
        long what is asked for will take.
        """
        if self.n_inside == 0:
            return
        seconds = self._wait_seconds(n_before, n_waiting)
        if seconds > self.max_wait_seconds:
            raise Overloaded(_within_bounds(seconds), f"the queue is {seconds:.0f} seconds long")

    def retry_after(self, n_waiting: int) -> float:
        """Seconds until as many items as wait now have probably ended, between 1 and 60."""
        return _within_bounds(self._wait_seconds(n_waiting))

    def _wait_seconds(self, n_before: int, n_waiting: int | None = None) -> float:
        if self.n_inside and len(self._ends) >= _TELLING_ENDS:  # else the pause would count as work
            return n_before * self._pace()
        # A burst begins with no end to go by: the pace of the last busy time is the best guess. What runs
        # side by side ends side by side, too: the time that one has taken so far is shared by all that run.
        n_running = max(1, self.n_inside - (n_before if n_waiting is None else n_waiting))
        busy = (self._clock() - self._busy_since) if self.n_inside else 0.0
        return n_before * max(busy / (len(self._ends) + n_running), self._last_pace)

    def _pace(self) -> float:
        """Seconds an item, as if one more ended now."""
        since = self._ends[0] if len(self._ends) == self._ends.maxlen else self._busy_since
        return (self._clock() - since) / (len(self._ends) + 1)


def _within_bounds(seconds: float) -> float:
    return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, seconds))


class Handover(Generic[D]):
    """Something for a receiver, carried from the device thread to the event loop.

    A receiver's last one names the door by which it leaves.
    """

    __slots__ = ("_delivery", "_door", "_receiver")

    def __init__(self, receiver: Receiver[D], delivery: D, door: Door | None = None) -> None:
        self._receiver, self._delivery, self._door = receiver, delivery, door

    def complete(self) -> None:
        """On the event loop."""
        if self._door is not None:
            self._door.leave()
        self._receiver.deliver(self._delivery)


Handovers = list[Handover[Any]]


class Failures:
    """A step that raises is counted and logged, and the device is asked whether it still lives."""

    def __init__(self, name: str, model_name: str, responds: Callable[[], bool]) -> None:
        self.name, self.model_name, self._responds = name, model_name, responds
        self.broken = False  # the device answers no more: every later step would fail too

    def note(self, error: Exception, n_items: int) -> bool:
        """Note a failed step over some items; does trying again with fewer of them make sense?"""
        metrics.step_failures_total.labels(self.name, self.model_name).inc()
        self.broken = not self._responds()
        # The halves of a failed step fail in the same way; the last of them tells the whole story.
        story = error if n_items == 1 or self.broken else None
        log.error("%s: a step over %d items failed: %r", self.name, n_items, error, exc_info=story)
        return not self.broken


class Lane(Protocol):
    """The small face that the device worker sees."""

    name: str
    door: Door
    wake: Callable[[], None]  # set by the worker
    failures: Failures

    def tell_before_calls(self, tell: Callable[[], None]) -> bool:
        """Have `tell` called in a turn before the interpreter is free for long; False where it never is."""

    def has_work(self) -> bool:
        """Does anything wait or run? On the device thread."""

    def turn(self) -> Handovers:
        """One step or one batch, on the device thread; what it produced."""

    def fail_all(self, error: Callable[[], EngineError]) -> Handovers:
        """Give up everything that waits or runs, on the device thread, whatever state a turn left behind."""


def halving(
    items: Sequence[T], run: Callable[[Sequence[T]], R], note: Callable[[Exception, int], bool]
) -> tuple[list[R], list[T]]:
    """Run over the items; a failure is tried again in halves, so that only the cause of it fails.

    `note` is told of each failure and its number of items, and says whether trying again makes sense.
    Returns what the runs that succeeded returned, in order, and the items that failed.
    """
    try:
        return [run(items)], []
    except Exception as error:
        again = note(error, len(items))
    # Outside of the handler: the exception keeps alive what the failed attempt had allocated.
    if len(items) == 1 or not again:
        return [], list(items)
    middle = len(items) // 2
    results, failed = halving(items[:middle], run, note)
    more_results, more_failed = halving(items[middle:], run, note)
    return results + more_results, failed + more_failed
