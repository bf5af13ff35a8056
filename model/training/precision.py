"""The numbers that products are made of while a model trains."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiplies_bf16(device: str) -> bool:
    """Does a kind of device, "cpu" or "cuda", have products of bfloat16 that are faster than float32's?

    A processor without instructions for them is five times as slow (torch 2.13, AVX2).
    """
    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001  # no public one


def autocast(device: str, *, bf16: bool) -> torch.autocast:
    """Products in bfloat16, where that is wanted and pays."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16 and multiplies_bf16(device))
