"""Phrases that a translation must contain: which of them a hypothesis has met, and what furthers the rest.

Lexically constrained beam search after Post & Vilar 2018 ("Fast Lexically Constrained Decoding with Dynamic
Beam Allocation"): the beams are shared out among hypotheses that have come equally far, because one that has
just been made to say a phrase looks worse than its rivals until its next tokens make up for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# A phrase is put where the model gives its next token this much at least, or else before the end.
LEAST_LOGPROB = -6.0


@dataclass(frozen=True)
class Phrase:
    """Spellings in tokens (with a space before it or without, say), one of which must occur.

    A phrase that may stand `once` only is not said again. Between tokens of `apart`, its own among them, it
    does not count and does not go on: digits beside a number make another number.
    """

    spellings: tuple[tuple[int, ...], ...]
    once: bool = False
    apart: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.spellings or not all(self.spellings):
            raise ValueError("a phrase needs spellings of one token or more")


@dataclass(frozen=True)
class Progress:
    """How far a hypothesis has come: the phrases it has met, and its last tokens where they begin another."""

    phrases: tuple[Phrase, ...]
    met: frozenset[int] = frozenset()
    begun: tuple[int, ...] = ()
    before: int | None = None  # the token that what is begun follows
    # What has been said, but may be the beginning of another: 20 counts once no 0 of a 200 comes behind it.
    held: int | None = None

    @property
    def complete(self) -> bool:
        return len(self.met) == len(self.phrases)

    @property
    def rank(self) -> tuple[int, int]:
        """Hypotheses of one rank compete with each other; a higher one is further."""
        return len(self.met), len(self.begun)

    @property
    def n_missing(self) -> int:
        """So many tokens complete it at most, when every one of them furthers it.

        The longest spellings count: beside what must stay apart only the one with a space may be possible.
        What begins another counts once something else comes behind it, which is one token more.
        """
        unmet = [phrase for _, phrase in self._unmet()]
        tokens = sum(max(map(len, phrase.spellings)) for phrase in unmet)
        begins = sum(any(_begins(phrase, other) for other in unmet) for phrase in unmet)
        return tokens + begins - len(self.begun)

    def take(self, token: int) -> Progress:
        """After one more token."""
        if self.complete:
            return self
        held, begun, before = self.held, (*self.begun, token), self.before
        if held is not None and token in self.phrases[held].apart:
            held = None
        if held is not None and not self._goes_on(begun, before):
            now, held = Progress(self.phrases, self.met | {held}), None
        else:
            now = self
        while begun:
            said = now._said(begun, before)
            if now._continuations(begun, before):
                return Progress(self.phrases, now.met, begun, before, held if said is None else said)
            if said is not None:
                return Progress(self.phrases, now.met | {said}, (), token)
            before, begun = begun[0], begun[1:]
        return Progress(self.phrases, now.met, (), before)

    def wanted(self) -> set[int]:
        """The tokens that further it."""
        return self._continuations(self.begun, self.before)

    def banned(self, tokens: Sequence[int]) -> set[int]:
        """The tokens that, after these, would say again what may stand once, or go on where it must end.

        What goes on with a longer phrase is none of them.
        """
        again: set[int] = set()
        beside: set[int] = set()
        for phrase in (self.phrases[i] for i in self.met):
            for spelling in phrase.spellings:
                if phrase.once and _ends_with(tokens, spelling[:-1]):
                    again.add(spelling[-1])
                if phrase.apart and _ends_with(tokens, spelling):
                    beside |= phrase.apart
        if not (again or beside):
            return set()
        wanted = self.wanted()
        return (again - wanted) | (beside - wanted if self.begun else beside)

    def _unmet(self) -> Iterable[tuple[int, Phrase]]:
        return ((i, phrase) for i, phrase in enumerate(self.phrases) if i not in self.met)

    def _goes_on(self, begun: tuple[int, ...], before: int | None) -> bool:
        return self._said(begun, before) is not None or bool(self._continuations(begun, before))

    def _said(self, begun: tuple[int, ...], before: int | None) -> int | None:
        """The unmet phrase that is just this."""
        return next((i for i, phrase in self._unmet() if begun in _possible(phrase, before)), None)

    def _continuations(self, begun: tuple[int, ...], before: int | None) -> set[int]:
        n = len(begun)
        spellings = (s for _, phrase in self._unmet() for s in _possible(phrase, before))
        return {s[n] for s in spellings if len(s) > n and s[:n] == begun}


def _begins(phrase: Phrase, other: Phrase) -> bool:
    """Does a spelling of one begin a longer one of the other?"""
    return any(
        len(short) < len(long) and long[: len(short)] == short
        for short in phrase.spellings
        for long in other.spellings
    )


def _possible(phrase: Phrase, before: int | None) -> Iterable[tuple[int, ...]]:
    """The spellings that count after a token."""
    return (s for s in phrase.spellings if before not in phrase.apart or s[0] not in phrase.apart)


def _ends_with(tokens: Sequence[int], end: tuple[int, ...]) -> bool:
    return tuple(tokens[len(tokens) - len(end) :]) == end


def share_out(ranked: Iterable[tuple[tuple[int, int], T]], width: int) -> list[T]:
    """Up to `width` of what comes with its rank, best first: one of each rank in turn, the furthest first.

    Where all have the same rank that is the first `width` of them.
    """
    banks: dict[tuple[int, int], list[T]] = {}
    for rank, each in ranked:
        banks.setdefault(rank, []).append(each)
    chosen: list[T] = []
    for turn in range(width):
        for rank in sorted(banks, reverse=True):
            if turn < len(banks[rank]) and len(chosen) < width:
                chosen.append(banks[rank][turn])
    return chosen
