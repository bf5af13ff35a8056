"""The decoding lanes: continuous batching, step by step, over a runner and a scheduler."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app import metrics
from app.engine.beams import BeamGroup, Ended
from app.engine.errors import Aborted, EngineError, Overloaded, PromptTooLong, StepFailed
from app.engine.lane import Door, Handover
from app.engine.runner import DecodeRunner, Drawn, GenerateRunner, Guards, TranslateRunner
from app.engine.scheduler import Scheduler
from app.engine.sequence import FinishReason, Hypothesis, Outcome, Sequence, TokenEvent
from model.checkpoint import Checkpoint
from model.models import Translator
from model.sampling import BeamParams, SamplingParams, SamplingRows

log = logging.getLogger("app.engine")


@dataclass(frozen=True)
class DecodeLimits:
    """The bounds of a lane, in tokens and items."""

    max_prompt_tokens: int
    max_new_tokens: int
    n_slots: int
    max_queue_items: int
    max_queue_tokens: int


class DecodeLane(ABC):
    """A turn: forget the departed, admit, prefill the admitted, one step for every active row.

    `submit` and `abort` are called on the event loop, everything else on the device thread; the lock
    guards only what both touch, the queue.
    """

    def __init__(self, name: str, runner: DecodeRunner, limits: DecodeLimits, prefill_tokens: int) -> None:
        self.name, self.runner, self.limits = name, runner, limits
        self.scheduler = Scheduler(
            n_slots=limits.n_slots,
            prefill_tokens=prefill_tokens,
            max_queue_items=limits.max_queue_items,
            max_queue_tokens=limits.max_queue_tokens,
        )
        self.door = Door()
        self.wake: Callable[[], None] = lambda: None  # set by the worker
        self._lock = threading.Lock()
        self._out: list[Handover] = []

    # On the event loop

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue all or nothing. Raises `Draining`, `PromptTooLong` or `Overloaded`."""
        self.door.check()
        for sequence in sequences:
            self.check_size(sequence)
        with self._lock:
            if not self.scheduler.has_room(sequences):
                raise Overloaded(self.door.retry_after(len(self.scheduler.waiting)))
            self.scheduler.add(sequences)
            self._measure_queue()
        metrics.prompt_tokens_total.labels(self.name).inc(sum(s.n_prompt_tokens for s in sequences))
        self.wake()

    def abort(self, sequences: list[Sequence]) -> None:
        """Give up sequences, ended ones included; their rows are free at the next turn."""
        for sequence in sequences:
            sequence.aborted = True
        self.wake()

    def begin_drain(self) -> None:
        self.door.draining = True

    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    # On the device thread

    def turn(self) -> list[Handover]:
        """One step; returns what it produced."""
        self._out = []
        with self._lock:
            departed = self.scheduler.drop_aborted()
        departed += [sequence for sequence in self.scheduler.running if sequence.aborted]
        self._end(departed, Aborted())
        with self._lock:
            admitted = self.scheduler.admit()
            self._measure_queue()
        if admitted:
            self._admit(admitted)
        if self.scheduler.running:
            self._step()
        metrics.rows_in_use.labels(self.name).set(self.scheduler.n_active)
        metrics.kv_cache_usage_ratio.labels(self.name).set(self._cache_usage())
        return self._out

    def fail_all(self, error: EngineError) -> list[Handover]:
        """End everything with an error."""
        self._out = []
        with self._lock:
            for sequence in self.scheduler.waiting:
                sequence.aborted = True
            waiting = self.scheduler.drop_aborted()
            self._measure_queue()
        self._end([*waiting, *self.scheduler.running], error)
        metrics.rows_in_use.labels(self.name).set(self.scheduler.n_active)
        return self._out

    def _admit(self, admitted: list[Sequence]) -> None:
        now = time.monotonic()
        for sequence in admitted:
            sequence.admitted_at = now
            metrics.queue_seconds.labels(self.name).observe(sequence.queue_seconds)
        failed = self._prefill_halving(admitted)
        self._end(failed, StepFailed())

    def _prefill_halving(self, admitted: list[Sequence]) -> list[Sequence]:
        """Prefill; a failure is tried again in halves, so that only the cause of it fails."""
        try:
            self._prefill(admitted)
        except Exception as error:
            self._note_failure(error)
            if len(admitted) == 1:
                return admitted
            middle = len(admitted) // 2
            return self._prefill_halving(admitted[:middle]) + self._prefill_halving(admitted[middle:])
        return []

    def _step(self) -> None:
        inputs = [self._row_input(sequence, row) for row, sequence in enumerate(self.scheduler.owners)]
        token_ids, positions = [token for token, _ in inputs], [position for _, position in inputs]
        failed_rows: list[int] = []
        parts = self._logits_halving(0, token_ids, positions, failed_rows)
        metrics.batch_rows.labels(self.name, "decode").observe(len(inputs))
        if failed_rows:
            # The survivors' logits are dropped too: their rows move now, and the next turn repeats the step.
            owners = self.scheduler.owners
            self._end(list({id(owners[row]): owners[row] for row in failed_rows}.values()), StepFailed())
            return
        self._commit(torch.cat(parts))

    def _logits_halving(
        self, first: int, token_ids: list[int], positions: list[int], failed: list[int]
    ) -> list[Tensor]:
        try:
            return [self.runner.step(first, token_ids, positions)]
        except Exception as error:
            self._note_failure(error)
            if len(token_ids) == 1:
                failed.append(first)
                return []
            middle = len(token_ids) // 2
            return self._logits_halving(first, token_ids[:middle], positions[:middle], failed) + (
                self._logits_halving(first + middle, token_ids[middle:], positions[middle:], failed)
            )

    def _end(self, sequences: Items[Sequence], outcome: Outcome | Callable[[Sequence], Outcome]) -> None:
        """Take sequences off their rows and hand over their outcomes."""
        if not sequences:
            return
        length = max((self._row_length(s) for s in self.scheduler.running), default=0)
        moves = self.scheduler.release(s for s in sequences if s.rows)
        if moves:
            self.runner.move(moves, length)
        for sequence in sequences:
            sequence.end()
            if sequence.admitted_at is not None:
                metrics.inference_seconds.labels(self.name).observe(sequence.inference_seconds)
            self.door.note_end()
            self._out.append(Handover(sequence, outcome(sequence) if callable(outcome) else outcome))
            self._forget(sequence)

    def _note_failure(self, error: Exception) -> None:
        log.error("a model step failed", exc_info=error)
        metrics.step_failures_total.labels(self.name).inc()
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def _measure_queue(self) -> None:
        metrics.queue_items.labels(self.name).set(len(self.scheduler.waiting))
        metrics.queue_tokens.labels(self.name).set(self.scheduler.waiting_tokens)

    def _cache_usage(self) -> float:
        used = sum(self._row_length(s) * s.n_rows for s in self.scheduler.running)
        return used / (self.runner.n_slots * self.runner.max_len)

    def _note_padding(self, phase: str, lengths: Items[int]) -> None:
        metrics.batch_rows.labels(self.name, phase).observe(len(lengths))
        padded = 1 - sum(lengths) / (max(lengths) * len(lengths))
        metrics.batch_padding_ratio.labels(self.name, phase).observe(padded)

    @abstractmethod
    def check_size(self, sequence: Sequence) -> None:
        """Raises `PromptTooLong` for what the cache cannot hold."""

    @abstractmethod
    def _prefill(self, admitted: list[Sequence]) -> None: ...

    @abstractmethod
    def _row_input(self, sequence: Sequence, row: int) -> tuple[int, int]:
        """The token that a row reads next, and its position."""

    @abstractmethod
    def _row_length(self, sequence: Sequence) -> int:
        """How much of its rows a sequence uses."""

    @abstractmethod
    def _commit(self, logits: Tensor) -> None:
        """Choose tokens from logits (active rows, V), hand them over, end what has ended."""

    @abstractmethod
    def _forget(self, sequence: Sequence) -> None: ...


