"""Attention masks: bool, True = may attend, broadcastable to (B, H, T, S)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def padding_mask(token_ids: Tensor, pad_id: int) -> Tensor:
    """token_ids (B, S) -> (B, 1, 1, S): every query may attend to every real token."""
    return (token_ids != pad_id)[:, None, None, :]


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """(1, 1, T, T): position t may attend to positions up to and including t (section 3.2.3)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """lengths (B,) -> (B, 1, 1, S): the first lengths[b] of `size` positions."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None, :]


def position_mask(positions: Tensor, size: int) -> Tensor:
    """positions (B, T) of the queries in their rows -> (B, 1, T, S): everything up to themselves."""
    return (torch.arange(size, device=positions.device) <= positions[..., None])[:, None]


def window_mask(positions: Tensor, size: int, window: int) -> Tensor:
    """positions (B, T) of the queries in their rows -> (B, 1, T, S): the last `window` up to themselves.

    Sliding-window attention (Beltagy et al. 2020, section 3.1), where key s stands at position s.
    """
    first = positions - window
    return (torch.arange(size, device=positions.device) > first[..., None])[:, None]


def document_mask(documents: Tensor) -> Tensor:
    """documents (B, T), an id per token -> (B, 1, T, T): causal, within the own document only."""
    same = documents[:, :, None] == documents[:, None, :]
    return same[:, None] & causal_mask(documents.size(1), documents.device)


@dataclass(frozen=True)
class MaskParts:
    """Masks of neighbouring rows that read different lengths: (first, last + 1, length, mask or None).

    Rows with a short past beside one with a long past would else all read as much as the longest.
    """

    parts: tuple[tuple[int, int, int, Tensor | None], ...]


@dataclass(frozen=True)
class RowSpans:
    """What the only query of a row may read: positions first .. last, each (B,); without `first`, from 0 on.

    The form that kernels for such queries take. With `rows` (B,) several queries stand in one row of a cache,
    each at its `last` position: those are the rows' numbers in the cache's view. Blocks that run in one call
    know what to do with them, masks do not.
    """

    last: Tensor
    first: Tensor | None = None
    rows: Tensor | None = None

    def window(self, size: int) -> RowSpans:
        """The last `size` positions of each span that begins at 0."""
        return RowSpans(self.last, (self.last - (size - 1)).clamp(min=0), self.rows)

    def as_mask(self, size: int) -> Tensor:
        """(B, 1, 1, S) over `size` positions."""
        mask = length_mask(self.last + 1, size)
        return mask if self.first is None else mask & ~length_mask(self.first, size)


Mask = Tensor | MaskParts | RowSpans


def split_by_length(lengths: list[int], part_cost: int) -> list[tuple[int, int, int]]:
    """Neighbouring rows in parts (first, last + 1, longest): two classes of length, where that saves reading.

    `part_cost` is what another part must save, in positions read.
    """
    n_rows, longest = len(lengths), max(lengths)
    best_cost, limit = n_rows * longest, longest
    for n_short, length in enumerate(sorted(lengths), 1):
        # At worst every long row stands alone among short ones.
        n_long = n_rows - n_short
        cost = n_short * length + n_long * longest + 2 * n_long * part_cost
        if cost < best_cost:
            best_cost, limit = cost, length
    parts: list[tuple[int, int, int]] = []
    for row, length in enumerate(lengths):
        if parts and (parts[-1][2] <= limit) == (length <= limit):
            first, _, before = parts[-1]
            parts[-1] = first, row + 1, max(before, length)
        else:
            parts.append((row, row + 1, length))
    return parts
