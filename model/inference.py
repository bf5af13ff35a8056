"""Rewrites of a loaded model for inference alone: the same function in fewer and wider calls.

A projection fused from several, an 8-bit one, a dropout that is gone: none of it can be trained or saved, so
nothing in the model's own definition knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from model.attention import KV, Attention, Rotation
from model.block import Block, FeedForward, GatedFeedForward
from model.heads import LMHead
from model.models import Model
from model.quantize import Int8Linear

Quantization = Literal["none", "int8"]
Part = TypeVar("Part", bound=nn.Module)


def optimise(model: Model, quantization: Quantization = "none") -> None:
    """Rewrite a model in place; with int8, for a CPU, its blocks and its vocabulary go to 8 bits."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attention = FusedAttention(block.attention)
        if hasattr(block, "cross_attention"):
            block.cross_attention = FusedCrossAttention(block.cross_attention)
        if isinstance(block.feed_forward, GatedFeedForward):
            block.feed_forward = FusedGatedFeedForward(block.feed_forward)
        if quantization == "int8":
            _replace(block, nn.Linear, lambda linear: Int8Linear(linear.weight, linear.bias))
    _replace(model, nn.Dropout, lambda _: nn.Identity())
    if quantization == "int8":
        _replace(model, LMHead, lambda head: Int8Linear(head.tokens.weight, head.bias))


def _replace(root: nn.Module, kind: type[Part], make: Callable[[Part], nn.Module]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))


def join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One map with the outputs of several, in their order."""
    parameters = [dict(linear.named_parameters()) for linear in linears]
    biases = [each["bias"] for each in parameters if "bias" in each]
    n_out = sum(linear.out_features for linear in linears)
    joined = nn.Linear(linears[0].in_features, n_out, bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(torch.cat([each["weight"] for each in parameters]), requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat([*biases]), requires_grad=False)
    return joined


class FusedAttention(Attention):
    """Self-attention whose queries, keys and values come from one product, and turn together."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.n_heads, self.n_kv_heads = attention.n_heads, attention.n_kv_heads
        self.head_dim = attention.head_dim
        self.qkv_proj = join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out_proj, self.q_norm, self.k_norm = attention.out_proj, attention.q_norm, attention.k_norm
        self.has_norms = not isinstance(attention.q_norm, nn.Identity)

    def project_qkv(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, KV]:
        """x (B, T, D) -> queries (B, H, T, K), and keys and values, each (B, H_kv, T, K)."""
        n_q, n_kv = self.n_heads, self.n_kv_heads
        heads = self._split(self.qkv_proj(x), n_q + 2 * n_kv)
        turning, v = torch.split(heads, [n_q + n_kv, n_kv], dim=1)
        if self.has_norms:
            q, k = torch.split(turning, [n_q, n_kv], dim=1)
            turning = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        if rotation is not None:
            turning = _rotate(turning, rotation)
        q, k = torch.split(turning, [n_q, n_kv], dim=1)
        return q, (k, v)


class FusedCrossAttention(Attention):
    """Cross-attention whose keys and values come from one product."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.n_heads, self.n_kv_heads = attention.n_heads, attention.n_kv_heads
        self.head_dim = attention.head_dim
        self.kv_proj = join([attention.k_proj, attention.v_proj])
        self.q_proj, self.out_proj = attention.q_proj, attention.out_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def project_kv(self, x: Tensor, rotation: Rotation | None = None) -> KV:
        """x (B, S, D) -> keys and values, each (B, H_kv, S, K)."""
        k, v = self._split(self.kv_proj(x), 2 * self.n_kv_heads).chunk(2, dim=1)
        k = self.k_norm(k)
        return (k if rotation is None else _rotate(k, rotation)), v


class FusedGatedFeedForward(FeedForward):
    """A gated feed-forward network whose two inputs come from one product."""

    def __init__(self, feed_forward: GatedFeedForward) -> None:
        nn.Module.__init__(self)
        self.activation, self.down = feed_forward.activation, feed_forward.down
        self.gate_up = join([feed_forward.gate, feed_forward.up])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(self.activation(gate) * up)
        return out


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """`model.attention.rotate` in fewer calls."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    turned = (torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)
