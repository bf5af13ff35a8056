"""Which examples go into which batch: pure functions of a seed and an epoch, so that a run can resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
WIDTH_STEP = 4  # batches are padded to multiples of this, so that few distinct shapes occur


def padded_width(length: int, step: int = WIDTH_STEP) -> int:
    """The width that a batch with this longest row is padded to."""
    return -(-max(1, length) // step) * step


def token_budget_batches(
    lengths: Indices, budget: int, rng: np.random.Generator, step: int = WIDTH_STEP
) -> list[Indices]:
    """Cut examples into batches of at most `budget` padded tokens, neighbours of similar length together.

    lengths (N,), or (N, sides): then the longest side counts, and among examples of equal width those
    whose other sides are alike stand together. Every example occurs exactly once (one longer than the budget
    is a batch of its own); batches come in random order.
    """
    sides = lengths[:, None] if lengths.ndim == 1 else lengths
    widths = -(-np.maximum(sides, 1) // step) * step
    widest = widths.max(axis=1, initial=0)
    order = np.lexsort((rng.random(len(sides)), *-widths.T, -widest))  # long first; random among equals
    batches, start = [], 0
    while start < len(order):
        rows = max(1, budget // int(widest[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return [batches[i] for i in rng.permutation(len(batches))]


def pad(
    rows: Sequence[Sequence[int] | NDArray[np.uint16] | Indices], value: int, step: int = WIDTH_STEP
) -> Indices:
    """Rows of ids -> (B, T), padded to a multiple of `step`."""
    out = np.full((len(rows), padded_width(max(map(len, rows)), step)), value, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def sample_by_weight(weights: NDArray[np.float64], rng: np.random.Generator) -> Indices:
    """Indices in which i occurs weights[i] times: the whole part always, the fraction by chance."""
    copies = np.floor(weights).astype(np.int64)
    copies += rng.random(len(weights)) < (weights - copies)
    return np.repeat(np.arange(len(weights), dtype=np.int64), copies)


def weights_by_label(
    labels: NDArray[np.uint8], names: Sequence[str], weights: Mapping[str, float]
) -> NDArray[np.float64]:
    """How often an epoch holds each document: the weight of its label's name."""
    return np.array([weight_of(name, weights) for name in names], dtype=np.float64)[labels]


def weight_of(name: str, weights: Mapping[str, float]) -> float:
    """The weight of the longest prefix that `name` begins with; 0 where it begins with none."""
    fitting = [prefix for prefix in weights if name.startswith(prefix)]
    return weights[max(fitting, key=len)] if fitting else 0.0
