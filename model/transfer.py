"""Numbers on their way from the host to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of (nested) numbers, which a GPU fetches in its own time: the host does not wait for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Rows of numbers, filled up to the longest with `value`: (B, longest)."""
    width = max(map(len, rows))
    return to_device([[*row, *[value] * (width - len(row))] for row in rows], device)
