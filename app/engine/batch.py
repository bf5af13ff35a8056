"""The one-shot lane: token-budget batches through an encoder, for fill-mask, next-sentence and classify."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from app import metrics
from app.engine.errors import Aborted, EngineError, Overloaded, PromptTooLong, StepFailed
from app.engine.lane import Door, Failures, Handover, Handovers, check_fits, halving
from app.engine.runner import ClassifyRunner, MaskedRunner, Wish
from app.engine.scheduler import fits
from model.checkpoint import Checkpoint
from model.kernel_blocks import tell_before_blocks
from model.models import Classifier
from model.nearest_words import Votes

Filled = list[list[tuple[int, float]]]  # per mask: token ids with scores, best first


class Logits(tuple[float, ...]):
    """One for each label of a classifier."""

    __slots__ = ()


BatchResult = Filled | float | Logits


@dataclass(frozen=True)
class BatchLimits:
    """The bounds of the lane, in tokens and items."""

    max_item_tokens: int
    max_queue_items: int
    max_queue_tokens: int


@dataclass(eq=False)
class BatchItem:
    """One text with masks, one pair of sentences, or one text to classify.

    `targets` and `allowed` hold an entry per mask, `votes` as well, or none. Made and awaited on the event
    loop.
    """

    token_ids: list[int]
    segment_ids: list[int]
    task: Literal["fill-mask", "next-sentence", "classify"]
    top_k: int = 5
    targets: list[list[int] | None] = field(default_factory=list)
    allowed: list[str | None] = field(default_factory=list)
    votes: list[Votes | None] = field(default_factory=list)
    aborted: bool = False
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None
    _outcome: BatchResult | EngineError | None = field(default=None, init=False)
    _ended: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def __post_init__(self) -> None:
        if not self.token_ids or len(self.token_ids) != len(self.segment_ids):
            raise ValueError(f"{len(self.token_ids)} token_ids with {len(self.segment_ids)} segment_ids")

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def queue_seconds(self) -> float:
        return (self.started_at or self.ended_at or time.monotonic()) - self.submitted_at

    @property
    def inference_seconds(self) -> float:
        return (self.ended_at or time.monotonic()) - self.started_at if self.started_at else 0.0

    async def result(self) -> BatchResult:
        """What the model says. Raises `EngineError`."""
        await self._ended.wait()
        assert self._outcome is not None
        if isinstance(self._outcome, EngineError):
            raise self._outcome.with_traceback(None)
        return self._outcome

    def deliver(self, delivery: BatchResult | EngineError) -> None:
        """On the event loop; what comes after the end is dropped."""
        if self._outcome is None:
            self._outcome = delivery
            self._ended.set()


class BatchLane:
    """Whatever waits when the device is free is a batch, within `max_batch_tokens` of longest x count.

    `submit` and `abort` are called on the event loop, everything else on the device thread; the lock
    guards only what both touch, the queue.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        *,
        max_batch_tokens: int,
        max_queue_items: int,
        max_queue_tokens: int,
    ) -> None:
        self.name, self.model_name, self.max_batch_tokens = name, checkpoint.name, max_batch_tokens
        self.runner: MaskedRunner | ClassifyRunner = (
            ClassifyRunner(checkpoint)
            if isinstance(checkpoint.model, Classifier)
            else MaskedRunner(checkpoint)
        )
        self.mask_id = checkpoint.tokenizer.mask_id
        self.limits = BatchLimits(checkpoint.config.max_len, max_queue_items, max_queue_tokens)
        self.door = Door()
        self.failures = Failures(name, checkpoint.name, self.runner.responds)
        self._levels = metrics.LaneLevels(name, checkpoint.name)
        self.wake: Callable[[], None] = lambda: None  # set by the worker
        self._lock = threading.Lock()
        self._waiting: list[BatchItem] = []
        self._waiting_tokens = 0
        self._running: list[BatchItem] = []
        self._out: Handovers = []

    # On the event loop

    def submit(self, items: list[BatchItem]) -> None:
        """Queue all or nothing. Raises `Draining`, `PromptTooLong`, `RequestTooLarge` or `Overloaded`."""
        for item in items:
            self._check(item)
        tokens = sum(item.n_tokens for item in items)
        check_fits(len(items), tokens, self.limits)
        now = time.monotonic()
        with self._lock:
            self.door.check()
            if not fits(len(self._waiting) + len(items), self._waiting_tokens + tokens, self.limits):
                raise Overloaded(self.door.retry_after(len(self._waiting)))
            self.door.check_wait(len(self._waiting))
            for item in items:
                item.submitted_at = now
            self._waiting += items
            self._waiting_tokens += tokens
            self._measure_queue()
        self.door.enter(len(items))
        for item in items:
            metrics.prompt_tokens_total.labels(item.task, self.model_name).inc(item.n_tokens)
        self.wake()

    def abort(self, items: list[BatchItem]) -> None:
        """Give up items; those still waiting are forgotten at the next turn."""
        for item in items:
            item.aborted = True
        self.wake()

    def _check(self, item: BatchItem) -> None:
        if item.n_tokens > self.limits.max_item_tokens:
            raise PromptTooLong(item.n_tokens, self.limits.max_item_tokens)
        # On a GPU an index out of range would take the device down, and everybody with it.
        known = range(self.runner.model.config.vocab_size)
        wished = (*item.targets, *(votes and votes.token_ids for votes in item.votes))
        ids = (*item.token_ids, *(token for tokens in wished for token in tokens or ()))
        if min(ids) not in known or max(ids) not in known:
            raise ValueError(f"a token id is outside the vocabulary of {len(known)}")

    def tell_before_calls(self, tell: Callable[[], None]) -> bool:
        """Have `tell` called before kernels run that leave the interpreter to others; False without."""
        return tell_before_blocks(self.runner.model, tell)

    # On the device thread

    def has_work(self) -> bool:
        return bool(self._waiting)

    def turn(self) -> Handovers:
        """One batch; returns its answers."""
        # Only this thread takes out, so what is chosen from a copy is still there afterwards.
        waiting = list(self._waiting)
        departed = [item for item in waiting if item.aborted]
        batch = choose_batch([item for item in waiting if not item.aborted], self.max_batch_tokens)
        self._take([*departed, *batch])
        for item in departed:
            self._end(item, Aborted())
        if batch:
            self._run(batch)
        return self._take_out()

    def fail_all(self, error: Callable[[], EngineError]) -> Handovers:
        """End everything with an error."""
        self._take(list(self._waiting))
        for item in list(self._running):
            self._end(item, error())
        return self._take_out()

    def _take(self, items: list[BatchItem]) -> None:
        """Move items from the queue to those that a turn must end."""
        taken = set(map(id, items))
        with self._lock:
            self._waiting = [item for item in self._waiting if id(item) not in taken]
            self._waiting_tokens -= sum(item.n_tokens for item in items)
            self._measure_queue()
        self._running += items

    def _take_out(self) -> Handovers:
        out, self._out = self._out, []
        return out

    def _run(self, batch: list[BatchItem]) -> None:
        now = time.monotonic()
        lengths = [item.n_tokens for item in batch]
        for item in batch:
            item.started_at = now
            metrics.queue_seconds.labels(item.task).observe(item.queue_seconds)
        metrics.batch_rows.labels(self.name, "batch").observe(len(batch))
        padding = 1 - sum(lengths) / (max(lengths) * len(batch))
        metrics.batch_padding_ratio.labels(self.name, "batch").observe(padding)
        _, failed = halving(batch, self._answer, self.failures.note)
        for item in failed:
            self._end(item, StepFailed())

    def _answer(self, batch: Sequence[BatchItem]) -> None:
        runner = self.runner
        results = (
            _classify(runner, batch) if isinstance(runner, ClassifyRunner) else self._read(runner, batch)
        )
        for item, result in zip(batch, results, strict=True):
            self._end(item, result if _is_sound(result) else StepFailed("the model gave no number"))
        n_helped = sum(any(item.votes) for item in batch)
        metrics.with_examples_total.labels(self.name, self.model_name).inc(n_helped)

    def _read(self, runner: MaskedRunner, batch: Sequence[BatchItem]) -> list[BatchResult]:
        """The results of an encoder with its two heads."""
        hidden = runner.encode([i.token_ids for i in batch], [i.segment_ids for i in batch])
        follows = runner.follows(hidden) if any(i.task == "next-sentence" for i in batch) else []
        # All masks at once: the projection reads its weights from memory, which costs as much for one.
        masks = [(row, *mask) for row, item in enumerate(batch) for mask in self._masks(item)]
        rows, slots, wishes = zip(*masks, strict=True) if masks else ([], [], [])
        filled = iter(runner.fill(hidden[list(rows), list(slots)], wishes))
        return [
            follows[row] if item.task == "next-sentence" else list(islice(filled, len(item.allowed)))
            for row, item in enumerate(batch)
        ]

    def _masks(self, item: BatchItem) -> list[tuple[int, Wish]]:
        """Where its masks stand, and what may fill each."""
        if item.task == "next-sentence":
            return []
        slots = [slot for slot, token in enumerate(item.token_ids) if token == self.mask_id]
        votes = item.votes or [None] * len(slots)
        each = zip(slots, item.allowed, item.targets, votes, strict=True)
        return [(slot, Wish(allowed, item.top_k, targets, own)) for slot, allowed, targets, own in each]

    def _end(self, item: BatchItem, outcome: BatchResult | EngineError) -> None:
        item.ended_at = time.monotonic()
        if item.started_at is not None:
            metrics.inference_seconds.labels(item.task).observe(item.inference_seconds)
        self._running.remove(item)
        self._out.append(Handover(item, outcome, self.door))

    def _measure_queue(self) -> None:
        self._levels.set_queue(len(self._waiting), self._waiting_tokens)


def _classify(runner: ClassifyRunner, batch: Sequence[BatchItem]) -> list[BatchResult]:
    rows = runner.classify([i.token_ids for i in batch], [i.segment_ids for i in batch])
    return list(map(Logits, rows))


def _is_sound(result: BatchResult) -> bool:
    if isinstance(result, Logits):
        return all(map(math.isfinite, result))
    scores = [result] if isinstance(result, float) else [score for ranked in result for _, score in ranked]
    return not any(map(math.isnan, scores))


def choose_batch(waiting: list[BatchItem], max_batch_tokens: int) -> list[BatchItem]:
    """The oldest item, and those nearest to it in length while longest x count stays within the budget."""
    if not waiting:
        return []
    oldest = waiting[0]
    size = oldest.n_tokens
    batch, longest = [oldest], size
    for item in sorted(waiting[1:], key=lambda other: abs(other.n_tokens - size)):
        longest = max(longest, item.n_tokens)
        if longest * (len(batch) + 1) > max_batch_tokens:
            break
        batch.append(item)
    return batch
