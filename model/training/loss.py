"""Cross-entropy over a large vocabulary without ever holding all its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 4096  # rows of logits that are held at a time, in hidden's dtype
_ROWS = 64  # of these in float32 at a time on a processor: at 16,000 pieces they stay within its cache


def softmax_gradient_(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The summed loss; in the place of the logits its gradient by them, without the labels' own term.

    logits (R, V); labels (R, 1) -> (). What stands in logits afterwards: softmax(logits) - smoothing / V.
    """
    shifted = logits.float() - logits.amax(-1, keepdim=True).float()
    total = shifted.exp().sum(-1, keepdim=True)
    off = smoothing / logits.size(-1)
    loss = (total.log() - (1 - smoothing) * shifted.gather(1, labels)).sum() - off * shifted.sum()
    logits.copy_(shifted.exp() / total - off)  # compiled, nothing of this is ever stored in float32
    return loss


_chosen = softmax_gradient_


def compile_loss(wanted: bool) -> None:
    """Whether `linear_cross_entropy` compiles its softmax; on a CPU this takes a C++ compiler."""
    global _chosen
    _chosen = torch.compile(softmax_gradient_, dynamic=False) if wanted else softmax_gradient_


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed beside the loss, chunk by chunk, because it needs the same softmax."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        frozen = not ctx.needs_input_grad[1]
        grad_weight = None if frozen else torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        w = weight.to(hidden.dtype)
        turned = w.t().contiguous()  # as a view it makes the product half as fast on a processor
        b = None if bias is None else bias.to(hidden.dtype)
        rows = _ROWS if hidden.device.type == "cpu" else _CHUNK
        for start in range(0, hidden.size(0), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            h, y = hidden[chunk], labels[chunk]
            logits = h @ turned if b is None else torch.addmm(b, h, turned)  # (chunk, V)
            for part in (slice(first, first + rows) for first in range(0, len(h), rows)):
                # The rest is of many sizes, and each would be compiled.
                gradient_ = _chosen if len(y[part]) == rows else softmax_gradient_
                total += gradient_(logits[part], y[part, None], smoothing)
            logits[torch.arange(len(h), device=h.device), y] -= 1 - smoothing
            grad_hidden[chunk] = logits @ w
            if grad_weight is not None:
                grad_weight += logits.t() @ h
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        n = max(1, hidden.size(0))
        saved = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(*(g if g is None else g.div_(n) for g in saved))
        return total / n

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (g if g is None else g * upstream for g in ctx.saved_tensors)
        return *grads, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of cross_entropy(hidden @ weight.T + bias, labels), smoothed as torch does it.

    hidden (N, D), weight (V, D), labels (N,), all of them real. The product runs in hidden's dtype, or in
    autocast's where that is on; the softmax in float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # once, or each product inside would cast again
        hidden = hidden.to(torch.get_autocast_dtype(device))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing)  # type: ignore[no-untyped-call]
    return loss
