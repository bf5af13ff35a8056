"""Edges of the tensors' side that no healthy model reaches."""

import math

import torch

from app.engine.runner import GenerateRunner, Guards, MaskedRunner, TranslateRunner, Wish, responds
from model.checkpoint import Checkpoint
from model.models import MaskedLM
from model.sampling import SamplingParams, SamplingRows, sample
from tests.engine.rig import with_kernels


def test_ranks_of_rows_without_choice_or_numbers(translator: Checkpoint) -> None:
    runner = TranslateRunner(translator, 2, 64)
    ordinary, banned = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.full((4,), -torch.inf)
    broken = torch.tensor([0.0, torch.nan, 1.0, -torch.inf])
    first, second, third = runner.rank(torch.stack([ordinary, banned, broken]), 3)
    assert [token for token, _ in first] == [1, 3, 2]
    wanted = ordinary.log_softmax(-1)[[1, 3, 2]].tolist()
    assert all(math.isclose(p, q, rel_tol=1e-5) for (_, p), q in zip(first, wanted, strict=True))
    assert [p for _, p in second] == [-math.inf] * 3
    assert math.isnan(third[0][1])
    assert [len(best) for best in runner.rank(torch.zeros(1, 4), 100)] == [4]


def test_draws_of_rows_without_choice_or_numbers(causal: Checkpoint) -> None:
    runner = GenerateRunner(causal, 3, 64)
    logits = torch.tensor([[0.0, 3.0, 1.0], [-torch.inf] * 3, [0.0, torch.nan, 1.0]])
    rows = SamplingRows.stack([SamplingParams(temperature=t, top_k=2, top_p=0.9) for t in (0.0, 1.0, 1.0)])
    first, second, third = runner.draw(logits, rows, [0.5, 0.5, 0.5], 100)
    assert (first.token_id, len(first.top)) == (1, 3)
    assert math.isclose(first.logprob, logits[0].log_softmax(-1)[1].item(), rel_tol=1e-5)
    assert math.isnan(second.logprob)
    assert math.isnan(third.logprob)
    # Also where nobody reads them, and what is drawn is beside the one number that is none.
    silent = [SamplingParams(temperature=1.0, logprobs=False)] * 3
    drawn = runner.draw(logits, SamplingRows.stack(silent), [0.5, 0.5, 0.5], 0)
    assert [math.isnan(each.logprob) for each in drawn] == [False, True, True]


def test_kernels_choose_what_torch_chooses(causal: Checkpoint, translator: Checkpoint) -> None:
    """Rows with a choice, with none and with what is no number; with log-probabilities read, and greedy."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, causal.config.vocab_size)
    logits[1], logits[2, 7] = -torch.inf, torch.nan
    rows = SamplingRows.stack([SamplingParams(top_n_tokens=3)] * 5)
    drawn = [
        GenerateRunner(one, 5, 64).draw(logits, rows, [0.5] * 5, 3) for one in (causal, with_kernels(causal))
    ]
    for plain, native in zip(*drawn, strict=True):
        assert math.isnan(plain.logprob) == math.isnan(native.logprob)
        if not math.isnan(plain.logprob):
            assert plain.token_id == native.token_id
            assert [token for token, _ in plain.top] == [token for token, _ in native.top]
            assert math.isclose(plain.logprob, native.logprob, rel_tol=1e-5)
    plain_best, best = (
        TranslateRunner(one, 5, 64).rank(logits, 8) for one in (translator, with_kernels(translator))
    )
    assert all(math.isnan(logprob) for _, logprob in best[2])
    assert [logprob for _, logprob in best[1]] == [-math.inf] * 8
    for row in (0, 3, 4):
        assert [token for token, _ in best[row]] == [token for token, _ in plain_best[row]]


def test_a_neighbour_with_other_filters_changes_no_draw(causal: Checkpoint) -> None:
    """Ties at the border of top_p, which torch's sorting and the kernel may break in different ways."""
    torch.manual_seed(3)
    runner = GenerateRunner(with_kernels(causal), 5, 64)
    for _ in range(20):
        logits = (4 * torch.randn(5, causal.config.vocab_size)).round() / 4
        params = [SamplingParams(temperature=1.0, top_p=p) for p in (0.5, 0.7, 0.9, 1.0)]
        numbers = torch.rand(5).tolist()
        alone = runner.draw(logits[:4], SamplingRows.stack(params), numbers[:4], 0)
        beside = [*params, SamplingParams(temperature=1.0, typical_p=0.5)]
        crowd = runner.draw(logits, SamplingRows.stack(beside), numbers, 0)
        assert crowd[:4] == alone
        rows = SamplingRows.stack(beside[4:])
        typical = sample(logits[4:], rows, torch.tensor(numbers[4:], dtype=torch.float64))
        assert crowd[4].token_id == int(typical)
        assert math.isclose(crowd[4].logprob, logits[4].log_softmax(-1)[int(typical)], rel_tol=1e-5)


