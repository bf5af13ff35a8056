"""Dropout that all positions of a sequence share."""

import torch
from torch import nn

from model.models import build_model
from model.training.dropout import SharedDropout, share_dropout
from tests.tiny import tiny_config


def test_all_positions_of_a_sequence_lose_the_same() -> None:
    torch.manual_seed(0)
    dropout, x = SharedDropout(0.25), torch.ones(200, 5, 40)
    out = dropout(x)
    assert (out == out[:, :1]).all()
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(out.mean().item() - 1) < 0.02
    assert (out[0] != out[1]).any()


def test_nothing_is_lost_in_use() -> None:
    x = torch.randn(2, 3, 4)
    assert SharedDropout(0.5).eval()(x) is x
    assert SharedDropout(0.0)(x) is x


def test_a_model_shares_every_dropout() -> None:
    model = build_model(tiny_config("translator", dropout=0.3))
    number = sum(isinstance(m, nn.Dropout) for m in model.modules())
    share_dropout(model)
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())
    assert [m.p for m in model.modules() if isinstance(m, SharedDropout)] == [0.3] * number
    assert number >= 7  # each sub-layer's, and inside each feed-forward network
