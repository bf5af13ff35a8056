"""Low-rank adaptation (Hu et al. 2021): a frozen encoder learns through thin matrices beside its maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.adapter import DOWN, UP
from model.block import Block
from model.models import Classifier


class LowRankLinear(nn.Module):
    """A frozen map plus scale · up @ down (section 4.1 of the paper), which begins at zero."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), scale
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.normal_(self.down, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = self.linear(x) + self.scale * F.linear(F.linear(x, self.down), self.up)
        return out


def adapt(model: Classifier, rank: int, scale: float, n_layers: int) -> None:
    """Freeze a classifier but for its head, and give the maps of its top `n_layers` layers a delta each."""
    blocks = list(model.encoder.blocks)
    if not 0 <= n_layers <= len(blocks) or rank < 1:
        raise ValueError(f"{n_layers} layers of {len(blocks)}, rank {rank}")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in blocks[len(blocks) - n_layers :]:
        assert isinstance(block, Block)
        for parent in (block.attention, block.feed_forward):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, LowRankLinear(child, rank, scale))


def adapter_tensors(model: Classifier) -> dict[str, Tensor]:
    """What an adapted model has learned, by the names that `model.adapter` reads."""
    return dict(_learned(model))


def take_adapter(model: Classifier, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `adapter_tensors`. Raises ValueError where the tensors do not fit."""
    own = adapter_tensors(model)
    if _shapes(own) != _shapes(tensors):
        raise ValueError("an addition of other rank, layers or number of labels: its tensors do not fit")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])  # a view of the parameter


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _learned(model: Classifier) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield f"{name}.weight{UP}", module.up.detach()
            yield f"{name}.weight{DOWN}", module.down.detach()
    for name, parameter in model.head.named_parameters():
        yield f"head.{name}", parameter.detach()
