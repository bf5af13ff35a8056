"""One unit of decoding work, and what comes out of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import NamedTuple

from app.engine.errors import EngineError
from model.nearest import ExampleIds
from model.sampling import BeamParams, SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class TokenEvent(NamedTuple):
    """One generated token. `index` counts from 1; `finish_reason` is set on the last."""

    index: int  # type: ignore[assignment]  # a name that tuples have, too
    token_id: int
    logprob: float
    top_tokens: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A finished output, without begin and end tokens.

    `score` is the sum of log-probabilities over the length to the power of the length penalty; for a
    generation, the plain mean. `alignment` holds a row per target token over the source tokens.
    """

    token_ids: list[int]
    score: float
    logprobs: list[float]
    finish_reason: FinishReason
    alignment: list[list[float]] | None = None


Outcome = list[Hypothesis] | EngineError
Delivery = TokenEvent | Outcome


class Sequence:
    """A prompt to go on with, or a source sentence to translate.

    Made, read and awaited on the event loop, by as many readers as like, before or after its end; the
    device thread writes what it produces through `deliver`, which the worker calls on the loop. `rows` are
    the cache rows it holds, in the order of its beams; the scheduler moves them. The first of `target_ids`
    is what a translation begins with, the others are what it must say first; `examples` are translations of
    sentences like it. With `known`, translations of the very sentence from their second token to the end
    token, it becomes one of these.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams | BeamParams,
        *,
        prompt_logprobs: bool = False,
        target_ids: list[int] | None = None,
        examples: Items[ExampleIds] = (),
        known: Items[list[int]] = (),
    ) -> None:
        if not prompt_ids:
            raise ValueError("prompt_ids: empty")
        if params.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {params.max_new_tokens} is less than 1")
        self.prompt_ids, self.params, self.prompt_logprobs = prompt_ids, params, prompt_logprobs
        self.target_ids, self.examples, self.known = target_ids or [], examples, known
        seed = params.seed if isinstance(params, SamplingParams) else 0
        self.seed = random.getrandbits(63) if seed is None else seed
        self.n_rows = params.num_beams if isinstance(params, BeamParams) else 1
        self.rows: list[int] = []
        self.turn = 0  # in the queue; the scheduler sets it
        self.status = SequenceStatus.WAITING
        self.aborted = False
        self.prompt_logprobs_out: list[float | None] = []
        self.n_generated_tokens = 0
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        self.last_token_at: float | None = None
        self.ended_at: float | None = None
        self._tokens: list[TokenEvent] = []
        self._outcome: Outcome | None = None
        self._news = asyncio.Event()  # set at each delivery
        self._ended = asyncio.Event()

    @property
    def n_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def n_example_tokens(self) -> int:
        """What is read of examples beside the prompt."""
        return sum(len(each.source) + len(each.target) for each in self.examples)

    @property
    def queue_seconds(self) -> float:
        """From submission to admission, or to the end where it was never admitted."""
        until = self.admitted_at or self.ended_at or time.monotonic()
        return until - self.submitted_at

    @property
    def inference_seconds(self) -> float:
        """From admission to the end, 0 where it was never admitted."""
        return (self.ended_at or time.monotonic()) - self.admitted_at if self.admitted_at else 0.0

    async def events(self) -> AsyncIterator[TokenEvent]:
        """The tokens of a generation from its first, as they come. Raises `EngineError`."""
        n_seen = 0
        while True:
            while n_seen < len(self._tokens):
                event = self._tokens[n_seen]
                n_seen += 1
                yield event
                if event.finish_reason is not None:
                    return
            if self._outcome is not None:
                self._raise_failure(self._outcome)
                return
            self._news.clear()
            await self._news.wait()

    async def result(self) -> list[Hypothesis]:
        """The finished hypotheses, best first. Raises `EngineError`."""
        await self._ended.wait()
        assert self._outcome is not None
        return self._raise_failure(self._outcome)

    @staticmethod
    def _raise_failure(outcome: Outcome) -> list[Hypothesis]:
        if isinstance(outcome, EngineError):
            # Without the traceback of an earlier reader, to which each raise would add.
            raise outcome.with_traceback(None)
        return outcome

    def deliver(self, delivery: Delivery) -> None:
        """On the event loop: hand over a token, or the end. What comes after the end is dropped."""
        if self._outcome is not None:
            return
        if isinstance(delivery, TokenEvent):
            self._tokens.append(delivery)
        else:
            self._outcome = delivery
            self._ended.set()
        self._news.set()

    def end(self) -> None:
        """Mark as ended, once; the times stop here."""
        self.status = SequenceStatus.ENDED
        self.ended_at = self.ended_at or time.monotonic()
