"""One unit of decoding work, and what comes out of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from app.engine.errors import Aborted, EngineError
from model.sampling import BeamParams, SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"
    ABORTED = "aborted"


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. `index` counts from 1; `finish_reason` is set on the last."""

    index: int
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

    Made, read and awaited on the event loop; the device thread writes what it produces through
    `deliver`, which the worker calls on the loop. `rows` are the cache rows it holds, in the order of its
    beams; the scheduler moves them.
    """

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams | BeamParams, *, prompt_logprobs: bool = False
    ) -> None:
        if not prompt_ids:
            raise ValueError("prompt_ids: empty")
        self.prompt_ids, self.params, self.prompt_logprobs = prompt_ids, params, prompt_logprobs
        seed = params.seed if isinstance(params, SamplingParams) else 0
        self.seed = random.getrandbits(63) if seed is None else seed
        self.n_rows = params.num_beams if isinstance(params, BeamParams) else 1
        self.rows: list[int] = []
        self.status = SequenceStatus.WAITING
        self.aborted = False
        self.prompt_logprobs_out: list[float | None] = []
        self.n_generated_tokens = 0
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        self.last_token_at: float | None = None
        self.ended_at: float | None = None
        self._events: asyncio.Queue[TokenEvent | EngineError] = asyncio.Queue()
        self._outcome: asyncio.Future[Outcome] | None = None
        self._early: Outcome | None = None

    @property
    def n_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

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
        """The tokens of a generation as they come; ends after the last. Raises `EngineError`."""
        while True:
            event = await self._events.get()
            if isinstance(event, EngineError):
                raise event
            yield event
            if event.finish_reason is not None:
                return

    async def result(self) -> list[Hypothesis]:
        """The finished hypotheses, best first. Raises `EngineError`."""
        if self._early is None:
            if self._outcome is None:
                self._outcome = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._outcome)
        assert self._early is not None
        if isinstance(self._early, EngineError):
            raise self._early
        return self._early

    def deliver(self, delivery: Delivery) -> None:
        """On the event loop: hand over a token, or the end."""
        if isinstance(delivery, TokenEvent):
            self._events.put_nowait(delivery)
            return
        if self._early is not None:
            return
        self._early = delivery
        if isinstance(delivery, EngineError):
            self._events.put_nowait(delivery)
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(delivery)

    def end(self) -> None:
        """Mark as ended, once; the times stop here."""
        self.status = SequenceStatus.ENDED
        self.ended_at = self.ended_at or time.monotonic()


def aborted() -> EngineError:
    """What an aborted sequence ends with."""
    return Aborted()
