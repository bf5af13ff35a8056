"""The oracles themselves: greedy and beam search against each other and against trying everything."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from model.decoding import (
    Decoded,
    Scorer,
    beam_search,
    causal_scorer,
    greedy,
    normalise,
    repeated_ngram_tokens,
    translator_scorer,
)
from model.models import CausalLM, Translator, build_model
from model.sampling import BeamParams
from tests.tiny import tiny_config

EOS, V = 2, 6


def random_scorer(seed: int, vocab: int = V) -> Scorer:
    """Logits that depend on the whole prefix and on the request, without a model."""

    def score(prefixes: list[list[int]], requests: list[int]) -> Tensor:
        rows = []
        for prefix, request in zip(prefixes, requests, strict=True):
            mixed = hash((seed, request, *prefix)) % 2**31  # numbers hash alike in every process
            rows.append(torch.randn(vocab, generator=torch.Generator().manual_seed(mixed)) * 2)
        return torch.stack(rows)

    return score


def all_hypotheses(score: Scorer, max_new: int, vocab: int = V) -> Iterator[tuple[list[int], float]]:
    """Every sequence that ends within max_new tokens, the end included, and its log-probability."""
    others = [t for t in range(vocab) if t != EOS]
    for n in range(max_new):
        for tokens in product(others, repeat=n):
            total, prefix = 0.0, [1]
            for token in (*tokens, EOS):
                total += float(score([prefix], [0])[0].log_softmax(-1)[token])
                prefix = [*prefix, token]
            yield list(tokens), total


def model_scorer(architecture: str) -> Scorer:
    torch.manual_seed(13)
    model = build_model(tiny_config(architecture)).eval()
    if isinstance(model, Translator):
        return translator_scorer(model, [[6, 20, 21, 2], [6, 22, 2]])
    assert isinstance(model, CausalLM)
    return causal_scorer(model)


@pytest.mark.parametrize("architecture", ["translator", "causal_lm"])
def test_greedy_equals_beam_search_with_one_beam(architecture: str) -> None:
    score = model_scorer(architecture)
    for first in range(6, 12):
        expected = greedy(score, [1, first], EOS, 12)
        (found,) = beam_search(score, [[1, first]], EOS, BeamParams(num_beams=1, max_new_tokens=12))
        assert [d.token_ids for d in found] == [expected]


def test_greedy_equals_one_beam_where_ends_are_common() -> None:
    lengths = set()
    for seed in range(40):
        score = random_scorer(seed)
        expected = greedy(score, [1], EOS, 8)
        (found,) = beam_search(score, [[1]], EOS, BeamParams(num_beams=1, max_new_tokens=8))
        assert found[0].token_ids == expected
        assert found[0].finished == (len(expected) < 8)
        lengths.add(len(expected))
    assert len(lengths) > 5


def test_greedy_suppresses() -> None:
    score = random_scorer(3)
    assert 4 in greedy(score, [1], EOS, 8, suppress=[EOS])
    tokens = greedy(score, [1], EOS, 8, suppress=[EOS, 4])
    assert len(tokens) == 8
    assert 4 not in tokens


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all(seed: int, length_penalty: float) -> None:
    vocab, max_new = 4, 4  # 3 tokens and the end: 40 hypotheses end in time
    score = random_scorer(seed, vocab)
    params = BeamParams(128, 40, length_penalty=length_penalty, max_new_tokens=max_new)
    every = [
        (normalise(total, len(tokens) + 1, params), tokens)
        for tokens, total in all_hypotheses(score, max_new, vocab)
    ]
    (found,) = beam_search(score, [[1]], EOS, params)
    assert all(d.finished for d in found)
    assert [d.token_ids for d in found] == [tokens for _, tokens in sorted(every, reverse=True)]
    assert [d.score for d in found] == pytest.approx(sorted((s for s, _ in every), reverse=True))


def best(score: Scorer, params: BeamParams, n: int = 1) -> list[list[Decoded]]:
    return beam_search(score, [[1]] * n, EOS, params)


def test_more_beams_are_never_worse_here() -> None:
    """Not a law of beam search, but with an exact search at the end of the row it must hold there."""
    for seed in range(10):
        score = random_scorer(seed, 4)
        scores = [best(score, BeamParams(k, max_new_tokens=4))[0][0] for k in (1, 128)]
        if all(d.finished for d in scores):
            assert scores[0].score <= scores[1].score + 1e-6


def test_length_penalty_prefers_longer() -> None:
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        found = [
            best(random_scorer(s), BeamParams(8, length_penalty=penalty, max_new_tokens=10))
            for s in range(20)
        ]
        lengths.append(sum(len(rows[0][0].token_ids) for rows in found))
    assert lengths[0] < lengths[1] < lengths[2]


def test_n_best_is_ordered_and_distinct() -> None:
    for seed in range(10):
        (found,) = best(random_scorer(seed), BeamParams(5, 5, max_new_tokens=8))
        assert len(found) == 5
        scores = [d.score for d in found if d.finished]
        assert scores == sorted(scores, reverse=True)
        assert len({(tuple(d.token_ids), d.finished) for d in found}) == 5


@pytest.mark.parametrize("num_beams", [1, 3])
def test_minimum_and_maximum_length(num_beams: int) -> None:
    for seed in range(20):
        params = BeamParams(num_beams, max_new_tokens=6, min_new_tokens=4)
        tokens = best(random_scorer(seed), params)[0][0].token_ids
        assert 4 <= len(tokens) <= 6
    params = BeamParams(num_beams, max_new_tokens=6, min_new_tokens=6)
    (found,) = best(random_scorer(0), params)
    assert len(found[0].token_ids) == 6
    assert not found[0].finished


def ngrams(tokens: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_comes_twice(size: int) -> None:
    repeated = 0
    for seed in range(15):
        score = random_scorer(seed)
        plain = BeamParams(3, max_new_tokens=12, length_penalty=2.0)
        free = ngrams(best(score, plain)[0][0].token_ids, size)
        repeated += len(free) > len(set(free))
        guarded = BeamParams(3, max_new_tokens=12, length_penalty=2.0, no_repeat_ngram_size=size)
        found = ngrams(best(score, guarded)[0][0].token_ids, size)
        assert len(found) == len(set(found))
    assert repeated  # or the test would hold without the guard


def test_repeated_ngram_tokens() -> None:
    assert repeated_ngram_tokens([5, 6, 7, 5, 6], 3) == {7}
    assert repeated_ngram_tokens([5, 6, 5, 7, 5], 2) == {6, 7}
    assert repeated_ngram_tokens([5, 6], 1) == {5, 6}
    assert repeated_ngram_tokens([5, 6], 3) == set()
    assert repeated_ngram_tokens([5, 5, 5], 0) == set()


def test_repetition_penalty_makes_repeats_rarer() -> None:
    def repeats(penalty: float) -> int:
        params = BeamParams(2, max_new_tokens=12, min_new_tokens=12, repetition_penalty=penalty)
        rows = [best(random_scorer(seed, 30), params)[0][0].token_ids for seed in range(10)]
        return sum(len(row) - len(set(row)) for row in rows)

    assert repeats(1.0) > repeats(5.0)


def test_requests_do_not_meet() -> None:
    """Several prompts in one call give what each gives alone."""
    score = random_scorer(21)
    params = BeamParams(3, 3, max_new_tokens=7)
    together = beam_search(score, [[1], [1, 4], [1, 5, 3]], EOS, params)
    for i, prompt in enumerate([[1], [1, 4], [1, 5, 3]]):

        def alone(prefixes: list[list[int]], requests: list[int], i: int = i) -> Tensor:
            return score(prefixes, [i] * len(requests))

        assert beam_search(alone, [prompt], EOS, params) == [together[i]]


def test_more_sequences_than_beams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_return_sequences 3 is not in 1\.\.num_beams 2"):
        BeamParams(num_beams=2, num_return_sequences=3)
