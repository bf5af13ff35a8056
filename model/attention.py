"""Attention: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.

The shape legend, used everywhere:

    B batch · T queries · S keys · H heads · K head_dim · D d_model · V vocabulary · L layers · N slots
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import TransformerConfig
from model.masks import Mask, MaskParts, RowSpans

KV = tuple[Tensor, Tensor]  # keys and values, each (B, H, S, K)
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (B, 1, T, K / 2)


class Cache(Protocol):
    """What an attention sees of `model.cache.LayerCache`: buffers for kernels, `update` for others."""

    @property
    def k(self) -> Tensor: ...  # (N, H, S_max, K)
    @property
    def v(self) -> Tensor: ...
    @property
    def first(self) -> int: ...
    @property
    def origins(self) -> Tensor | None: ...
    def update(self, k: Tensor, v: Tensor) -> KV: ...


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention(Q, K, V) = softmax(Q Kᵀ / √K) V, equation 1 of the paper.

    q (B, H, T, K); k and v (B, H, S, K); mask bool, True = may attend, broadcastable to (B, H, T, S).
    Returns the output (B, H, T, K) and the weights (B, H, T, S). A query that may attend to nothing
    gives zeros.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of coordinates of x (B, H, T, K) by its position's angle (RoFormer, Su et al. 2021)."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)  # each (B, H, T, K / 2)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).to(x.dtype)


def _gather(q: Tensor, n_groups: int) -> Tensor:
    """Neighbouring rows of q (B, H, T, K) as the queries of one: (groups, H, B / groups * T, K)."""
    batch, n_heads, length, head_dim = q.shape
    groups = q.reshape(n_groups, batch // n_groups, n_heads, length, head_dim)
    return groups.transpose(1, 2).reshape(n_groups, n_heads, -1, head_dim)


class Attention(nn.Module):
    """Multi-head attention, section 3.2.2, for self- and cross-attention alike.

    It never knows a mode: it takes the queries' source and a (k, v) pair. Who supplies the pair is
    the caller's business: `project_kv` of the same input, a cache, or a projected memory.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d_model = config.d_model
        d_q, d_kv = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(d_model, d_q, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, d_kv, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, d_kv, bias=qkv_bias)
        self.out_proj = nn.Linear(d_q, d_model, bias=out_bias)
        # Queries and keys of one length (Henry et al. 2020), head by head.
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def project_kv(self, x: Tensor, rotation: Rotation | None = None) -> KV:
        """x (B, S, D) -> keys and values, each (B, H_kv, S, K)."""
        k = self.k_norm(self._split(self.k_proj(x), self.n_kv_heads))
        v = self._split(self.v_proj(x), self.n_kv_heads)
        return (k if rotation is None else rotate(k, rotation)), v

    def project_qkv(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, KV]:
        """All three of one input: queries (B, H, T, K), and keys and values, each (B, H_kv, T, K)."""
        return self.project_q(x, rotation), self.project_kv(x, rotation)

    def forward(self, x: Tensor, kv: KV, mask: Mask | None, rotation: Rotation | None = None) -> Tensor:
        """x (B, T, D), kv each (B, H_kv, S, K), mask broadcastable to (B, 1, T, S) -> (B, T, D)."""
        return self.attend(self.project_q(x, rotation), kv, mask)

    def attend_cached(
        self, x: Tensor, cache: Cache, mask: Mask | None, rotation: Rotation | None = None
    ) -> Tensor:
        """x (B, T, D) over all that a cache holds once it has x's keys and values -> (B, T, D)."""
        q, kv = self.project_qkv(x, rotation)
        return self.attend(q, cache.update(*kv), mask)

    def attend(self, q: Tensor, kv: KV, mask: Mask | None) -> Tensor:
        """Projected queries (B, H, T, K) over kv, each (B, H_kv, S, K) -> (B, T, D).

        Where kv has fewer rows, so many neighbouring rows of queries as go into it read one of them, and the
        mask has a row for each row of kv and none for single queries: the beams of a sentence, which read
        its memory together.
        """
        k, v = kv
        if k.size(0) != q.size(0):
            return self.attend(_gather(q, k.size(0)), kv, mask).view(q.size(0), q.size(2), -1)
        if isinstance(mask, RowSpans):
            mask = mask.as_mask(k.size(2))
        if not isinstance(mask, MaskParts):
            return self._merge(self.fused_kernel(q, k, v, mask))
        outs = [
            self.fused_kernel(q[first:last], k[first:last, :, :length], v[first:last, :, :length], own)
            for first, last, length, own in mask.parts
        ]
        return self._merge(torch.cat(outs))

    def fused_kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (B, H, T, K) over k and v (B, H_kv, S, K), mask broadcastable to (B, H, T, S) -> (B, H, T, K)."""
        grouped = self.n_kv_heads != self.n_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    def weights(self, q: Tensor, kv: KV, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same as `attend` by the readable reference, and the attention weights (B, H, T, S)."""
        k, v = kv
        group = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        return self._merge(out), weights

    def project_q(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """x (B, T, D) -> queries (B, H, T, K)."""
        q = self.q_norm(self._split(self.q_proj(x), self.n_heads))
        return q if rotation is None else rotate(q, rotation)

    def _split(self, x: Tensor, n_heads: int) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, n_heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)

    def _merge(self, out: Tensor) -> Tensor:
        batch, _, length, _ = out.shape
        merged: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, -1))  # (B, T, D)
        return merged
