"""Batches, the schedule and the loss: pure functions."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.training import loss as loss_module
from model.training.batches import WIDTH_STEP, pad, padded_width, sample_by_weight, token_budget_batches
from model.training.loss import compile_loss, linear_cross_entropy
from model.training.schedule import Schedule


@pytest.mark.parametrize("seed", range(3))
def test_every_example_once_within_the_budget(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 90, 1000)
    batches = token_budget_batches(lengths, 512, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    for batch in batches:
        assert len(batch) * padded_width(int(lengths[batch].max())) <= 512
        assert np.ptp(lengths[batch]) < 30  # neighbours are of similar length
    widths = {padded_width(int(lengths[batch].max())) for batch in batches}
    assert len(widths) <= 90 / WIDTH_STEP + 1


def test_of_two_sides_the_longer_counts_and_alike_ones_stand_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, (4000, 2))
    batches = token_budget_batches(lengths, 512, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(4000))
    sums = np.zeros(2)
    for batch in batches:
        widest = lengths[batch].max(axis=0)
        assert len(batch) * padded_width(int(widest.max())) <= 512
        sums += lengths[batch].sum(), sum(padded_width(int(width)) for width in widest) * len(batch)
    assert sums[0] > 0.88 * sums[1]  # 0.82 where only the longer side is looked at


def test_too_long_an_example_is_a_batch_of_its_own() -> None:
    batches = token_budget_batches(np.array([100, 3, 200]), 64, np.random.default_rng(0))
    assert sorted(map(sorted, (b.tolist() for b in batches))) == [[0], [1], [2]]


def test_batches_follow_from_the_seed() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 500)
    first, same, other = (token_budget_batches(lengths, 512, np.random.default_rng(s)) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=False))


def test_no_example_no_batch() -> None:
    assert token_budget_batches(np.array([], dtype=np.int64), 64, np.random.default_rng(0)) == []


def test_pad() -> None:
    assert pad([[1, 2, 3], []], 9).tolist() == [[1, 2, 3, 9], [9] * 4]
    assert pad([[1, 2, 3, 4, 5]], 9).shape == (1, 8)
    assert padded_width(8) == 8
    assert padded_width(9) == 12
    assert padded_width(0) == 4


def test_sample_by_weight() -> None:
    counts = np.zeros(4)
    for seed in range(200):
        found = sample_by_weight(np.array([2.0, 0.0, 0.25, 1.5]), np.random.default_rng(seed))
        counts += np.bincount(found, minlength=4)
    assert counts[0] == 400
    assert counts[1] == 0
    assert 25 < counts[2] < 80
    assert 260 < counts[3] < 340


def test_schedule_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, warmup=10, decay=0.4)
    factors = [schedule(step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert set(factors[10:61]) == {1.0}
    assert all(a > b for a, b in pairwise(factors[60:]))
    assert factors[-1] == pytest.approx(1 / 40)
    assert schedule(100) == 0.0
    assert [schedule(step) for step in reversed(range(100))] == factors[::-1]  # no state


def test_schedule_edges() -> None:
    assert [Schedule(3, warmup=0, decay=0.0)(s) for s in range(3)] == [1.0, 1.0, 1.0]
    assert [Schedule(4, warmup=0, decay=1.0)(s) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    for values in ({"steps": 0}, {"steps": 5, "warmup": -1}, {"steps": 5, "decay": 1.5}):
        with pytest.raises(ValueError, match="a schedule of"):
            Schedule(**values)


def both(n: int, bias: bool, smoothing: float) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients, ours and torch's."""
    results = []
    for ours in (True, False):
        torch.manual_seed(16)
        hidden, weight = torch.randn(n, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)
        b = torch.randn(30, requires_grad=True) if bias else None
        labels = torch.randint(0, 30, (n,))
        if ours:
            loss = linear_cross_entropy(hidden, weight, labels, bias=b, label_smoothing=smoothing)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight, b), labels, label_smoothing=smoothing)
        (3 * loss).backward()  # type: ignore[no-untyped-call]
        grads = [t.grad for t in (hidden, weight, b) if t is not None and t.grad is not None]
        results.append([loss.detach(), *grads])
    return results[0], results[1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy_is_torchs(
    bias: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK", 7)
    monkeypatch.setattr(loss_module, "_ROWS", 3)
    for n in (1, 7, 20):
        ours, theirs = both(n, bias, smoothing)
        assert len(ours) == 4 if bias else 3
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_the_compiled_loss_is_the_same(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(loss_module, "_ROWS", 8)
    compile_loss(True)
    request.addfinalizer(lambda: compile_loss(False))
    for mine, other in zip(*both(20, bias=True, smoothing=0.1), strict=True):
        torch.testing.assert_close(mine, other)


def test_linear_cross_entropy_of_large_logits() -> None:
    hidden, weight = torch.full((2, 4), 30.0, requires_grad=True), torch.randn(5, 4) * 30
    labels = torch.tensor([0, 4])
    ours, theirs = linear_cross_entropy(hidden, weight, labels), F.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    torch.manual_seed(17)
    labels = torch.randint(0, 30, (6,))
    hidden, weight, bias = torch.randn(6, 12), torch.randn(30, 12), torch.randn(30)
    whole = {"hidden": hidden, "weight": weight, "bias": bias}
    part = {name: t.clone().requires_grad_(name != frozen) for name, t in whole.items()}
    whole = {name: t.clone().requires_grad_() for name, t in whole.items()}
    for t in (whole, part):
        loss = linear_cross_entropy(t["hidden"], t["weight"], labels, bias=t["bias"])
        loss.backward()  # type: ignore[no-untyped-call]
    assert part[frozen].grad is None
    for name in whole.keys() - {frozen}:
        torch.testing.assert_close(part[name].grad, whole[name].grad)


def test_no_rows_no_loss() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), bias=torch.zeros(5))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()
