"""`python -m model.training average`: one model out of several that one training left behind.

The mean of weights from one course of learning is often better than any of them (Izmailov et al. 2018,
"Averaging Weights Leads to Wider Optima and Better Generalization").
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from model import checkpoint
from model.checkpoint import CheckpointError


def add_average_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `average`."""
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of equal models")
    parser.add_argument("--shares", type=float, nargs="+", help="of each in turn; equal when left out")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; may be one of the models")


def average_command(arguments: argparse.Namespace) -> int:
    """Write the mean; returns the exit status."""
    try:
        average(arguments.models, arguments.shares or [1.0] * len(arguments.models), arguments.out)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"average: {error}")
        return 1
    print(f"mean of {len(arguments.models)} models -> {arguments.out}")
    return 0


@torch.no_grad()
def average(folders: list[Path], shares: list[float], out: Path) -> None:
    """The mean of models, weighted by `shares`, which need not add up to 1.

    Raises ValueError where models differ in more than their weights, or shares do not fit.
    """
    if len(shares) != len(folders):
        raise ValueError(f"{len(folders)} models but {len(shares)} shares")
    if min(shares) < 0 or sum(shares) <= 0:
        raise ValueError("shares are at least 0, and not all 0")
    first, *others = (checkpoint.load(folder) for folder in folders)
    for other in others:
        config = replace(other.config, dropout=first.config.dropout)  # of training alone
        if config != first.config or other.tokenizer.files() != first.tokenizer.files():
            raise ValueError(f"{other.name} and {first.name} differ in config or tokenizer")
    mean = dict(first.model.named_parameters())
    for parameter in mean.values():
        parameter.mul_(shares[0] / sum(shares))
    for other, share in zip(others, shares[1:], strict=True):
        for name, parameter in other.model.named_parameters():
            mean[name].add_(parameter, alpha=share / sum(shares))
    checkpoint.save(out, first.model, first.tokenizer)
