"""The decoding lanes: continuous batching, step by step, over a runner and a scheduler."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from app import metrics
from app.engine.beams import BeamGroup, Candidate, Ended
from app.engine.drawing import UNKNOWN, Drawing, Level, RowRules, has_penalties, level_of
from app.engine.errors import Aborted, EngineError, Overloaded, PromptTooLong, StepFailed
from app.engine.graphs import Flight
from app.engine.lane import Door, Failures, Handover, Handovers, check_fits, halving
from app.engine.memory import context_len
from app.engine.prefixes import PrefixIndex
from app.engine.runner import (
    BLOCK_TOKENS,
    DecodeRunner,
    Drawn,
    GenerateRunner,
    Guards,
    TranslateRunner,
)
from app.engine.scheduler import Moves, Scheduler
from app.engine.sequence import FinishReason, Hypothesis, Outcome, Sequence, SequenceStatus, TokenEvent
from model.checkpoint import Checkpoint
from model.kernel_blocks import tell_before_blocks
from model.models import Translator
from model.round_trip import MOST_ASKED, can_return
from model.sampling import BeamParams, SamplingParams, SamplingRows

_NEVER = itertools.repeat(False)
# Positions up to which a kernel reads prompts token by token; in longer ones torch's attention is no slower.
_TOGETHER = 512

Choice = TypeVar("Choice")  # what a step chose for a row


@dataclass(frozen=True)
class DecodeLimits:
    """The bounds of a lane, in tokens and items."""

    max_prompt_tokens: int
    max_new_tokens: int
    n_slots: int
    max_queue_items: int
    max_queue_tokens: int


class DecodeLane(ABC, Generic[Choice]):
    """A turn: forget the departed, admit, prefill the admitted, one step for every active row.

    `submit` and `abort` are called on the event loop, everything else on the device thread; the lock
    guards only what both touch, the queue.
    """

    prefill_phase: str
    params_type: type[SamplingParams] | type[BeamParams]

    def __init__(self, name: str, runner: DecodeRunner, limits: DecodeLimits, prefill_tokens: int) -> None:
        self.name, self.runner, self.limits = name, runner, limits
        self.scheduler = Scheduler(
            n_slots=limits.n_slots,
            prefill_tokens=prefill_tokens,
            max_queue_items=limits.max_queue_items,
            max_queue_tokens=limits.max_queue_tokens,
        )
        self.door = Door()
        self.failures = Failures(name, runner.model_name, runner.responds)
        self._levels = metrics.LaneLevels(name, runner.model_name)
        self.wake: Callable[[], None] = lambda: None  # set by the worker
        self._lock = threading.Lock()
        self._departures = False
        self._out: Handovers = []

    # On the event loop

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue all or nothing. Raises `Draining`, `PromptTooLong`, `RequestTooLarge` or `Overloaded`.

        ValueError for what a route should never let through: other parameters, more beams than rows,
        tokens outside the vocabulary.
        """
        for sequence in sequences:
            self._check(sequence)
        n_tokens = sum(sequence.n_prompt_tokens for sequence in sequences)
        check_fits(len(sequences), n_tokens, self.limits)
        now = time.monotonic()
        with self._lock:
            self.door.check()
            if not self.scheduler.has_room(len(sequences), n_tokens):
                raise Overloaded(self.door.retry_after(len(self.scheduler.waiting)))
            self.door.check_wait(self.scheduler.n_before(len(sequences)), len(self.scheduler.waiting))
            for sequence in sequences:
                sequence.submitted_at = now
            self.scheduler.add(sequences)
            self._measure_queue()
        self.door.enter(len(sequences))
        metrics.prompt_tokens_total.labels(self.name, self.runner.model_name).inc(n_tokens)
        if any(sequence.aborted for sequence in sequences):
            self._departures = True
        self.wake()

    def abort(self, sequences: list[Sequence]) -> None:
        """Give up sequences, ended ones included; their rows are free at the next turn."""
        for sequence in sequences:
            sequence.aborted = True
        self._departures = True
        self.wake()

    def _check(self, sequence: Sequence) -> None:
        if not isinstance(sequence.params, self.params_type):
            raise TypeError(f"{self.name} wants {self.params_type.__name__}, not {sequence.params!r}")
        if sequence.n_rows > self.limits.n_slots:
            raise ValueError(f"num_beams {sequence.n_rows} exceeds the {self.limits.n_slots} rows")
        self._check_ids(sequence.prompt_ids)
        self._check_length(sequence)

    def _check_ids(self, token_ids: Items[int]) -> None:
        # On a GPU an index out of range would take the device down, and everybody with it.
        if min(token_ids) < 0 or max(token_ids) >= self.runner.config.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self.runner.config.vocab_size}")

    def tell_before_calls(self, tell: Callable[[], None]) -> bool:
        """Have `tell` called before kernels run that leave the interpreter to others; False without."""
        return tell_before_blocks(self.runner.model, tell)

    # On the device thread

    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def turn(self) -> Handovers:
        """One step; returns what it produced."""
        self._forget_departed()
        with self._lock:
            admitted = self.scheduler.admit(self._admission_tokens())
            self._measure_queue()
        self._admit(admitted)
        self._read_prompts(admitted)
        if self.scheduler.running:
            self._step()
        self._finish()
        return self._take_out()

    def fail_all(self, error: Callable[[], EngineError]) -> Handovers:
        """End everything with an error; the queue, the rows and the cache's owners are as new."""
        with self._lock:
            sequences = self.scheduler.clear()
            self._measure_queue()
        for sequence in sequences:
            if sequence.status is not SequenceStatus.ENDED:
                self._conclude(sequence, lambda _: error())
        return self._take_out()

    def _take_out(self) -> Handovers:
        self._levels.set_rows(self.scheduler.n_active, self._cache_usage())
        out, self._out = self._out, []
        return out

    def _forget_departed(self) -> None:
        if not self._departures:
            return
        # Cleared before looking: who departs meanwhile is found at the next turn.
        self._departures = False
        with self._lock:
            departed = self.scheduler.drop_aborted()
            self._measure_queue()
        departed += [sequence for sequence in self.scheduler.running if sequence.aborted]
        self._end(departed, lambda _: Aborted())

    def _admit(self, admitted: list[Sequence]) -> None:
        now = time.monotonic()
        for sequence in admitted:
            sequence.admitted_at = now
            metrics.queue_seconds.labels(self.name).observe(sequence.queue_seconds)
            self._open(sequence)

    def _step(self) -> None:
        rows = range(self.scheduler.n_active)
        metrics.batch_rows.labels(self.name, "decode").observe(len(rows))
        parts, failed = halving(rows, self._choose, self.failures.note)
        lost = self._owners(failed)
        chosen = {row: choice for part in parts for row, choice in part.items()}
        self._commit(chosen, [sequence for sequence in self.scheduler.running if sequence not in lost])
        self._end(lost, _step_failed)

    def _finish(self) -> None:
        """What is to be done for those whose steps are over."""

    def _end(
        self,
        sequences: Iterable[Sequence],
        outcome: Callable[[Sequence], Outcome],
        *,
        set_aside: Items[Sequence] = (),
    ) -> None:
        """Hand over the outcomes of sequences, those that have ended before left out, and free their rows.

        With them the rows of those that are set aside, whose outcome comes later.
        """
        ending = [s for s in dict.fromkeys(sequences) if s.status is not SequenceStatus.ENDED]
        if not ending and not set_aside:
            return
        length = max((self._row_length(s) for s in self.scheduler.running), default=0)
        # First the outcomes: whatever happens to the rows, nobody is left waiting.
        for sequence in ending:
            self._conclude(sequence, outcome)
        moves = self.scheduler.release([*ending, *set_aside])
        lost = self._copy(moves, lambda part: self.runner.move(part, length))
        self.runner.let_go(self.scheduler.n_active)
        self._end(lost, _step_failed)

    def _copy(self, moves: Moves, run: Callable[[Items[tuple[int, int]]], None]) -> list[Sequence]:
        """Copy rows; returns those whose rows could not be filled."""
        _, failed = halving(moves, run, self.failures.note) if moves else ([], [])
        return self._owners(target for _, target in failed)

    def _conclude(self, sequence: Sequence, outcome: Callable[[Sequence], Outcome]) -> None:
        try:
            delivery = outcome(sequence)
        except Exception as error:
            self.failures.note(error, 1)
            delivery = StepFailed()
        sequence.end()
        if sequence.admitted_at is not None:
            metrics.inference_seconds.labels(self.name).observe(sequence.inference_seconds)
        self._forget(sequence)
        self._out.append(Handover(sequence, delivery, self.door))

    def _wipe(self, sequences: list[Sequence]) -> None:
        """Clean rows that hold no numbers, before they move or find another owner."""
        rows = [row for sequence in sequences for row in sequence.rows]
        if rows:
            halving(rows, self.runner.wipe, self.failures.note)

    def _is_part(self, rows: Items[int]) -> bool:
        """Are these not all rows that are active?"""
        return len(rows) < self.scheduler.n_active

    def _owners(self, rows: Iterable[int]) -> list[Sequence]:
        return list(dict.fromkeys(self.scheduler.owners[row] for row in rows))

    def _measure_queue(self) -> None:
        self._levels.set_queue(len(self.scheduler.waiting), self.scheduler.waiting_tokens)

    def _cache_usage(self) -> float:
        used = sum(self._row_length(s) * s.n_rows for s in self.scheduler.running)
        return used / (self.runner.n_slots * self.runner.max_len)

    def _note_padding(self, lengths: Items[int], *, is_padded: bool = True) -> None:
        metrics.batch_rows.labels(self.name, self.prefill_phase).observe(len(lengths))
        padded = 1 - sum(lengths) / (max(lengths) * len(lengths)) if is_padded else 0.0
        metrics.batch_padding_ratio.labels(self.name, self.prefill_phase).observe(padded)

    @abstractmethod
    def _check_length(self, sequence: Sequence) -> None:
        """Raises `PromptTooLong` for what the cache cannot hold."""

    @abstractmethod
    def _open(self, sequence: Sequence) -> None:
        """Begin to remember a sequence."""

    @abstractmethod
    def _forget(self, sequence: Sequence) -> None:
        """The inverse of `_open`; nothing happens where nothing is remembered."""

    @abstractmethod
    def _admission_tokens(self) -> int:
        """How many padded prompt tokens may be admitted now."""

    @abstractmethod
    def _read_prompts(self, admitted: list[Sequence]) -> None:
        """Read what this turn may of the prompts."""

    @abstractmethod
    def _choose(self, rows: Items[int]) -> dict[int, Choice]:
        """One step over neighbouring rows: what it chose for each. May be tried again."""

    @abstractmethod
    def _commit(self, chosen: dict[int, Choice], running: list[Sequence]) -> None:
        """Take what was chosen for sequences, hand it over, end what has ended."""

    @abstractmethod
    def _row_length(self, sequence: Sequence) -> int:
        """How much of its rows a running sequence uses."""