@torch.inference_mode()
def test_a_mask_does_not_feel_its_neighbours(masked: Checkpoint) -> None:
    """In 8 bits to the last bit, with other masks beside it that ask for other words and more of them."""
    torch.manual_seed(4)
    runner = MaskedRunner(with_kernels(masked, "int8"))
    hidden = torch.randn(40, masked.config.d_model)
    wishes = [
        Wish((None, "space", "no_space")[i % 3], 1 + i, [300, 301] if i % 7 == 6 else None) for i in range(40)
    ]
    together = runner.fill(hidden, wishes)
    assert together == [runner.fill(hidden[i : i + 1], [wish])[0] for i, wish in enumerate(wishes)]
    assert [len(found) for found in together[:6]] == [1, 2, 3, 4, 5, 6]
    assert runner.fill(hidden[:0], []) == []


@torch.inference_mode()
def test_first_fillings_are_ranked_by_float32(masked: Checkpoint) -> None:
    """Where eight bits alone would take a rival for the first now and then."""
    torch.manual_seed(5)
    eight = with_kernels(masked, "int8")
    assert isinstance(eight.model, MaskedLM)
    assert isinstance(masked.model, MaskedLM)
    runner, exact, hidden = MaskedRunner(eight), MaskedRunner(masked), torch.randn(200, masked.config.d_model)
    head = eight.model.mlm_head
    features = torch.stack(
        [head.features(own) for own in hidden]
    )  # the map before the projection stays float32
    rough = (head.project(features) + head.bias).masked_fill(~runner.allowed[None], -torch.inf).argmax(-1)
    wishes = [Wish(None, 5)] * len(hidden)
    firsts = [[token for token, _ in found] for found in exact.fill(hidden, wishes)]
    assert [[token for token, _ in found] for found in runner.fill(hidden, wishes)] == firsts
    assert sum(own[0] != int(first) for own, first in zip(firsts, rough, strict=True)) > 0


def test_guards_of_some_rows_are_theirs() -> None:
    guards = Guards(banned=[(0, 5), (2, 6), (3, 7)], bias=[(1, 8, 0.5), (3, 9, -1.0)], forced={2: 4, 0: 3})
    guards.penalty(1, [1, 2], 1.5, 0.25, 0.75)
    guards.penalty(3, [3], 1.25)
    own = guards.of([1, 3])
    assert own.banned == [(1, 7)]
    assert own.bias == [(0, 8, 0.5), (1, 9, -1.0)]
    assert own.histories == {0: [1, 2], 1: [3]}
    assert (own.repetition, own.frequency, own.presence) == (
        {0: 1.5, 1: 1.25},
        {0: 0.25, 1: 0.0},
        {0: 0.75, 1: 0.0},
    )
    assert not own.forced
    assert guards.of([2]) == Guards(banned=[(0, 6)], forced={0: 4})


def test_wiping_rows_spares_the_others(translator: Checkpoint) -> None:
    runner = TranslateRunner(translator, 4, 64)
    for cache in (runner.cache, runner.memory):
        cache.k.fill_(1.0)
        cache.v.fill_(torch.nan)
    runner.wipe([0, 2])
    for cache in (runner.cache, runner.memory):
        assert (cache.k[:, [0, 2]] == 0).all()
        assert (cache.v[:, [0, 2]] == 0).all()
        assert (cache.k[:, [1, 3]] == 1).all()
        assert cache.v[:, [1, 3]].isnan().all()


@torch.inference_mode()
def test_beams_that_read_one_memory_read_it_as_each_alone(translator: Checkpoint) -> None:
    """Three of one width, the last moved to the place of the first, then one of another width."""
    runner = TranslateRunner(translator, 8, 64)
    sources = [[300, 301, 302], [303, 304], [305, 306, 307, 308, 309]]
    runner.encode([[0, 1], [2, 3], [4, 5]], sources)
    widths = [_as_each_alone(runner, 6)]
    runner.move([(5, 0), (4, 1)], 1)
    widths.append(_as_each_alone(runner, 4))
    runner.encode([[4, 5, 6]], sources[:1])
    widths.append(_as_each_alone(runner, 7))
    assert widths == [2, 2, 1]
    assert runner.rows_per_memory(1, 2) == 1  # halves of two sentences, as a step tried again may read


def _as_each_alone(runner: TranslateRunner, n_rows: int) -> int:
    """Compare a step with steps of single rows; returns how many rows read one memory."""
    ids, positions = [310 + row for row in range(n_rows)], [0] * n_rows
    alone = [runner.step(row, [ids[row]], [0]) for row in range(n_rows)]
    torch.testing.assert_close(runner.step(0, ids, positions), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[2], atol=1e-2)  # other memories would show
    return runner.rows_per_memory(0, n_rows)


def test_a_device_that_is_there_responds() -> None:
    assert responds(torch.device("cpu"))
    assert not responds(torch.device("cuda", 99))
