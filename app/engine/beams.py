"""Beam search as a policy over numbers: which beams live, which hypotheses have ended. No tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from model.decoding import normalise, repeated_ngram_tokens
from model.sampling import BeamParams

Candidate = tuple[int, float]  # token id, log-probability


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
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0


class BeamGroup:
    """The beams of one sentence, each in a row of its own (Wu et al. 2016, section 7).

    `advance` takes, for every live beam, its best continuations, and says which rows must become copies
    of which. The first child of a beam stays in its row, so only what changed is copied.
    """

    def __init__(self, params: BeamParams, eos_id: int) -> None:
        self.params, self.eos_id = params, eos_id
        self.live = [Beam(0)]
        self.ended: list[Ended] = []
        self.n_steps = 0
        self.done = False

    @property
    def live_rows(self) -> list[int]:
        """The row of each live beam, in the order that `advance` expects."""
        return [beam.row for beam in self.live]

    def guards(self) -> Iterator[tuple[int, list[int], set[int]]]:
        """Per live beam: its row, its tokens, and those it may not take next."""
        too_short = self.n_steps < self.params.min_new_tokens
        for beam in self.live:
            banned = repeated_ngram_tokens(beam.tokens, self.params.no_repeat_ngram_size)
            yield beam.row, beam.tokens, banned | {self.eos_id} if too_short else banned

    def advance(self, candidates: list[list[Candidate]]) -> list[tuple[int, int]]:
        """One step; `candidates[i]` belongs to live beam i and holds its 2k best.

        Returns copies (source row, target row) as indices into the sequence's rows; no row is both.
        """
        width = self.params.num_beams
        ranked = sorted(
            (
                (beam.total + logprob, -i, token, logprob)
                for i, (beam, own) in enumerate(zip(self.live, candidates, strict=True))
                for token, logprob in own
                if logprob > float("-inf")
            ),
            reverse=True,
        )[: 2 * width]
        chosen: list[tuple[Beam, int, float]] = []
        for rank, (_, negative, token, logprob) in enumerate(ranked):
            beam = self.live[-negative]
            if token != self.eos_id:
                if len(chosen) < width:
                    chosen.append((beam, token, logprob))
            elif rank < width:
                self._finish(beam, logprob)
        self.n_steps += 1
        if not chosen and not self.ended:  # nothing may follow: what there is must do
            self.done = True
            return []
        copies = self._grow(chosen)
        self.done = self._is_done()
        return copies

    def results(self) -> list[Ended]:
        """The best `num_return_sequences`, finished ones first; at least one, fewer where beams ran out."""
        open_ends = [
            Ended(b.tokens, b.logprobs, normalise(b.total, len(b.tokens), self.params), False)
            for b in self.live
        ]
        ranked = [*self.ended, *sorted(open_ends, key=lambda e: -e.score)]
        return ranked[: self.params.num_return_sequences]

    def _finish(self, beam: Beam, logprob: float) -> None:
        score = normalise(beam.total + logprob, len(beam.tokens) + 1, self.params)
        self.ended.append(Ended(beam.tokens, beam.logprobs, score, True))
        self.ended.sort(key=lambda e: -e.score)
        del self.ended[self.params.num_beams :]

    def _grow(self, chosen: list[tuple[Beam, int, float]]) -> list[tuple[int, int]]:
        parents = {id(beam) for beam, _, _ in chosen}
        kept = {beam.row for beam in self.live if id(beam) in parents}
        free = [row for row in range(self.params.num_beams) if row not in kept]
        at_home: set[int] = set()
        copies, grown = [], []
        for beam, token, logprob in chosen:
            row = beam.row
            if row in at_home:
                row = free.pop()
                copies.append((beam.row, row))
            at_home.add(row)
            total = beam.total + logprob
            grown.append(Beam(row, [*beam.tokens, token], [*beam.logprobs, logprob], total))
        self.live = grown
        return copies

    def _is_done(self) -> bool:
        if not self.live or self.n_steps >= self.params.max_new_tokens:
            return True
        if len(self.ended) < self.params.num_beams:
            return False
        best = max(beam.total for beam in self.live)
        return self.ended[-1].score >= normalise(best, self.n_steps, self.params)
