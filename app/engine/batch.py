"""The one-shot lane: token-budget batches through the masked model, for fill-mask and next-sentence."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from app import metrics
from app.engine.errors import Aborted, EngineError, Overloaded, PromptTooLong, StepFailed
from app.engine.lane import Door, Handover
from app.engine.runner import MaskedRunner
from model.checkpoint import Checkpoint

log = logging.getLogger("app.engine")

Filled = list[list[tuple[int, float]]]  # per mask: token ids with scores, best first
BatchResult = Filled | float


@dataclass(frozen=True)
class BatchLimits:
    """The bounds of the lane, in tokens and items."""

    max_item_tokens: int
    max_queue_items: int
    max_queue_tokens: int


@dataclass(eq=False)
class BatchItem:
    """One text with masks, or one pair of sentences.

    `targets` and `allowed` hold an entry per mask. Made and awaited on the event loop.
    """

    token_ids: list[int]
    segment_ids: list[int]
    task: Literal["fill-mask", "next-sentence"]
    top_k: int = 5
    targets: list[list[int] | None] = field(default_factory=list)
    allowed: list[str | None] = field(default_factory=list)
    aborted: bool = False
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None
    _outcome: BatchResult | EngineError | None = None
    _waiter: asyncio.Future[None] | None = None

    @property
    def queue_seconds(self) -> float:
        return (self.started_at or self.ended_at or time.monotonic()) - self.submitted_at

    @property
    def inference_seconds(self) -> float:
        return (self.ended_at or time.monotonic()) - self.started_at if self.started_at else 0.0

    async def result(self) -> BatchResult:
        """What the model says. Raises `EngineError`."""
        if self._outcome is None:
            if self._waiter is None:
                self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiter)
        assert self._outcome is not None
        if isinstance(self._outcome, EngineError):
            raise self._outcome
        return self._outcome

    def deliver(self, delivery: object, /) -> None:
        """On the event loop."""
        assert isinstance(delivery, list | float | EngineError)
        self._outcome = delivery
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class BatchLane:
    """Whatever waits when the device is free is a batch, within `max_batch_tokens` of longest x count."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        *,
        max_batch_tokens: int,
        max_queue_items: int,
        max_queue_tokens: int,
    ) -> None:
        self.name, self.max_batch_tokens = name, max_batch_tokens
        self.runner = MaskedRunner(checkpoint)
        self.mask_id = checkpoint.tokenizer.mask_id
        self.limits = BatchLimits(checkpoint.config.max_len, max_queue_items, max_queue_tokens)
        self.door = Door()
        self.wake: Callable[[], None] = lambda: None  # set by the worker
        self._waiting: list[BatchItem] = []
        self._lock = threading.Lock()

    # On the event loop

    def submit(self, items: list[BatchItem]) -> None:
        """Queue all or nothing. Raises `Draining`, `PromptTooLong` or `Overloaded`."""
        self.door.check()
        for item in items:
            if len(item.token_ids) > self.limits.max_item_tokens:
                raise PromptTooLong(len(item.token_ids), self.limits.max_item_tokens)
        tokens = sum(len(item.token_ids) for item in items)
        with self._lock:
            full = len(self._waiting) + len(items) > self.limits.max_queue_items
            heavy = self._waiting_tokens() + tokens > self.limits.max_queue_tokens
            # A request larger than the whole queue may wait when nothing else does.
            if self._waiting and (full or heavy):
                raise Overloaded(self.door.retry_after(len(self._waiting)))
            self._waiting += items
            self._measure_queue()
        for item in items:
            metrics.prompt_tokens_total.labels(item.task).inc(len(item.token_ids))
        self.wake()

    def abort(self, items: list[BatchItem]) -> None:
        """Give up items; those still waiting are forgotten at the next turn."""
        for item in items:
            item.aborted = True
        self.wake()

    def begin_drain(self) -> None:
        self.door.draining = True

    def has_work(self) -> bool:
        return bool(self._waiting)

    # On the device thread

    def turn(self) -> list[Handover]:
        """One batch; returns its answers."""
        with self._lock:
            departed = [item for item in self._waiting if item.aborted]
            self._waiting = [item for item in self._waiting if not item.aborted]
            batch = choose_batch(self._waiting, self.max_batch_tokens)
            chosen = set(map(id, batch))
            self._waiting = [item for item in self._waiting if id(item) not in chosen]
            self._measure_queue()
        out = [self._ended(item, Aborted()) for item in departed]
        return out + (self._run_halving(batch) if batch else [])

    def fail_all(self, error: EngineError) -> list[Handover]:
        """End everything with an error."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._measure_queue()
        return [self._ended(item, error) for item in waiting]

    def _run_halving(self, batch: list[BatchItem]) -> list[Handover]:
        """A failure is tried again in halves, so that only the cause of it fails."""
        try:
            return self._run(batch)
        except Exception as error:
            log.error("a batch failed", exc_info=error)
            metrics.step_failures_total.labels(self.name).inc()
            if len(batch) == 1:
                return [self._ended(batch[0], StepFailed())]
            middle = len(batch) // 2
            return self._run_halving(batch[:middle]) + self._run_halving(batch[middle:])

    def _run(self, batch: list[BatchItem]) -> list[Handover]:
        now = time.monotonic()
        lengths = [len(item.token_ids) for item in batch]
        for item in batch:
            item.started_at = item.started_at or now
            metrics.queue_seconds.labels(item.task).observe(item.queue_seconds)
        metrics.batch_rows.labels(self.name, "batch").observe(len(batch))
        padding = 1 - sum(lengths) / (max(lengths) * len(batch))
        metrics.batch_padding_ratio.labels(self.name, "batch").observe(padding)
        hidden = self.runner.encode([i.token_ids for i in batch], [i.segment_ids for i in batch])
        follows = self.runner.follows(hidden) if any(i.task == "next-sentence" for i in batch) else None
        results: list[BatchResult] = []
        for row, item in enumerate(batch):
            if item.task == "next-sentence":
                assert follows is not None
                results.append(follows[row])
            else:
                slots = [p for p, token in enumerate(item.token_ids) if token == self.mask_id]
                wishes = zip(slots, item.allowed, item.targets, strict=True)
                results.append(
                    [self.runner.fill(hidden[row, p], a, item.top_k, targets) for p, a, targets in wishes]
                )
        return [self._ended(item, result) for item, result in zip(batch, results, strict=True)]

    def _ended(self, item: BatchItem, outcome: BatchResult | EngineError) -> Handover:
        item.ended_at = time.monotonic()
        if item.started_at is not None:
            metrics.inference_seconds.labels(item.task).observe(item.inference_seconds)
        self.door.note_end()
        return Handover(item, outcome)

    def _waiting_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self._waiting)

    def _measure_queue(self) -> None:
        metrics.queue_items.labels(self.name).set(len(self._waiting))
        metrics.queue_tokens.labels(self.name).set(self._waiting_tokens())


def choose_batch(waiting: list[BatchItem], max_batch_tokens: int) -> list[BatchItem]:
    """The oldest item, and those nearest to it in length while longest x count stays within the budget."""
    if not waiting:
        return []
    oldest = waiting[0]
    size = len(oldest.token_ids)
    batch, longest = [oldest], size
    for item in sorted(waiting[1:], key=lambda other: abs(len(other.token_ids) - size)):
        longest = max(longest, len(item.token_ids))
        if longest * (len(batch) + 1) > max_batch_tokens:
            break
        batch.append(item)
    return batch