@dataclass
class _Generation:
    """What the lane remembers of a running generation."""

    params: SamplingParams
    noise: random.Random
    n_prompt: int
    # Tokens, of the prompt and then of its own, whose keys and values its row holds, or will hold once the
    # device has done what it was given.
    n_read: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    numbers: deque[float] = field(default_factory=deque)  # of the noise, for the next tokens

    def uniform(self, n_ahead: int = 0) -> float:
        """The number that draws the next token but so many: a step tried again draws the same."""
        if self.params.temperature <= 0:
            return 0.0
        while len(self.numbers) <= n_ahead:
            self.numbers.append(self.noise.random())
        return self.numbers[n_ahead]

    def take(self, drawn: Drawn) -> None:
        self.token_ids.append(drawn.token_id)
        self.logprobs.append(drawn.logprob)
        if self.numbers:
            self.numbers.popleft()

    @property
    def n_unread(self) -> int:
        """Prompt tokens to be read before the step; the last is left to it, which reads one in any case."""
        return max(0, self.n_prompt - 1 - self.n_read)


class _Chunk(NamedTuple):
    """Part of a prompt that a turn reads."""

    sequence: Sequence
    start: int
    n_tokens: int


def _neighbours(chunks: list[_Chunk], *, equal: bool) -> list[list[_Chunk]]:
    """Groups in neighbouring rows that begin at one position and are `equal`, or nearly, in length."""
    groups: list[list[_Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.sequence.rows[0]):
        if groups and _may_join(groups[-1], chunk, 1 if equal else 2):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _may_join(group: list[_Chunk], chunk: _Chunk, most_padding: int) -> bool:
    sizes = [chunk.n_tokens, *(other.n_tokens for other in group)]
    near = chunk.sequence.rows[0] == group[-1].sequence.rows[0] + 1 and chunk.start == group[0].start
    return near and max(sizes) * len(sizes) <= most_padding * sum(sizes)


def _next_input(sequence: Sequence, state: _Generation) -> int:
    """The first token that a row has not read; `UNKNOWN` where a step on its way draws it."""
    n_own = state.n_read - sequence.n_prompt_tokens
    if n_own < 0:
        return sequence.prompt_ids[state.n_read]
    return state.token_ids[n_own] if n_own < len(state.token_ids) else UNKNOWN


@dataclass(frozen=True)
class _Crew:
    """Who stands in which row, until somebody comes, goes or moves."""

    owners: list[Sequence]
    states: list[_Generation]
    level: Level | None  # of their steps; None where the host must see to somebody's logits
    penalised: list[int]  # rows

    @classmethod
    def muster(cls, owners: list[Sequence], generations: dict[Sequence, _Generation]) -> _Crew:
        states = [generations[sequence] for sequence in owners]
        levels = [level_of(state.params) for state in states]
        level = None if None in levels else max(each for each in levels if each is not None)
        penalised = [row for row, state in enumerate(states) if has_penalties(state.params)]
        return cls(list(owners), states, level, penalised)


@dataclass(frozen=True)
class _Ahead:
    """A step that was launched and not read yet: what position each row reads, and which draw what counts."""

    flight: Flight
    crew: _Crew
    positions: list[int]
    draws: list[bool]  # not in the middle of a prompt

    def draws_for(self, crew: _Crew) -> list[bool]:
        """The same for the rows of those who stand there now."""
        if crew is self.crew:
            return self.draws
        by_owner = dict(zip(self.crew.owners, self.draws, strict=True))
        return [by_owner.get(sequence, False) for sequence in crew.owners]


class GenerateLane(DecodeLane[Drawn]):
    """Next-token generation: a row a sequence, sampled on the device.

    While others run, a long prompt is read in chunks of `chunk_tokens` a turn, so that nobody waits for it.
    A step covers all rows; one whose prompt is still being read reads its next prompt token in it.

    Where steps draw on the device (a static runner), one can be launched before the last is read
    (`launch_ahead`): rows then read what they drew without the host. Who turns out to have ended has wasted
    the step that is on its way: what it drew there is nobody's. What the host must see to between logits and
    token (`level_of`) is done step by step.
    """

    runner: GenerateRunner
    prefill_phase, params_type = "prefill", SamplingParams

    def __init__(
        self,
        name: str,
        runner: GenerateRunner,
        limits: DecodeLimits,
        prefill_tokens: int,
        chunk_tokens: int | None = None,
        *,
        launch_ahead: bool = False,
    ) -> None:
        super().__init__(name, runner, limits, prefill_tokens)
        self.launch_ahead = launch_ahead
        self.chunk_tokens = min(chunk_tokens or prefill_tokens, prefill_tokens)
        self._prefixes = PrefixIndex(runner.pool.n_slots, BLOCK_TOKENS)
        self._generations: dict[Sequence, _Generation] = {}
        self._rows: tuple[list[Sequence], SamplingRows] | None = None
        self._ahead: _Ahead | None = None
        self._crew: _Crew | None = None
        self._told: _Crew | None = None  # whose rules the device has
        self._eos_ids = frozenset(runner.config.eos_ids)

    def fail_all(self, error: Callable[[], EngineError]) -> Handovers:
        """As its base class; what is on its way is waited for, and forgotten."""
        self._drop_ahead()
        return super().fail_all(error)

    def _check_length(self, sequence: Sequence) -> None:
        n_tokens = sequence.n_prompt_tokens + sequence.params.max_new_tokens
        if n_tokens > self.runner.max_len:
            raise PromptTooLong(n_tokens, self.runner.max_len)

    def _open(self, sequence: Sequence) -> None:
        assert isinstance(sequence.params, SamplingParams)
        noise = random.Random(sequence.seed)
        self._generations[sequence] = _Generation(sequence.params, noise, sequence.n_prompt_tokens)

    def _forget(self, sequence: Sequence) -> None:
        self._generations.pop(sequence, None)
        self._rows = self._crew = self._told = None

    def _admission_tokens(self) -> int:
        return self._prompt_tokens() - sum(state.n_unread for state in self._generations.values())

    def _prompt_tokens(self) -> int:
        """What this turn may read of prompts: little while somebody waits for a next token."""
        waited_for = any(state.n_unread == 0 for state in self._generations.values())
        return self.chunk_tokens if waited_for else self.scheduler.prefill_tokens

    def _read_prompts(self, admitted: list[Sequence]) -> None:
        failed = [sequence for sequence in admitted if not self._begin(sequence)]
        budget = self._prompt_tokens()
        while chunks := self._next_chunks(budget, failed):
            budget -= sum(chunk.n_tokens for chunk in chunks)
            for group in self._groups_of(chunks):
                self._note_padding(
                    [chunk.n_tokens for chunk in group], is_padded=not self._reads_together(group[0].start)
                )
                _, lost = halving(group, self._prefill, self.failures.note)
                failed += [chunk.sequence for chunk in lost]
        self._end(failed, _step_failed)

    @property
    def _piece(self) -> int | None:
        """The tokens by which a prompt is read, whatever else there is to do.

        Where numbers are rounded, so that an answer hangs on nobody else: a prompt is read in the same pieces
        always, beside none of another length, unless a kernel reads every token as if it were alone.
        """
        if not self.runner.rounds:
            return None
        return min(BLOCK_TOKENS, self.chunk_tokens, self.scheduler.prefill_tokens)

    def _next_chunks(self, budget: int, failed: list[Sequence]) -> list[_Chunk]:
        """What comes next of every prompt that is not read, within a budget."""
        chunks: list[_Chunk] = []
        for sequence in self.scheduler.running:
            state = self._generations[sequence]
            n_tokens = min(budget, state.n_unread)
            if self._reads_together(state.n_read):
                n_tokens = min(n_tokens, _TOGETHER - state.n_read)
            elif self._piece is not None:
                n_whole = min(state.n_unread, self._piece - state.n_read % self._piece)
                n_tokens = n_whole if n_whole <= budget else 0
            if n_tokens > 0 and sequence not in failed:
                budget -= n_tokens
                chunks.append(_Chunk(sequence, state.n_read, n_tokens))
        return chunks

    def _reads_together(self, position: int) -> bool:
        return self.runner.reads_together and position < _TOGETHER

    def _groups_of(self, chunks: list[_Chunk]) -> list[list[_Chunk]]:
        """What can be read in one go."""
        together = [chunk for chunk in chunks if self._reads_together(chunk.start)]
        rest = [chunk for chunk in chunks if not self._reads_together(chunk.start)]
        return [*([together] if together else []), *_neighbours(rest, equal=self._piece is not None)]

    def _begin(self, sequence: Sequence) -> bool:
        """What a prompt needs before its first chunk; False where that failed."""
        return not halving([sequence], lambda part: self._start(part[0]), self.failures.note)[1]

    def _start(self, sequence: Sequence) -> None:
        if self.launch_ahead:
            # Who had it before may have left, or moved, before a step without numbers was read.
            self.runner.wipe(sequence.rows)
        if sequence.prompt_logprobs:
            sequence.prompt_logprobs_out = self.runner.prompt_logprobs(sequence.prompt_ids)
        blocks = self._prefixes.find(sequence.prompt_ids[:-1])
        self.runner.reuse(sequence.rows[0], blocks)
        self._generations[sequence].n_read = len(blocks) * BLOCK_TOKENS
        labels = self.name, self.runner.model_name
        metrics.reused_tokens_total.labels(*labels).inc(len(blocks) * BLOCK_TOKENS)

    def _prefill(self, group: Items[_Chunk]) -> None:
        parts = [chunk.sequence.prompt_ids[chunk.start : chunk.start + chunk.n_tokens] for chunk in group]
        if self._reads_together(group[0].start):
            places = [
                (chunk.sequence.rows[0], token, chunk.start + i)
                for chunk, part in zip(group, parts, strict=True)
                for i, token in enumerate(part)
            ]
            self.runner.read(*zip(*places, strict=True))
        else:
            self.runner.prefill(group[0].sequence.rows[0], parts, group[0].start)
        for chunk in group:
            self._generations[chunk.sequence].n_read = chunk.start + chunk.n_tokens

    def _keep(self, sequence: Sequence) -> None:
        """Leave a prompt's beginning, which has proved sound, to those that begin with the same."""
        new = self._prefixes.add(sequence.prompt_ids[:-1])
        try:
            self.runner.keep(sequence.rows[0], new)
        except Exception as error:
            self.failures.note(error, 1)
            self._prefixes.forget()

    def _row_length(self, sequence: Sequence) -> int:
        return self._generations[sequence].n_read + 1

    def _step(self) -> None:
        before, self._ahead = self._ahead, None
        self._ahead = self._take_off(before)
        under_way = self._ahead is not None
        if before is not None:
            under_way &= self._land(before)
        if under_way and not self.launch_ahead:
            ahead, self._ahead = self._ahead, None
            under_way = ahead is not None and self._land(ahead)
        if not under_way and self.scheduler.running:
            super()._step()

    def _take_off(self, before: _Ahead | None) -> _Ahead | None:
        """Launch a step of all rows behind the one that is on its way.

        None where the host must see to it, where it fails, and where everybody ends with the step before.
        """
        if self._crew is None or self._crew.owners != self.scheduler.owners:
            self._crew = _Crew.muster(self.scheduler.owners, self._generations)
        crew, drawing = self._crew, self.runner.drawing
        if drawing is None or crew.level is None:
            return None
        rows = list(zip(crew.owners, crew.states, before.draws_for(crew) if before else _NEVER, strict=False))
        if all(len(state.token_ids) + unseen >= state.params.max_new_tokens for _, state, unseen in rows):
            return None
        ids = [UNKNOWN if unseen else _next_input(sequence, state) for sequence, state, unseen in rows]
        uniform = [state.uniform(unseen) for _, state, unseen in rows]
        positions = [state.n_read for state in crew.states]
        try:
            self._tell(drawing, crew, before)
            flight = self.runner.launch(ids, positions, uniform, crew.level)
        except Exception as error:
            self._told = None
            self.failures.note(error, len(ids))
            return None
        metrics.batch_rows.labels(self.name, "decode").observe(len(ids))
        for state in crew.states:
            self._count_read(state)
        return _Ahead(flight, crew, positions, [state.n_read >= state.n_prompt for state in crew.states])

    def _tell(self, drawing: Drawing, crew: _Crew, before: _Ahead | None) -> None:
        """Let the device know what rows draw by, and what those have read that it did not see itself."""
        if self._told is not crew:
            # The first token comes of reading the last of the prompt.
            drawing.set_rules(
                [
                    RowRules(state.params, state.n_prompt - 1 + state.params.min_new_tokens)
                    for state in crew.states
                ]
            )
            self._told = crew
        seen = set(before.crew.owners) if before and crew.penalised else ()
        for row in crew.penalised:
            sequence = crew.owners[row]
            if sequence not in seen:
                drawing.set_history(row, [*sequence.prompt_ids, *crew.states[row].token_ids])

    def _land(self, ahead: _Ahead) -> bool:
        """Read what a step drew and go on; where that fails, all is as if it had never been launched."""
        try:
            token_ids, logprobs = ahead.flight.land()
        except Exception as error:
            self.failures.note(error, len(ahead.positions))
            self._drop_ahead()
            self._rewind(ahead)
            return False
        rows = [
            (sequence, Drawn(token_id, logprob, []), draws)
            for sequence, token_id, logprob, draws in zip(
                ahead.crew.owners, token_ids, logprobs, ahead.draws, strict=True
            )
            if sequence.status is SequenceStatus.RUNNING  # others have left meanwhile
        ]
        self._take({sequence: drawn for sequence, drawn, _ in rows}, [row[0] for row in rows if row[2]])
        return True

    def _drop_ahead(self) -> None:
        ahead, self._ahead, self._told = self._ahead, None, None
        if ahead is not None:
            with contextlib.suppress(Exception):
                ahead.flight.land()
            self._rewind(ahead)

    def _rewind(self, ahead: _Ahead) -> None:
        """As if a step had never been launched; the newest first."""
        for state, position in zip(ahead.crew.states, ahead.positions, strict=True):
            state.n_read = position

    def _choose(self, rows: Items[int]) -> dict[int, Drawn]:
        owners = self.scheduler.owners[rows[0] : rows[-1] + 1]
        states = [self._generations[sequence] for sequence in owners]
        pairs = list(zip(owners, states, strict=True))
        token_ids = [_next_input(sequence, state) for sequence, state in pairs]
        positions = [state.n_read for state in states]
        logits = self.runner.step(rows[0], token_ids, positions, part=self._is_part(rows))
        guards = Guards()
        for row, (sequence, state) in enumerate(pairs):
            self._guard(guards, row, sequence, state)
        logits = self.runner.guard(logits, guards)
        n_top = max(state.params.top_n_tokens for state in states)
        uniform = [state.uniform() for state in states]
        return dict(
            zip(rows, self.runner.draw(logits, self._sampling_rows(owners), uniform, n_top), strict=True)
        )

    def _guard(self, guards: Guards, row: int, sequence: Sequence, state: _Generation) -> None:
        params = state.params
        if len(state.token_ids) < params.min_new_tokens:
            guards.banned += [(row, eos_id) for eos_id in self.runner.config.eos_ids]
        guards.bias += [(row, token, amount) for token, amount in params.logit_bias]
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        if has_penalties(params):
            guards.penalty(row, [*sequence.prompt_ids, *state.token_ids], *penalties)

    def _sampling_rows(self, owners: list[Sequence]) -> SamplingRows:
        if self._rows is None or self._rows[0] != owners:
            params = [self._generations[sequence].params for sequence in owners]
            self._rows = owners, SamplingRows.stack(params, self.runner.device)
        return self._rows[1]

    def _commit(self, chosen: dict[int, Drawn], running: list[Sequence]) -> None:
        for sequence in running:
            self._count_read(self._generations[sequence])
        # A row in the middle of its prompt has read a token of it, and what was drawn is nobody's.
        ready = [s for s in running if self._generations[s].n_read >= s.n_prompt_tokens]
        self._take({s: chosen[s.rows[0]] for s in running}, ready)

    def _count_read(self, state: _Generation) -> None:
        """A step has read a row's next token; within a prompt that is read by pieces it is read again."""
        state.n_read += self._piece is None or state.n_unread == 0

    def _take(self, drawn: dict[Sequence, Drawn], ready: list[Sequence]) -> None:
        """Hand over what was drawn for those that are ready, end what has ended."""
        now = time.monotonic()
        broken = {s for s, each in drawn.items() if math.isnan(each.logprob)}
        ready = [s for s in ready if s not in broken]
        for sequence in ready:
            if not self._generations[sequence].token_ids:
                self._keep(sequence)
        gaps: list[float] = []
        reasons = {s: self._hand_over(s, drawn[s], now, gaps) for s in ready}
        for gap, n in Counter(gaps).items():  # as a rule all rows have the same one
            metrics.inter_token_seconds.labels(self.name).observe_many(gap, n)
        metrics.generated_tokens_total.labels(self.name, self.runner.model_name).inc(len(ready))
        self._wipe(list(broken))
        self._end([*broken, *(s for s in ready if reasons[s])], lambda s: self._outcome(s, reasons.get(s)))

    def _outcome(self, sequence: Sequence, reason: FinishReason | None) -> Outcome:
        return _no_number() if reason is None else [self._hypothesis(sequence, reason)]

    def _hand_over(
        self, sequence: Sequence, drawn: Drawn, now: float, gaps: list[float]
    ) -> FinishReason | None:
        """Hand over a token, and note the time since the one before; returns why it is the last, if it is."""
        state = self._generations[sequence]
        state.take(drawn)
        index = sequence.n_generated_tokens = len(state.token_ids)
        if sequence.last_token_at is None:
            metrics.time_to_first_token_seconds.labels(self.name).observe(now - sequence.submitted_at)
        else:
            gaps.append(now - sequence.last_token_at)
        sequence.last_token_at = now
        reason = self._finish_reason(state)
        top = tuple(drawn.top[: state.params.top_n_tokens])
        self._out.append(Handover(sequence, TokenEvent(index, drawn.token_id, drawn.logprob, top, reason)))
        return reason

    def _finish_reason(self, state: _Generation) -> FinishReason | None:
        if state.token_ids[-1] in self._eos_ids:
            return FinishReason.EOS
        return FinishReason.LENGTH if len(state.token_ids) >= state.params.max_new_tokens else None

    def _hypothesis(self, sequence: Sequence, reason: FinishReason) -> Hypothesis:
        state = self._generations[sequence]
        score = sum(state.logprobs) / len(state.logprobs)
        n_tokens = len(state.token_ids) - (reason is FinishReason.EOS)
        return Hypothesis(state.token_ids[:n_tokens], score, state.logprobs[:n_tokens], reason)


class Ranked(NamedTuple):
    """What a row may go on with: its likeliest tokens, and those that a phrase needs."""

    best: list[Candidate]
    wanted: list[Candidate]


@dataclass(eq=False)
class _Looking:
    """A sentence whose search is over, and what its hypotheses say of the way back so far."""

    sequence: Sequence
    group: BeamGroup
    n_to_ask: int  # of the hypotheses that have ended, in their order
    n_asked: int = 0
    returned: dict[int, float] = field(default_factory=dict)  # by place in that order; none where it failed


class TranslateLane(DecodeLane[Ranked]):
    """Beam search under continuous batching: a sentence takes a row per beam, gives all back at its end."""

    runner: TranslateRunner
    prefill_phase, params_type = "encode", BeamParams

    def __init__(self, name: str, runner: TranslateRunner, limits: DecodeLimits, prefill_tokens: int) -> None:
        super().__init__(name, runner, limits, prefill_tokens)
        self._languages = {token: name for name, token in runner.config.languages.items()}
        self._groups: dict[Sequence, BeamGroup] = {}
        self._looking: list[_Looking] = []

    def has_work(self) -> bool:
        return super().has_work() or bool(self._looking)

    def fail_all(self, error: Callable[[], EngineError]) -> Handovers:
        """As its base class, with those that have no rows any more."""
        for looking in self._looking:
            if looking.sequence.status is not SequenceStatus.ENDED:
                self._conclude(looking.sequence, lambda _: error())
        self._looking.clear()
        return super().fail_all(error)

    def _forget_departed(self) -> None:
        if self._departures:
            gone = [looking.sequence for looking in self._looking if looking.sequence.aborted]
            self._looking = [looking for looking in self._looking if not looking.sequence.aborted]
            self._end(gone, lambda _: Aborted())
        super()._forget_departed()

    def _check_length(self, sequence: Sequence) -> None:
        if sequence.n_prompt_tokens > self.limits.max_prompt_tokens:
            raise PromptTooLong(sequence.n_prompt_tokens, self.limits.max_prompt_tokens)
        if sequence.params.max_new_tokens > self.limits.max_new_tokens:
            raise PromptTooLong(sequence.params.max_new_tokens, self.limits.max_new_tokens)
        every = (ids for example in sequence.examples for ids in (example.source, example.target))
        for ids in (*every, *sequence.known):
            if len(ids) > self.limits.max_prompt_tokens:
                raise PromptTooLong(len(ids), self.limits.max_prompt_tokens)
            self._check_ids(ids)

    def _open(self, sequence: Sequence) -> None:
        assert isinstance(sequence.params, BeamParams)
        self._groups[sequence] = BeamGroup(sequence.params, self.runner.config.eos_id)

    def _forget(self, sequence: Sequence) -> None:
        self._groups.pop(sequence, None)

    def _admission_tokens(self) -> int:
        # As many as run may be set aside; who waits beyond that is bounded by the queue.
        set_aside = sum(looking.sequence.n_rows for looking in self._looking)
        return self.scheduler.prefill_tokens if set_aside < self.limits.n_slots else 0

    def _read_prompts(self, admitted: list[Sequence]) -> None:
        failed: list[Sequence] = []
        for group in _alike(admitted):
            self._note_padding([sequence.n_prompt_tokens for sequence in group])
            lost = halving(group, self._encode, self.failures.note)[1]
            failed += lost
            sound = (s for s in group if s not in lost)
            n_read = sum(bool(s.known) or self.runner.has_examples(s.rows[0]) for s in sound)
            metrics.with_examples_total.labels(self.name, self.runner.model_name).inc(n_read)
        self._end(failed, _step_failed)

    def _encode(self, group: Items[Sequence]) -> None:
        led = [*filter(self._has_examples, group)]  # whose lists hang on what the examples say
        languages = [None if sequence in led else self._listed_language(sequence) for sequence in group]
        self.runner.encode([s.rows for s in group], [s.prompt_ids for s in group], languages)
        for sequence in led:
            weight, language = self._groups[sequence].params.example_weight, self._listed_language(sequence)
            known = sequence.rows, sequence.prompt_ids, sequence.examples
            try:
                self.runner.read_examples(*known, weight, language)
            except Exception as error:  # the sentence can do without
                self.failures.note(error, 1)

    def _has_examples(self, sequence: Sequence) -> bool:
        """Are there some that may have a say? A penalty is on the model's own logits."""
        params = self._groups[sequence].params
        has_some = bool(sequence.examples) and not sequence.known
        return has_some and params.example_weight > 0 and params.repetition_penalty == 1.0

    def _listed_language(self, sequence: Sequence) -> str | None:
        """The language of a translation that a shortlist may be chosen for.

        None for what needs all logits: phrases and beginnings that are asked for may hold any token, and a
        penalty changes which tokens are likely.
        """
        params = self._groups[sequence].params
        if (
            sequence.known
            or params.required
            or params.repetition_penalty != 1.0
            or len(sequence.target_ids) > 1
        ):
            return None
        return self._languages.get(self.start_token(sequence))

    def _row_length(self, sequence: Sequence) -> int:
        return self._groups[sequence].n_steps + 1

    def start_token(self, sequence: Sequence) -> int:
        """As the sequence says, else the target language's token, which stands second in the source."""
        if sequence.target_ids:
            return sequence.target_ids[0]
        config = self.runner.config
        second = sequence.prompt_ids[1] if sequence.n_prompt_tokens > 1 else None
        return second if second in self._languages else config.bos_id or config.eos_id

    def _choose(self, rows: Items[int]) -> dict[int, Ranked]:
        running = self._owners(rows)
        inputs = self._inputs(running)
        token_ids, positions = zip(*(inputs[row] for row in rows), strict=True)
        step = rows[0], list(token_ids), list(positions)
        guards, owed = self._guards(running, rows), self._wanted(running, rows)
        width = 2 * max(sequence.n_rows for sequence in running)
        part = self._is_part(rows)
        best, wanted = self.runner.continuations(*step, width, guards, owed, part=part)
        return {row: Ranked(best[i], wanted.get(i, [])) for i, row in enumerate(rows)}

    def _inputs(self, running: list[Sequence]) -> dict[int, tuple[int, int]]:
        """Per row the token that it reads next, and its position."""
        inputs: dict[int, tuple[int, int]] = {}
        for sequence in running:
            # A row without a live beam repeats the first position; nothing reads what it writes.
            inputs |= dict.fromkeys(sequence.rows, (self.start_token(sequence), 0))
            for beam in self._groups[sequence].live:
                if beam.tokens:
                    inputs[sequence.rows[beam.row]] = beam.tokens[-1], len(beam.tokens)
        return inputs

    def _wanted(self, running: list[Sequence], rows: Items[int]) -> dict[int, list[int]]:
        """Per row of this step, the tokens that phrases need."""
        owed = (
            (sequence.rows[index], tokens)
            for sequence in running
            for index, tokens in self._groups[sequence].wanted()
        )
        return {row - rows[0]: sorted(tokens) for row, tokens in owed if row in rows}

    def _guards(self, running: list[Sequence], rows: Items[int]) -> Guards:
        guards = Guards()
        for sequence in running:
            group = self._groups[sequence]
            forced = sequence.target_ids[group.n_steps + 1 :][:1]
            if group.is_unguarded and not forced and not sequence.known:
                continue
            for index, tokens, banned in group.guards():
                row = sequence.rows[index]
                if row in rows:
                    if forced:
                        guards.forced[row - rows[0]] = forced[0]
                    elif sequence.known:
                        guards.allowed[row - rows[0]] = _after(tokens, sequence.known)
                    guards.banned += [(row - rows[0], token) for token in banned]
                    guards.penalty(row - rows[0], tokens, group.params.repetition_penalty)
        return guards

    def _commit(self, chosen: dict[int, Ranked], running: list[Sequence]) -> None:
        ranked = {s: {i: chosen[s.rows[i]] for i in self._groups[s].live_rows} for s in running}
        broken = [s for s in running if any(math.isnan(own.best[0][1]) for own in ranked[s].values())]
        sound = [s for s in running if s not in broken]
        lost = self._copy_beams({s: self._advance(s, ranked[s]) for s in sound})
        done = [s for s in sound if self._groups[s].done]
        looking = [s for s in done if self._may_return(s)]
        groups = ((sequence, self._groups[sequence]) for sequence in looking)
        self._looking += [_Looking(s, group, min(MOST_ASKED, len(group.ended))) for s, group in groups]
        ended = [s for s in done if s not in looking]
        self._wipe(broken)

        def outcome(sequence: Sequence) -> Outcome:
            return self._outcome(sequence) if sequence in ended else _no_number()

        self._end([*broken, *ended], outcome, set_aside=looking)
        self._end(lost, _step_failed)

    def _may_return(self, sequence: Sequence) -> bool:
        """Is the way back to put its hypotheses in order? It needs no rows any more then."""
        group = self._groups[sequence]
        hypotheses = [ended.tokens for ended in group.ended[:MOST_ASKED]]
        if not group.params.round_trip or len(hypotheses) < 2:
            return False
        return can_return(self.runner.config, sequence.prompt_ids, hypotheses)

    def _finish(self) -> None:
        """Ask some way back: no more a turn than may be read of sources, because everybody waits for it."""
        chosen: list[tuple[_Looking, int]] = []
        longest = 0
        unasked = (
            (looking, rank) for looking in self._looking for rank in range(looking.n_asked, looking.n_to_ask)
        )
        for looking, rank in unasked:
            n_tokens = looking.sequence.n_prompt_tokens + len(looking.group.ended[rank].tokens)
            longest = max(longest, n_tokens)  # to which all are padded
            if chosen and longest * (len(chosen) + 1) > self.scheduler.prefill_tokens:
                break
            chosen.append((looking, rank))
        for looking, _ in chosen:
            looking.n_asked += 1
        if chosen:
            metrics.batch_rows.labels(self.name, "return").observe(len(chosen))
            halving(chosen, self._ask_back, self.failures.note)
            asked = [each for each in self._looking if each.n_asked == each.n_to_ask]
            self._conclude_asked(asked)
            self._looking = [each for each in self._looking if each not in asked]

    def _ask_back(self, part: Items[tuple[_Looking, int]]) -> None:
        pairs = [(each.sequence.prompt_ids, each.group.ended[rank].tokens) for each, rank in part]
        for (looking, rank), returned in zip(part, self.runner.return_logprobs(pairs), strict=True):
            looking.returned[rank] = returned

    def _conclude_asked(self, asked: list[_Looking]) -> None:
        """Hand over what is found; where a way back failed the order of the search stays."""
        for looking in asked:
            if len(looking.returned) == looking.n_asked:
                before, *_ = looking.group.ended
                looking.group.put_in_order([looking.returned[rank] for rank in range(looking.n_asked)])
                reranked = looking.group.ended[0] is not before
                metrics.reranked_total.labels(self.name, self.runner.model_name).inc(reranked)
        self._end([looking.sequence for looking in asked], self._outcome)

    def _advance(self, sequence: Sequence, ranked: dict[int, Ranked]) -> Moves:
        best = [own.best for own in ranked.values()]
        return self._groups[sequence].advance(best, {index: own.wanted for index, own in ranked.items()})

    def _copy_beams(self, moved: dict[Sequence, Moves]) -> list[Sequence]:
        """Let beams follow their parents, but for groups that are done; returns those where that failed."""
        going_on = {s: moves for s, moves in moved.items() if not self._groups[s].done}
        copies = [
            (s.rows[source], s.rows[target]) for s, moves in going_on.items() for source, target in moves
        ]
        length = max(map(self._row_length, going_on), default=0)
        return self._copy(copies, lambda part: self.runner.copy_beams(part, length))

    def _outcome(self, sequence: Sequence) -> Outcome:
        """The hypotheses, with alignments where they were asked for."""
        hypotheses = [self._hypothesis(sequence, ended) for ended in self._groups[sequence].results()]
        sequence.n_generated_tokens = sum(len(hypothesis.token_ids) for hypothesis in hypotheses)
        metrics.generated_tokens_total.labels(self.name, self.runner.model_name).inc(
            sequence.n_generated_tokens
        )
        return hypotheses

    def _hypothesis(self, sequence: Sequence, ended: Ended) -> Hypothesis:
        assert isinstance(sequence.params, BeamParams)
        alignment = None
        if sequence.params.return_alignment:
            shifted = [self.start_token(sequence), *ended.tokens[:-1]] if ended.tokens else []
            alignment = self.runner.align(sequence.prompt_ids, shifted) if shifted else []
        reason = FinishReason.EOS if ended.finished else FinishReason.LENGTH
        return Hypothesis(ended.tokens, ended.score, ended.logprobs, reason, alignment)


def _after(tokens: list[int], known: Items[list[int]]) -> list[int]:
    """What may follow tokens with which some known translations begin."""
    n = len(tokens)
    return sorted({ids[n] for ids in known if ids[:n] == tokens and len(ids) > n})


def _alike(sequences: list[Sequence]) -> list[list[Sequence]]:
    """By length, in groups of which the longest is at most half as long again as the shortest."""
    groups: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda sequence: sequence.n_prompt_tokens):
        if groups and 2 * sequence.n_prompt_tokens <= 3 * groups[-1][0].n_prompt_tokens:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _no_number() -> StepFailed:
    return StepFailed("the model gave no number")


