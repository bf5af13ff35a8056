"""The numbers that products are made of while a model trains."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def multiplies_bf16(device: str) -> bool:
    """Does a kind of device, "cpu" or "cuda", have products of bfloat16 that are faster than float32's?

    An x86 processor without instructions for them is five times as slow (torch 2.13, AVX2). Of others, and of
    GPUs, it is taken for granted: who asks for bfloat16 there knows it.
    """
    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001  # there is no public one


def autocast(device: str, *, bf16: bool) -> torch.autocast:
    """Products in bfloat16, where that is wanted and pays."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16 and multiplies_bf16(device))
