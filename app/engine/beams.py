"""Beam search as a policy over numbers: which beams live, which hypotheses have ended. No tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from model.constraints import LEAST_LOGPROB, Progress, share_out
from model.decoding import may_stop, normalise, repeated_ngram_tokens
from model.round_trip import best_first
from model.sampling import BeamParams

Candidate = tuple[int, float]  # token id, log-probability
_NEVER = float("-inf")


@dataclass(frozen=True)
class Ended:
    """A hypothesis that can grow no further."""

    tokens: list[int]
    logprobs: list[float]
    score: float
    finished: bool


@dataclass
class Beam:
    """A hypothesis that still grows."""

    row: int  # index into the sequence's rows
    progress: Progress
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0


class _Option(NamedTuple):
    """A live beam with one more token."""

    beam: Beam
    token: int
    logprob: float
    progress: Progress


class BeamGroup:
    """The beams of one sentence, each in a row of its own (Wu et al. 2016, section 7).

    `advance` takes, for every live beam, its best continuations, and says which rows must become copies
    of which. The first child of a beam stays in its row, so only what changed is copied.
    """

    def __init__(self, params: BeamParams, eos_id: int) -> None:
        self.params, self.eos_id = params, eos_id
        self.live = [Beam(0, Progress(params.required))]
        self.ended: list[Ended] = []
        self.n_steps = 0
        self.done = False

    @property
    def live_rows(self) -> list[int]:
        """The row of each live beam, in the order that `advance` expects."""
        return [beam.row for beam in self.live]

    @property
    def is_unguarded(self) -> bool:
        """May every beam take any token next, and is none penalised?"""
        params = self.params
        free = not params.required and params.no_repeat_ngram_size == 0 and params.repetition_penalty == 1.0
        return free and self.n_steps >= params.min_new_tokens

    def guards(self) -> Iterator[tuple[int, list[int], set[int]]]:
        """Per live beam: its row, its tokens, and those it may not take next."""
        too_short = self.n_steps < self.params.min_new_tokens
        for beam in self.live:
            banned = repeated_ngram_tokens(beam.tokens, self.params.no_repeat_ngram_size)
            banned |= beam.progress.banned(beam.tokens)
            yield beam.row, beam.tokens, banned | {self.eos_id} if too_short else banned

    def wanted(self) -> Iterator[tuple[int, set[int]]]:
        """Per live beam that still owes a phrase: its row, and the tokens that would further it."""
        return ((beam.row, beam.progress.wanted()) for beam in self.live if not beam.progress.complete)

    def advance(
        self, candidates: list[list[Candidate]], wanted: Mapping[int, list[Candidate]] | None = None
    ) -> list[tuple[int, int]]:
        """One step; `candidates[i]` belongs to live beam i and holds its 2k best; `wanted` has those that
        `wanted()` named, by row.

        Returns copies (source row, target row) as indices into the sequence's rows; no row is both.
        """
        chosen = self._finish_and_choose(self._options(candidates, wanted or {}))
        self.n_steps += 1
        if not chosen and not self.ended:  # nothing may follow: what there is must do
            self.done = True
            return []
        copies = self._grow(chosen)
        self.done = self._is_done()
        return copies

    def _options(
        self, candidates: list[list[Candidate]], wanted: Mapping[int, list[Candidate]]
    ) -> list[_Option]:
        """What the live beams may become, best first. Nothing ends before it has met its phrases."""
        width = 2 * self.params.num_beams
        required = bool(self.params.required)
        ranked: list[tuple[float, int, int, float]] = []
        for i, (beam, own) in enumerate(zip(self.live, candidates, strict=True)):
            # How many there are of them hangs on the neighbours; what is chosen must not.
            possible: Iterable[Candidate] = own[:width]
            if required and not beam.progress.complete:
                forced = dict(possible) | self._forced(beam, own, wanted.get(beam.row, []))
                forced.pop(self.eos_id, None)
                possible = forced.items()
            ranked += [
                (beam.total + logprob, -i, token, logprob) for token, logprob in possible if logprob > _NEVER
            ]
        ranked.sort(reverse=True)
        if not required:  # as a rule: there is no progress to be made
            beams = ((self.live[-i], token, logprob) for _, i, token, logprob in ranked[:width])
            return [_Option(beam, token, logprob, beam.progress) for beam, token, logprob in beams]
        return [
            _Option(self.live[-i], token, logprob, self.live[-i].progress.take(token))
            for _, i, token, logprob in ranked
        ]

    def _forced(self, beam: Beam, own: list[Candidate], wanted: Iterable[Candidate]) -> dict[int, float]:
        """Tokens of a phrase that are not among the likeliest: where they are not far from it, else late."""
        ends = self.eos_id in (token for token, _ in own[: self.params.num_beams])
        late = self.params.max_new_tokens - self.n_steps <= beam.progress.n_missing + 1
        begun = bool(beam.progress.begun)
        return {
            token: logprob for token, logprob in wanted if ends or late or begun or logprob > LEAST_LOGPROB
        }

    def _finish_and_choose(self, options: list[_Option]) -> list[_Option]:
        """Note the hypotheses that end here; returns the options that live on, best first."""
        width = self.params.num_beams
        cut = self._cuts_at(self.n_steps + 1)
        free = not self.params.required  # as a rule: every hypothesis is complete, and all have one rank
        complete = options if free else [option for option in options if option.progress.complete]
        for option in complete[:width]:
            if option.token == self.eos_id or cut:
                self._finish(option)
        going_on = [option for option in options if option.token != self.eos_id]
        if free:
            return going_on[:width]
        return share_out(((option.progress.rank, option) for option in going_on), width)

    def put_in_order(self, returned: Sequence[float]) -> None:
        """Rank what has ended anew, knowing how likely each makes its source."""
        found = [(ended.score, len(ended.tokens) + 1) for ended in self.ended]
        self.ended = best_first(self.ended, found, returned, self.params)

    def results(self) -> list[Ended]:
        """The best `num_return_sequences`, finished ones first, then those that have met most phrases.

        At least one, fewer where beams ran out.
        """
        open_ends = sorted(self.live, key=lambda b: (-len(b.progress.met), -self._score(b)))
        if self.ended and self._cuts_at(self.n_steps):  # those that count are among the ended
            open_ends = []
        ranked = self.ended + [Ended(b.tokens, b.logprobs, self._score(b), False) for b in open_ends]
        return ranked[: self.params.num_return_sequences]

    def _cuts_at(self, n_steps: int) -> bool:
        """Do hypotheses that are cut here compete with those that ended?"""
        return self.params.early_stopping is not None and n_steps >= self.params.max_new_tokens

    def _score(self, beam: Beam) -> float:
        return normalise(beam.total, len(beam.tokens), self.params)

    def _finish(self, option: _Option) -> None:
        tokens, logprobs = option.beam.tokens, option.beam.logprobs
        score = normalise(option.beam.total + option.logprob, len(tokens) + 1, self.params)
        finished = option.token == self.eos_id
        if not finished:
            tokens, logprobs = [*tokens, option.token], [*logprobs, option.logprob]
        self.ended.append(Ended(tokens, logprobs, score, finished))
        self.ended.sort(key=lambda e: -e.score)
        del self.ended[self.params.num_beams :]

    def _grow(self, chosen: list[_Option]) -> list[tuple[int, int]]:
        parents = {id(option.beam) for option in chosen}
        kept = {beam.row for beam in self.live if id(beam) in parents}
        free = [row for row in range(self.params.num_beams) if row not in kept]
        at_home: set[int] = set()
        copies, grown = [], []
        for option in chosen:
            beam, row = option.beam, option.beam.row
            if row in at_home:
                row = free.pop()
                copies.append((beam.row, row))
            at_home.add(row)
            tokens, logprobs = [*beam.tokens, option.token], [*beam.logprobs, option.logprob]
            grown.append(Beam(row, option.progress, tokens, logprobs, beam.total + option.logprob))
        self.live = grown
        return copies

    def _is_done(self) -> bool:
        if not self.live or self.n_steps >= self.params.max_new_tokens:
            return True
        if len(self.ended) < self.params.num_beams:
            return False
        best = max(beam.total for beam in self.live)
        return may_stop(self.ended[-1].score, best, self.n_steps, self.params)
