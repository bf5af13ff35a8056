"""Sampling against naive loops, and its distribution by counting."""

import math

import pytest
import torch
from torch import Tensor

from model.sampling import (
    SamplingParams,
    SamplingRows,
    likeliest,
    penalise,
    sample,
    top_k_mask,
    top_p_mask,
    top_tokens,
    typical_mask,
)

V = 24


def random_logits(rows: int, seed: int = 14) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def kept(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


def test_top_k_against_a_loop() -> None:
    logits, top_k = random_logits(6), torch.tensor([0, 1, 3, V, V + 5, 7])
    for row, k, found in zip(logits.tolist(), top_k.tolist(), kept(top_k_mask(logits, top_k)), strict=True):
        best = sorted(range(V), key=lambda t: -row[t])
        assert found == set(best[: k or V])


def naive_nucleus(weights: list[tuple[float, float]], limit: float) -> set[int]:
    """Tokens in the order of a key until their probability reaches the limit; (key, probability) each."""
    found, total = set(), 0.0
    for token in sorted(range(len(weights)), key=lambda t: weights[t][0]):
        found.add(token)
        total += weights[token][1]
        if total >= limit:
            break
    return found


@pytest.mark.parametrize("limit", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_top_p_and_typical_against_a_loop(limit: float) -> None:
    logits = random_logits(8)
    limits = torch.full((8,), limit)
    nucleus, typical = kept(top_p_mask(logits, limits)), kept(typical_mask(logits, limits))
    for row, by_p, by_surprise in zip(logits.double().softmax(-1).tolist(), nucleus, typical, strict=True):
        assert by_p == naive_nucleus([(-p, p) for p in row], limit)
        entropy = -sum(p * math.log(p) for p in row)
        assert by_surprise == naive_nucleus([(abs(-math.log(p) - entropy), p) for p in row], limit)


def test_typical_bears_tokens_that_cannot_be() -> None:
    logits = random_logits(2)
    logits[:, 5:] = -torch.inf
    assert all(
        tokens <= set(range(5)) and tokens for tokens in kept(typical_mask(logits, torch.tensor([0.5, 0.99])))
    )


def test_penalties_against_a_loop() -> None:
    logits = random_logits(3)
    history = torch.tensor([[4, 4, 7, -1], [0, 1, 2, 3], [-1, -1, -1, -1]])
    repetition, frequency = torch.tensor([1.3, 1.0, 2.0]), torch.tensor([0.5, 0.25, 1.0])
    before = logits.clone()
    found = penalise(logits, history, repetition, frequency)
    for b, row in enumerate(before.tolist()):
        for token, logit in enumerate(row):
            count = history[b].tolist().count(token)
            expected = logit - count * frequency[b].item()
            if count:
                factor = repetition[b].item()
                expected = expected / factor if expected > 0 else expected * factor
            assert found[b, token].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(logits, before)


def draw(logits: Tensor, params: SamplingParams, n: int, seed: int) -> Tensor:
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sample(logits.expand(n, V), SamplingRows.stack([params] * n), uniform)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=6),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.2, typical_p=0.7),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, typical_p=0.9),
    ],
)
def test_distribution_by_counting(params: SamplingParams) -> None:
    """Pearson's statistic stays below its mean by six deviations."""
    n = 20_000
    logits = random_logits(1) / params.temperature
    if params.top_k:
        logits = logits.masked_fill(~top_k_mask(logits, torch.tensor([params.top_k])), -torch.inf)
    if params.top_p < 1:
        logits = logits.masked_fill(~top_p_mask(logits, torch.tensor([params.top_p])), -torch.inf)
    if params.typical_p < 1:
        logits = logits.masked_fill(~typical_mask(logits, torch.tensor([params.typical_p])), -torch.inf)
    expected = logits.double().softmax(-1)[0] * n
    counts = torch.bincount(draw(random_logits(1), params, n, seed=15), minlength=V).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_zero_temperature_is_greedy() -> None:
    logits = random_logits(5)
    rows = SamplingRows.stack([SamplingParams()] * 5)
    assert torch.equal(sample(logits, rows, torch.rand(5)), logits.argmax(-1))


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.7),
    SamplingParams(temperature=1.0, typical_p=0.5),
    SamplingParams(temperature=1.0, top_k=3, top_p=0.9),
]


def test_neighbours_do_not_matter() -> None:
    for seed in range(50):
        logits = random_logits(len(PARAMS), seed)
        uniform = torch.rand(len(PARAMS), generator=torch.Generator().manual_seed(seed))
        together = sample(logits, SamplingRows.stack(PARAMS), uniform)
        for i, params in enumerate(PARAMS):
            alone = sample(logits[i : i + 1], SamplingRows.stack([params]), uniform[i : i + 1])
            assert together[i] == alone[0]


@pytest.mark.parametrize("edge", [0.0, 1.0 - 2**-24])
def test_the_edges_of_the_uniform_number_draw_possible_tokens(edge: float) -> None:
    logits = torch.full((1, V), -torch.inf)
    logits[0, 3], logits[0, 9] = 1.0, 0.5
    rows = SamplingRows.stack([SamplingParams(temperature=1.0)])
    token = sample(logits, rows, torch.tensor([edge])).item()
    assert token == (3 if edge == 0.0 else 9)


@pytest.mark.parametrize("size", [40, 128, 256, 300, 512, 1280])
def test_the_likeliest_by_chunks_are_the_likeliest(size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(5, size)
    logits[1] = -torch.inf
    logits[2, size // 2] = torch.nan
    logits[3, [size - 1, size // 3]] = 9.0  # of equals the first
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    for n_best in (1, 3, 8, size, size + 1):
        values, indices = top_tokens(logits, n_best)
        wanted = logits.topk(min(n_best, size), dim=-1)
        assert torch.equal(values[[0, 1, 3, 4]], wanted.values[[0, 1, 3, 4]])
        assert torch.equal(indices[[0, 4]], wanted.indices[[0, 4]])
        assert torch.equal(logits.gather(1, indices)[3], values[3])
        assert values[2, 0].isnan()
