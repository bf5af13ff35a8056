"""Parts of a model in fewer and wider calls, for inference alone; `model.inference` puts them in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention import KV, Attention, Cache, Rotation
from model.block import FeedForward, GatedFeedForward
from model.kernels import Kernels
from model.masks import Mask, RowSpans


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


class KernelAttention(FusedAttention):
    """The same, with a kernel from the projected token to what its heads have read."""

    def __init__(self, attention: Attention, kernels: Kernels) -> None:
        super().__init__(attention)
        self.kernels = kernels

    def attend_cached(
        self, x: Tensor, cache: Cache, mask: Mask | None, rotation: Rotation | None = None
    ) -> Tensor:
        """x (B, T, D) over all that a cache holds once it has x's keys and values -> (B, T, D)."""
        if not isinstance(mask, RowSpans):
            return super().attend_cached(x, cache, mask, rotation)
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        if self.has_norms:
            parts = torch.split(qkv, [self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
            qkv = torch.cat((self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]), dim=1)
        out = self.kernels.self_attention(
            qkv, cache.k, cache.v, cache.first, self.n_heads, mask.last, mask.first, rotation, cache.origins
        )
        merged: Tensor = self.out_proj(out[:, None])
        return merged


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


class KernelCrossAttention(FusedCrossAttention):
    """The same, with a kernel for single queries; those of one memory read it one after another."""

    def __init__(self, attention: Attention, kernels: Kernels) -> None:
        super().__init__(attention)
        self.kernels = kernels

    def attend(self, q: Tensor, kv: KV, mask: Mask | None) -> Tensor:
        """Projected queries (B, H, T, K) over kv, each (B / G, H_kv, S, K) -> (B, T, D)."""
        k, v = kv
        from_cache = k.stride() == v.stride() and k.stride(2) == self.head_dim
        if not isinstance(mask, RowSpans) or not from_cache:
            return super().attend(q, kv, mask)
        merged: Tensor = self.out_proj(
            self.kernels.stored_attention(q.contiguous(), k, v, mask.last)[:, None]
        )
        return merged


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