@dataclass
class _Generation:
    """What the lane remembers of a running generation."""

    params: SamplingParams
    noise: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class GenerateLane(DecodeLane):
    """Next-token generation: a row a sequence, sampled on the device."""

    runner: GenerateRunner

    def __init__(self, name: str, runner: GenerateRunner, limits: DecodeLimits, prefill_tokens: int) -> None:
        super().__init__(name, runner, limits, prefill_tokens)
        self.eos_id = runner.model.config.eos_id
        self._running: dict[int, _Generation] = {}
        self._rows: tuple[list[Sequence], SamplingRows] | None = None

    def check_size(self, sequence: Sequence) -> None:
        n_tokens = sequence.n_prompt_tokens + sequence.params.max_new_tokens
        if n_tokens > self.runner.max_len:
            raise PromptTooLong(n_tokens, self.runner.max_len)

    def _prefill(self, admitted: list[Sequence]) -> None:
        for sequence in admitted:
            assert isinstance(sequence.params, SamplingParams)
            if sequence.prompt_logprobs:
                sequence.prompt_logprobs_out = self.runner.prompt_logprobs(sequence.prompt_ids)
            self._running[id(sequence)] = _Generation(sequence.params, random.Random(sequence.seed))
        # The last prompt token is left to the step, which reads one token a row in any case.
        prompts = [sequence.prompt_ids[:-1] for sequence in admitted]
        if any(prompts):
            self._note_padding("prefill", [len(prompt) for prompt in prompts])
            self.runner.prefill(admitted[0].rows[0], prompts)

    def _row_input(self, sequence: Sequence, row: int) -> tuple[int, int]:
        new = self._running[id(sequence)].token_ids
        return (new or sequence.prompt_ids)[-1], sequence.n_prompt_tokens - 1 + len(new)

    def _row_length(self, sequence: Sequence) -> int:
        state = self._running.get(id(sequence))
        return sequence.n_prompt_tokens + (len(state.token_ids) if state else 0)

    def _commit(self, logits: Tensor) -> None:
        owners = list(self.scheduler.owners)
        states = [self._running[id(sequence)] for sequence in owners]
        guards = Guards()
        for row, (sequence, state) in enumerate(zip(owners, states, strict=True)):
            self._guard(guards, row, sequence, state)
        n_top = max(state.params.top_n_tokens for state in states)
        uniform = [s.noise.random() if s.params.temperature > 0 else 0.0 for s in states]
        drawn = self.runner.draw(
            self.runner.guard(logits, guards), self._sampling_rows(owners), uniform, n_top
        )
        self._hand_over(owners, states, drawn)

    def _guard(self, guards: Guards, row: int, sequence: Sequence, state: _Generation) -> None:
        params = state.params
        if len(state.token_ids) < params.min_new_tokens:
            guards.banned.append((row, self.eos_id))
        if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0:
            history = [*sequence.prompt_ids, *state.token_ids]
            guards.penalty(row, history, params.repetition_penalty, params.frequency_penalty)

    def _sampling_rows(self, owners: list[Sequence]) -> SamplingRows:
        if self._rows is None or self._rows[0] != owners:
            params = [self._running[id(sequence)].params for sequence in owners]
            self._rows = owners, SamplingRows.stack(params, self.runner.device)
        return self._rows[1]

    def _hand_over(self, owners: list[Sequence], states: list[_Generation], drawn: Drawn) -> None:
        ended: dict[int, FinishReason] = {}
        broken: list[Sequence] = []
        now = time.monotonic()
        for row, (sequence, state) in enumerate(zip(owners, states, strict=True)):
            token_id, logprob = drawn.token_ids[row], drawn.logprobs[row]
            if math.isnan(logprob):
                broken.append(sequence)
                continue
            state.token_ids.append(token_id)
            state.logprobs.append(logprob)
            sequence.n_generated_tokens = len(state.token_ids)
            self._time(sequence, now)
            reason = self._finish_reason(state)
            top = tuple(drawn.top[row][: state.params.top_n_tokens])
            event = TokenEvent(len(state.token_ids), token_id, logprob, top, reason)
            self._out.append(Handover(sequence, event))
            if reason is not None:
                ended[id(sequence)] = reason
        metrics.generated_tokens_total.labels(self.name).inc(len(owners) - len(broken))
        self._end(broken, StepFailed("the model gave no number"))
        done = [sequence for sequence in owners if id(sequence) in ended]
        self._end(done, lambda sequence: [self._hypothesis(sequence, ended[id(sequence)])])

    def _finish_reason(self, state: _Generation) -> FinishReason | None:
        if state.token_ids[-1] == self.eos_id:
            return FinishReason.EOS
        return FinishReason.LENGTH if len(state.token_ids) >= state.params.max_new_tokens else None

    def _time(self, sequence: Sequence, now: float) -> None:
        if sequence.last_token_at is None:
            metrics.time_to_first_token_seconds.labels(self.name).observe(now - sequence.submitted_at)
        else:
            metrics.inter_token_seconds.labels(self.name).observe(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _hypothesis(self, sequence: Sequence, reason: FinishReason) -> Hypothesis:
        state = self._running[id(sequence)]
        token_ids = state.token_ids[:-1] if reason is FinishReason.EOS else state.token_ids
        score = sum(state.logprobs) / len(state.logprobs)
        return Hypothesis(token_ids, score, state.logprobs, reason)

    def _forget(self, sequence: Sequence) -> None:
        self._running.pop(id(sequence), None)
        self._rows = None


class TranslateLane(DecodeLane):
    """Beam search under continuous batching: a sentence takes a row per beam and gives all back at its end."""

    runner: TranslateRunner

    def __init__(self, name: str, runner: TranslateRunner, limits: DecodeLimits, prefill_tokens: int) -> None:
        super().__init__(name, runner, limits, prefill_tokens)
        self.config = runner.model.config
        self._groups: dict[int, BeamGroup] = {}

    def check_size(self, sequence: Sequence) -> None:
        if sequence.n_prompt_tokens > self.limits.max_prompt_tokens:
            raise PromptTooLong(sequence.n_prompt_tokens, self.limits.max_prompt_tokens)
        if sequence.params.max_new_tokens > self.limits.max_new_tokens:
            raise PromptTooLong(sequence.params.max_new_tokens, self.limits.max_new_tokens)
        if sequence.n_rows > self.limits.n_slots:
            raise ValueError(f"num_beams {sequence.n_rows} exceeds the {self.limits.n_slots} rows")

    def _prefill(self, admitted: list[Sequence]) -> None:
        self._note_padding("encode", [sequence.n_prompt_tokens for sequence in admitted])
        sources = [sequence.prompt_ids for sequence in admitted]
        self.runner.encode(admitted[0].rows[0], sources, [sequence.n_rows for sequence in admitted])
        for sequence in admitted:
            assert isinstance(sequence.params, BeamParams)
            self._groups[id(sequence)] = BeamGroup(sequence.params, self.config.eos_id)

    def start_token(self, sequence: Sequence) -> int:
        """The decoder begins with the target language's token, which stands second in the source."""
        language = sequence.prompt_ids[1] if sequence.n_prompt_tokens > 1 else self.config.bos_id
        return language if language in self.config.languages.values() else self.config.bos_id

    def _row_input(self, sequence: Sequence, row: int) -> tuple[int, int]:
        group = self._groups[id(sequence)]
        tokens = group.tokens_in(sequence.rows.index(row))
        # A row without a live beam repeats the first position; nothing reads what it writes.
        return (tokens[-1] if tokens else self.start_token(sequence)), len(tokens)

    def _row_length(self, sequence: Sequence) -> int:
        group = self._groups.get(id(sequence))
        return group.n_steps + 1 if group else 1

    def _commit(self, logits: Tensor) -> None:
        running = list(self.scheduler.running)
        guards = Guards()
        for sequence in running:
            self._guard(guards, sequence)
        width = 2 * max(sequence.n_rows for sequence in running)
        ranked = self.runner.rank(self.runner.guard(logits, guards), width)
        copies: list[tuple[int, int]] = []
        broken: list[Sequence] = []
        for sequence in running:
            group = self._groups[id(sequence)]
            candidates = [ranked[sequence.rows[row]] for row in group.live_rows]
            if any(math.isnan(logprob) for own in candidates for _, logprob in own):
                broken.append(sequence)
                continue
            moved = group.advance(candidates)
            copies += [(sequence.rows[source], sequence.rows[target]) for source, target in moved]
        length = max(self._row_length(sequence) for sequence in running)
        self.runner.copy_beams(copies, length)
        self._end(broken, StepFailed("the model gave no number"))
        self._end([s for s in running if s not in broken and self._groups[id(s)].done], self._outcome)

    def _guard(self, guards: Guards, sequence: Sequence) -> None:
        group = self._groups[id(sequence)]
        for index, tokens, banned in group.guards():
            row = sequence.rows[index]
            guards.banned += [(row, token) for token in banned]
            guards.penalty(row, tokens, group.params.repetition_penalty)

    def _outcome(self, sequence: Sequence) -> Outcome:
        """The hypotheses, with alignments where they were asked for."""
        ended = self._groups[id(sequence)].results()
        sequence.n_generated_tokens = sum(len(e.tokens) for e in ended)
        metrics.generated_tokens_total.labels(self.name).inc(sequence.n_generated_tokens)
        try:
            return [self._hypothesis(sequence, e) for e in ended]
        except Exception as error:  # the alignment is a model step like any other
            self._note_failure(error)
            return StepFailed()

    def _hypothesis(self, sequence: Sequence, ended: Ended) -> Hypothesis:
        assert isinstance(sequence.params, BeamParams)
        alignment = None
        if sequence.params.return_alignment:
            shifted = [self.start_token(sequence), *ended.tokens[:-1]] if ended.tokens else []
            alignment = self.runner.align(sequence.prompt_ids, shifted) if shifted else []
        reason = FinishReason.EOS if ended.finished else FinishReason.LENGTH
        return Hypothesis(ended.tokens, ended.score, ended.logprobs, reason, alignment)

    def _forget(self, sequence: Sequence) -> None:
        self._groups.pop(id(sequence), None)


def make_decode_lane(
    name: str,
    checkpoint: Checkpoint,
    *,
    n_slots: int,
    prefill_tokens: int,
    max_queue_items: int,
    max_queue_tokens: int,
) -> GenerateLane | TranslateLane:
    """The lane that suits a checkpoint's architecture."""
    max_len = checkpoint.config.max_len
    limits = DecodeLimits(max_len, max_len, n_slots, max_queue_items, max_queue_tokens)
    if isinstance(checkpoint.model, Translator):
        return TranslateLane(name, TranslateRunner(checkpoint, n_slots, max_len), limits, prefill_tokens)
    return GenerateLane(name, GenerateRunner(checkpoint, n_slots, max_len), limits, prefill_tokens)
