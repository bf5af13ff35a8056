"""Cross-entropy over a large vocabulary without ever holding all its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 256  # rows of logits at a time: at 16,000 pieces they stay within a processor's cache


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed beside the loss, chunk by chunk, because it needs the same softmax."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        w = weight.to(hidden.dtype)
        off = smoothing / weight.size(0)
        for start in range(0, hidden.size(0), _CHUNK):
            part = slice(start, start + _CHUNK)
            h, y = hidden[part], labels[part, None]
            logits = (h @ w.t()).float()  # (chunk, V)
            if bias is not None:
                logits += bias
            log_z = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_z - (1 - smoothing) * logits.gather(1, y)).sum()
            if smoothing:
                total -= off * logits.sum()
            grad = logits.sub_(log_z).exp_().sub_(off)
            grad.scatter_add_(1, y, torch.full_like(y, -(1 - smoothing), dtype=grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            low = grad.to(hidden.dtype)
            grad_hidden[part] = low @ w
            grad_weight += low.t() @ h
        n = max(1, hidden.size(0))
        saved = (grad_hidden, grad_weight) if grad_bias is None else (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(*(g / n for g in saved))
        return total / n

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *rest = ctx.saved_tensors
        bias = rest[0] * upstream if rest else None
        return grad_hidden * upstream, grad_weight * upstream, bias, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of cross_entropy(hidden @ weight.T + bias, labels), smoothed as torch does it.

    hidden (N, D), weight (V, D), labels (N,), all of them real. The product runs in hidden's dtype, the
    softmax in float32.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing)  # type: ignore[no-untyped-call]
    return loss
