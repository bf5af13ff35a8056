"""A 5-gram model as a yardstick: interpolated, modified Kneser-Ney (Chen and Goodman 1998, section 3).

An n-gram is a number: its place among the sorted keys of its order. Its key is the number of its first n - 1
tokens times V plus its last token, so that a context's continuations lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.training.batches import Indices
from model.training.shards import Shard

Floats = NDArray[np.float64]
_UNKNOWN = -1


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length; contexts are the (n - 1)-grams, by number."""

    keys: Indices  # sorted
    discounted: Floats  # count less its discount, per n-gram
    totals: Floats  # sum of the counts, per context
    spare: Floats  # what the discounts took, per context


class NGram:
    """Next-token probabilities from counts; a sequence begins with a token that is never predicted."""

    def __init__(self, sequences: Iterable[Sequence[int] | Indices], vocab_size: int, n: int = 5) -> None:
        if n < 1:
            raise ValueError(f"an order of {n}")
        self.vocab_size, self.n = vocab_size, n
        tokens, depth = _joined(sequences)
        if not len(tokens):
            raise ValueError("no text to count")
        numbers = [np.zeros(len(tokens), dtype=np.int64)]  # of the 0-gram that ends at each token
        keys, examples = [], []
        for order in range(1, n + 1):
            own = self._keys(tokens, depth, numbers[-1], order)
            known = own >= 0
            found, first, inverse = np.unique(own[known], return_index=True, return_inverse=True)
            number = np.full(len(tokens), _UNKNOWN, dtype=np.int64)
            number[known] = inverse
            numbers.append(number)
            keys.append(found)
            examples.append(np.flatnonzero(known)[first])  # a place where each n-gram stands
        self.orders = [self._order(order, keys, examples, numbers, depth) for order in range(1, n + 1)]

    def _order(
        self,
        order: int,
        keys: list[Indices],
        examples: list[Indices],
        numbers: list[Indices],
        depth: Indices,
    ) -> _Order:
        """Counts, at the highest order, else the number of different tokens seen before (2.2.7)."""
        own, n_grams = keys[order - 1], len(keys[order - 1])
        seen = numbers[order][numbers[order] >= 0]
        counts = np.bincount(seen, minlength=n_grams)
        if order < self.n:
            suffixes = numbers[order][examples[order]]
            different = np.bincount(suffixes, minlength=n_grams)
            # What begins a sequence has nothing before it: its plain count stands.
            begins = depth[examples[order - 1]] == order - 1
            counts = np.where(begins, counts, different)
        contexts = own // self.vocab_size
        n_contexts = len(keys[order - 2]) if order > 1 else 1
        if order == 1:  # what begins a sequence is no prediction
            counts = np.where(depth[examples[0]] == 0, 0, counts)
        discounts = _discounts(counts)
        taken = np.minimum(discounts[np.minimum(counts, 3)], counts)
        totals = np.bincount(contexts, weights=counts, minlength=n_contexts)
        spare = np.bincount(contexts, weights=taken, minlength=n_contexts)
        return _Order(own, *(a.astype(np.float64) for a in (counts - taken, totals, spare)))

    def log2_probabilities(self, sequence: Sequence[int] | Indices) -> Floats:
        """log2 p of every token after the first, given all before it (T - 1,)."""
        tokens = np.asarray(sequence, dtype=np.int64)
        depth = np.arange(len(tokens))
        p = np.full(len(tokens), 1.0 / self.vocab_size)
        number = np.zeros(len(tokens), dtype=np.int64)
        for order, table in enumerate(self.orders, 1):
            keys = self._keys(tokens, depth, number, order)
            context = np.where(keys >= 0, keys // self.vocab_size, 0)
            total = np.where(keys >= 0, table.totals[context], 0.0)
            place = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
            number = np.where((keys >= 0) & (table.keys[place] == keys), place, _UNKNOWN)
            mass = np.where(number >= 0, table.discounted[place], 0.0)
            known = total > 0
            p[known] = (mass[known] + table.spare[context[known]] * p[known]) / total[known]
        out: Floats = np.log2(p[1:])
        return out

    def _keys(self, tokens: Indices, depth: Indices, shorter: Indices, order: int) -> Indices:
        """The key of the n-gram that ends at each token; `_UNKNOWN` where the sequence is too short for one,
        or its context is in no n-gram. `shorter` numbers the (n - 1)-grams that end at each token."""
        if order == 1:
            return tokens.copy()
        context = np.concatenate(([_UNKNOWN], shorter[:-1]))
        usable = (context >= 0) & (depth >= order - 1)
        return np.where(usable, context * self.vocab_size + tokens, _UNKNOWN)


def shard_sequences(shard: Shard, bos_id: int, max_tokens: int = 0, seed: int = 0) -> Iterator[Indices]:
    """The documents of a shard in random order, each after `bos_id`, until `max_tokens`; 0 takes all."""
    total = 0
    for document in np.random.default_rng(seed).permutation(len(shard)):
        ids = np.concatenate(([bos_id], *shard.document(int(document)))).astype(np.int64)
        if max_tokens and total + len(ids) > max_tokens:
            ids = ids[: max_tokens - total]
        total += len(ids)
        yield ids
        if max_tokens and total >= max_tokens:
            return


def _discounts(counts: Indices) -> Floats:
    """What is taken from counts of 0, 1, 2, and 3 or more (3.1, equation 17)."""
    n = [int((counts == i).sum()) for i in range(1, 5)]
    if not all(n):  # too little text for the estimate
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[0] / (n[0] + 2 * n[1])
    return np.array([0.0, *(max(0.0, i - (i + 1) * y * n[i] / n[i - 1]) for i in (1, 2, 3))])


def _joined(sequences: Iterable[Sequence[int] | Indices]) -> tuple[Indices, Indices]:
    """All tokens in a row, and how far each is from the beginning of its sequence."""
    parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    depth = np.concatenate([np.arange(len(part), dtype=np.int64) for part in parts])
    return np.concatenate(parts), depth
