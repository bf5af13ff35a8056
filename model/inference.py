"""Rewrites of a loaded model for inference alone: the same function in fewer and wider calls.

A projection fused from several, an 8-bit one, a dropout that is gone: none of it can be trained or saved, so
nothing in the model's own definition knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.block import Block, GatedFeedForward
from model.fused import (
    FusedAttention,
    FusedCrossAttention,
    FusedGatedFeedForward,
    KernelAttention,
    KernelCrossAttention,
)
from model.heads import LMHead
from model.kernel_blocks import KernelDecoder, KernelEncoder, is_suited
from model.kernels import Kernels
from model.models import CausalLM, Model, Translator
from model.quantize import Int8Linear, KernelInt8Linear

Quantization = Literal["none", "int8"]
Part = TypeVar("Part", bound=nn.Module)


def optimise(model: Model, quantization: Quantization = "none", kernels: Kernels | None = None) -> None:
    """Rewrite a model in place; with int8, for a CPU, its blocks and its vocabulary go to 8 bits.

    With kernels, for a CPU and float32 alone, attention of single queries and products of 8 bits run in C,
    with int8 all blocks of a decoder, and of an encoder over short texts.
    """
    if next(model.parameters()).dtype != torch.float32:
        kernels = None
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attention = _fuse(block.attention, kernels)
        if hasattr(block, "cross_attention"):
            block.cross_attention = _fuse_cross(block.cross_attention, kernels)
        if isinstance(block.feed_forward, GatedFeedForward):
            block.feed_forward = FusedGatedFeedForward(block.feed_forward)
        if quantization == "int8":
            _replace(block, nn.Linear, lambda linear: _eight_bits(linear.weight, linear.bias, kernels))
    _replace(model, nn.Dropout, lambda _: nn.Identity())
    if quantization == "int8":
        _replace(model, LMHead, lambda head: _eight_bits(head.tokens.weight, head.bias, kernels))
    if kernels is None:
        return
    if isinstance(model, CausalLM | Translator) and is_suited(model.decoder):
        model.decoder = KernelDecoder(model.decoder, kernels)
    if not isinstance(model, CausalLM) and is_suited(model.encoder):
        model.encoder = KernelEncoder(model.encoder, kernels)


def quantization_of(model: nn.Module) -> Quantization:
    """How a model's blocks are held."""
    return "int8" if any(isinstance(module, Int8Linear) for module in model.modules()) else "none"


def kernels_of(model: nn.Module) -> Kernels | None:
    """Those that run in a model, whose decoder then takes `RowSpans` for single queries as they are."""
    return next((module.kernels for module in model.modules() if isinstance(module, KernelAttention)), None)


def _fuse(attention: Attention, kernels: Kernels | None) -> FusedAttention:
    return FusedAttention(attention) if kernels is None else KernelAttention(attention, kernels)


def _fuse_cross(attention: Attention, kernels: Kernels | None) -> FusedCrossAttention:
    return FusedCrossAttention(attention) if kernels is None else KernelCrossAttention(attention, kernels)


def _eight_bits(weight: Tensor, bias: Tensor | None, kernels: Kernels | None) -> Int8Linear:
    if kernels is None or not kernels.has_int8:
        return Int8Linear(weight, bias)
    return KernelInt8Linear(weight, bias, kernels)


def _replace(root: nn.Module, kind: type[Part], make: Callable[[Part], nn.Module]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
