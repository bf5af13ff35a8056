"""Attention for training on a CPU: plain matrix products instead of the fused kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention


def use_plain_products(model: nn.Module) -> None:
    """Let every attention of a model multiply plainly.

    The fused kernel's backward in bf16 is a dozen times slower on a CPU than its forward, and torch's own
    plain fallback copies queries, keys and mask on the way.
    """
    for module in model.modules():
        if isinstance(module, Attention) and module.n_heads == module.n_kv_heads:
            module.fused_kernel = attention  # type: ignore[method-assign]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`scaled_dot_product_attention` of q (B, H, T, K) over k and v (B, H, S, K).

    mask is broadcastable to (B, H, T, S). In autocast's dtype where that is on. A query that may attend to
    nothing attends to all alike, which only padding does.
    """
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    batch, heads, length, width = q.shape
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(low), k.to(low), v.to(low)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.reshape(batch * heads, x.size(2), width) for x in (q, k, v))
        bias = q.new_zeros(1, 1, 1)
        if mask is not None:
            bias = q.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(q.dtype).min / 2)
            bias = bias.expand(batch, heads, length, k.size(1)).reshape(batch * heads, length, -1)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=1 / math.sqrt(width))  # (B H, T, S)
        return torch.bmm(scores.softmax(-1), v).view(batch, heads, length, width)
