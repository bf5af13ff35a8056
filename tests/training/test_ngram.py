"""The yardstick: a distribution at every place, equal to counting by hand, at home in what it has seen."""

from collections import Counter

import numpy as np
import pytest

from model.training.ngram import NGram

BOS = 0


def by_hand(sequences: list[list[int]], vocab: int, n: int, context: list[int], word: int) -> float:
    """The same model, slow and obvious: dictionaries of tuples, the recursion of the paper."""
    counts = [Counter[tuple[int, ...]]() for _ in range(n + 1)]
    for s in sequences:
        for k in range(1, n + 1):
            counts[k].update(tuple(s[i : i + k]) for i in range(len(s) - k + 1))
    used = [Counter[tuple[int, ...]]() for _ in range(n + 1)]
    used[n] = counts[n]
    for k in range(1, n):
        before = Counter(gram[1:] for gram in counts[k + 1])
        used[k] = Counter({g: c if g[0] == BOS else before[g] for g, c in counts[k].items()})
    used[1][(BOS,)] = 0

    def discounts(k: int) -> list[float]:
        n_of = [sum(c == i for c in used[k].values()) for i in range(1, 5)]
        if not all(n_of):
            return [0.0, 0.5, 0.5, 0.5]
        y = n_of[0] / (n_of[0] + 2 * n_of[1])
        return [0.0, *(max(0.0, i - (i + 1) * y * n_of[i] / n_of[i - 1]) for i in (1, 2, 3))]

    def p(history: tuple[int, ...]) -> float:
        k = len(history) + 1
        lower = 1 / vocab if not history else p(history[1:])
        following = {g: c for g, c in used[k].items() if g[:-1] == history}
        total = sum(following.values())
        if not total:
            return lower
        d = discounts(k)
        spare = sum(min(c, d[min(c, 3)]) for c in following.values())
        own = following.get((*history, word), 0)
        return (own - min(own, d[min(own, 3)]) + spare * lower) / total

    return p(tuple(context[-(n - 1) :]) if n > 1 else ())


def random_sequences(n: int, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[BOS, *(rng.zipf(1.6, rng.integers(1, 12)) % (vocab - 1) + 1).tolist()] for _ in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_equal_to_counting_by_hand(n: int) -> None:
    sequences = random_sequences(60, 9)
    model = NGram(sequences, 9, n)
    for text in random_sequences(8, 9, seed=1):
        expected = [by_hand(sequences, 9, n, text[:i], text[i]) for i in range(1, len(text))]
        np.testing.assert_allclose(2 ** model.log2_probabilities(text), expected, rtol=1e-12)


def test_probabilities_sum_to_one_after_any_context() -> None:
    model = NGram(random_sequences(40, 9), 9, 5)
    for context in ([BOS], [BOS, 1, 1], [BOS, 8, 7, 6, 5, 4], [BOS, 1, 2, 1, 1, 3]):
        found = [2 ** model.log2_probabilities([*context, word])[-1] for word in range(9)]
        assert sum(found) == pytest.approx(1.0)


def test_a_text_it_has_seen_is_no_surprise() -> None:
    text = [BOS, *range(1, 40)]
    model = NGram([text, [BOS, 3, 3, 3]], 50, 5)
    seen, other = (
        model.log2_probabilities(text).mean(),
        model.log2_probabilities(text[:1] + text[:0:-1]).mean(),
    )
    assert seen > -1.5
    assert other < -4.0


def test_nothing_to_count_is_said() -> None:
    with pytest.raises(ValueError, match="no text"):
        NGram([], 9)
    with pytest.raises(ValueError, match="order of 0"):
        NGram([[0, 1]], 9, 0)
