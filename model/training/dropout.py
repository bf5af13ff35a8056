"""Dropout with one mask for all positions of a sequence."""

from __future__ import annotations

from torch import Tensor, nn


class SharedDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask all positions share (Gal and Ghahramani 2016).

    On a CPU drawing a number for each activation costs more than the layer that it follows; here a sequence
    draws D of them.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if not self.training or self.p == 0.0:
            return x
        mask = x.new_empty(x.size(0), 1, x.size(2)).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p)


def share_dropout(model: nn.Module) -> None:
    """Put `SharedDropout` in the place of each dropout of a model."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, SharedDropout(child.p))
