"""Who runs when: waiting, running, rows, budgets. No tensors, no clock, no thread.

Active rows are 0 .. n_active - 1 without holes: when rows end, the last active rows move into their
places, and the caller moves the cache accordingly.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import Protocol

from app.engine.sequence import Sequence, SequenceStatus

Moves = list[tuple[int, int]]  # (source row, target row); no row is both
# Each further sequence of a request waits as if so many others had been admitted since the one before it.
_STRIDE = 8


class QueueLimits(Protocol):
    """The bounds of a lane's queue."""

    @property
    def max_queue_items(self) -> int: ...
    @property
    def max_queue_tokens(self) -> int: ...


def fits(n_items: int, n_tokens: int, limits: QueueLimits) -> bool:
    """Is a queue of so much within its bounds?"""
    return n_items <= limits.max_queue_items and n_tokens <= limits.max_queue_tokens


class Scheduler:
    """First come, first served, within rows and a budget of padded prompt tokens per admission.

    Who brings many sequences at once takes turns with those who come after: a text of a hundred sentences
    must not hold up a sentence. Turns are counted in admissions; the n-th sequence of a request stands in
    the queue where one would that came n strides later, so that in a crowd the text still has its turns.
    """

    def __init__(
        self, *, n_slots: int, prefill_tokens: int, max_queue_items: int, max_queue_tokens: int
    ) -> None:
        self.n_slots, self.prefill_tokens = n_slots, prefill_tokens
        self.max_queue_items, self.max_queue_tokens = max_queue_items, max_queue_tokens
        self.waiting: list[Sequence] = []  # by turn, and by arrival among equal turns
        self._clock = 0
        self.running: list[Sequence] = []
        self.owners: list[Sequence] = []  # per active row
        self.waiting_tokens = 0

    @property
    def n_active(self) -> int:
        return len(self.owners)

    def has_room(self, n_items: int, n_tokens: int) -> bool:
        """May so many more wait?"""
        return fits(len(self.waiting) + n_items, self.waiting_tokens + n_tokens, self)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue what one request brings; ask `has_room` first."""
        for place, sequence in enumerate(sequences):
            sequence.turn = self._clock + place * _STRIDE
            insort(self.waiting, sequence, key=_turn)
            self.waiting_tokens += sequence.n_prompt_tokens

    def n_before(self, n_items: int) -> int:
        """How many would be admitted before the last of so many new ones, their own among them."""
        return bisect_right(self.waiting, self._clock + (n_items - 1) * _STRIDE, key=_turn) + n_items - 1

    def drop_aborted(self) -> list[Sequence]:
        """Take the aborted out of the queue and return them."""
        gone = [sequence for sequence in self.waiting if sequence.aborted]
        if gone:
            self.waiting = [sequence for sequence in self.waiting if not sequence.aborted]
            self.waiting_tokens -= sum(sequence.n_prompt_tokens for sequence in gone)
        return gone

    def admit(self, budget: int | None = None) -> list[Sequence]:
        """Move from waiting to running what the free rows and the budget allow, and give it rows.

        The budget is in padded prompt tokens, and those of examples; without one, that of the scheduler.
        """
        budget = self.prefill_tokens if budget is None else budget
        admitted: list[Sequence] = []
        longest = n_beside = 0
        while self.waiting and budget > 0:
            head = self.waiting[0]
            longest = max(longest, head.n_prompt_tokens)
            n_beside += head.n_example_tokens
            over_budget = longest * (len(admitted) + 1) + n_beside > budget
            if head.n_rows > self.n_slots - self.n_active or (admitted and over_budget):
                break
            self.waiting.pop(0)
            self._clock = max(self._clock + 1, head.turn)  # who had it alone owes nothing for that
            self.waiting_tokens -= head.n_prompt_tokens
            head.rows = list(range(self.n_active, self.n_active + head.n_rows))
            head.status = SequenceStatus.RUNNING
            self.owners += [head] * head.n_rows
            self.running.append(head)
            admitted.append(head)
        return admitted

    def release(self, sequences: Iterable[Sequence]) -> Moves:
        """Give back the rows of sequences that ended; returns the moves that close the holes."""
        gone = set(sequences)
        freed = {row for sequence in gone for row in sequence.rows}
        self.running = [sequence for sequence in self.running if sequence not in gone]
        for sequence in gone:
            sequence.rows = []
        return self._close(freed)

    def clear(self) -> list[Sequence]:
        """Forget everything that waits or runs, and return it."""
        everything = [*self.waiting, *self.running]
        self.waiting.clear()
        self.running, self.owners, self.waiting_tokens = [], [], 0
        for sequence in everything:
            sequence.rows = []
        return everything

    def _close(self, freed: set[int]) -> Moves:
        moves: Moves = []
        for hole in sorted(freed):
            while self.owners and len(self.owners) - 1 in freed:
                self.owners.pop()
            last = len(self.owners) - 1
            if hole > last:
                break
            owner = self.owners.pop()
            owner.rows[owner.rows.index(last)] = hole
            self.owners[hole] = owner
            freed.discard(hole)
            moves.append((last, hole))
        return moves


def _turn(sequence: Sequence) -> int:
    return sequence.turn