def _step_failed(_: Sequence) -> StepFailed:
    return StepFailed()


def make_decode_lane(
    name: str,
    checkpoint: Checkpoint,
    *,
    n_slots: int,
    prefill_tokens: int,
    max_queue_items: int,
    max_queue_tokens: int,
    max_context: int = 0,
    chunk_tokens: int | None = None,
    n_prefix_tokens: int = 0,
    launch_ahead: bool | None = None,
) -> GenerateLane | TranslateLane:
    """The lane that suits a checkpoint's architecture; 0 for `max_context` is no bound.

    The last three are for generation alone. Without a word on `launch_ahead`, a GPU does and a CPU does not,
    which works while nobody else waits.
    """
    max_len = context_len(checkpoint.config, max_context)
    # A prompt and what is generated share a row; a source and its translation do not.
    longest = max_len if isinstance(checkpoint.model, Translator) else max_len - 1
    limits = DecodeLimits(longest, max_len, n_slots, max_queue_items, max_queue_tokens)
    cuda = next(checkpoint.model.parameters()).is_cuda
    if isinstance(checkpoint.model, Translator):
        translating = TranslateRunner(checkpoint, n_slots, max_len)
        if cuda:
            translating.make_static()
        return TranslateLane(name, translating, limits, prefill_tokens)
    ahead = cuda if launch_ahead is None else launch_ahead
    generating = GenerateRunner(checkpoint, n_slots, max_len, n_prefix_tokens // BLOCK_TOKENS)
    # A CPU is faster over exactly what there is, a GPU in few shapes that it has seen.
    if cuda or ahead:
        generating.make_static()
    return GenerateLane(name, generating, limits, prefill_tokens, chunk_tokens, launch_ahead=ahead)
