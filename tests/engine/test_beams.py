"""The beams' policy against the oracle, on tables of random numbers instead of a model."""

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from app.engine.beams import BeamGroup, Candidate, Ended
from model.constraints import Phrase
from model.decoding import Decoded, beam_search, normalise
from model.sampling import BeamParams

EOS, START = 0, 1


class Table:
    """Next-token logits as a fixed random function of the prefix."""

    def __init__(self, seed: int, n_tokens: int, eos_bonus: float) -> None:
        self.seed, self.n_tokens, self.eos_bonus = seed, n_tokens, eos_bonus

    def logits(self, prefix: list[int]) -> list[float]:
        rng = random.Random(f"{self.seed} {prefix}")
        values = [rng.gauss(0, 2) for _ in range(self.n_tokens)]
        values[EOS] += self.eos_bonus
        return values

    def score(self, prefixes: list[list[int]], _: list[int]) -> Tensor:
        return torch.tensor([self.logits(prefix) for prefix in prefixes], dtype=torch.float64)

    def logprobs(self, prefix: list[int], banned: set[int]) -> dict[int, float]:
        """Of all tokens, best first."""
        return dict(self.best(prefix, banned, self.n_tokens))

    def best(self, prefix: list[int], banned: set[int], n_best: int) -> list[Candidate]:
        """The most probable tokens, those that are banned last, as the runner ranks them."""
        logits = [-math.inf if t in banned else x for t, x in enumerate(self.logits(prefix))]
        total = math.log(sum(math.exp(x) for x in logits)) if set(logits) != {-math.inf} else 0.0
        ranked = sorted(((x - total, -t) for t, x in enumerate(logits)), reverse=True)
        return [(-t, x) for x, t in ranked[:n_best]]


def search(numbers: Table, params: BeamParams) -> list[Ended]:
    """Drive a group; `rows` stands for the cache, whose rows must hold what their beams have read."""
    group = BeamGroup(params, EOS)
    rows: list[list[int]] = [[] for _ in range(params.num_beams)]
    while not group.done:
        for beam in group.live:
            rows[beam.row] = [*beam.tokens]
        logprobs = {row: numbers.logprobs([START, *tokens], banned) for row, tokens, banned in group.guards()}
        candidates = [list(each.items())[: 2 * params.num_beams] for each in logprobs.values()]
        wanted = {row: [(token, logprobs[row][token]) for token in tokens] for row, tokens in group.wanted()}
        copies = group.advance(candidates, wanted)
        assert not {source for source, _ in copies} & {target for _, target in copies}
        for source, target in copies:
            rows[target] = list(rows[source])
        if not group.done:
            assert len(set(group.live_rows)) == len(group.live) <= params.num_beams
            assert [rows[beam.row] for beam in group.live] == [beam.tokens[:-1] for beam in group.live]
    assert group.n_steps <= params.max_new_tokens
    return group.results()


def check(found: list[Ended], wanted: list[Decoded]) -> None:
    assert [e.tokens for e in found] == [d.token_ids for d in wanted]
    assert [e.finished for e in found] == [d.finished for d in wanted]
    assert [e.score for e in found] == pytest.approx([d.score for d in wanted])
    assert all(len(e.logprobs) == len(e.tokens) for e in found)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    num_beams = rng.randint(1, 6)
    params = BeamParams(
        num_beams=num_beams,
        num_return_sequences=rng.randint(1, num_beams),
        length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0, -1.0]),
        max_new_tokens=rng.randint(1, 12),
        min_new_tokens=rng.choice([0, 0, 3]),
        no_repeat_ngram_size=rng.choice([0, 0, 1, 2, 3]),
    )
    numbers = Table(seed, rng.choice([7, 12, 40]), rng.choice([-3.0, 0.0, 2.0]))
    (wanted,) = beam_search(numbers.score, [[START]], EOS, params)
    check(search(numbers, params), wanted)


def test_more_beams_than_tokens() -> None:
    params = BeamParams(num_beams=8, num_return_sequences=8, max_new_tokens=4)
    numbers = Table(3, 3, 0.0)
    (wanted,) = beam_search(numbers.score, [[START]], EOS, params)
    check(search(numbers, params), wanted)


def test_beams_die_when_all_that_follows_is_banned() -> None:
    """Tokens 1 and 2 may stand once each; where neither is left, only the end is."""
    params = BeamParams(num_beams=4, num_return_sequences=4, max_new_tokens=9, no_repeat_ngram_size=1)
    found = search(Table(0, 3, -20.0), params)
    assert {tuple(e.tokens) for e in found} <= {(), (1,), (2,), (1, 2), (2, 1)}
    assert all(e.finished for e in found)
    assert len(found) == 4


def test_with_nothing_left_to_say_the_best_beams_are_the_answer() -> None:
    """Two tokens, once each, and the end is banned too: the search stops where it stands."""
    params = BeamParams(num_beams=2, max_new_tokens=9, min_new_tokens=9, no_repeat_ngram_size=1)
    (best,) = search(Table(0, 3, 0.0), params)
    assert sorted(best.tokens) == [1, 2]
    assert not best.finished


def test_what_is_banned_at_once_still_has_an_answer() -> None:
    group = BeamGroup(BeamParams(num_beams=2), EOS)
    assert group.advance([[(0, -math.inf), (1, -math.inf)]]) == []
    assert group.done
    assert [(e.tokens, e.finished) for e in group.results()] == [([], False)]


def test_the_first_child_stays_in_its_row() -> None:
    group = BeamGroup(BeamParams(num_beams=3), EOS)
    assert group.live_rows == [0]
    copies = group.advance([[(5, -1.0), (6, -2.0), (7, -3.0), (8, -4.0)]])
    assert {source for source, _ in copies} == {0}
    assert {target for _, target in copies} == {1, 2}
    assert group.advance([[(5, -1.0)], [(6, -1.0)], [(7, -1.0)]]) == []


def test_an_end_beyond_the_first_k_does_not_count() -> None:
    group = BeamGroup(BeamParams(num_beams=2), EOS)
    group.advance([[(5, -1.0), (6, -2.0), (EOS, -3.0), (7, -4.0)]])
    assert group.ended == []
    assert [beam.tokens for beam in group.live] == [[5], [6]]


def count(tokens: list[int], phrase: Phrase) -> int:
    return sum(
        tuple(tokens[i : i + len(spelling)]) == spelling
        for spelling in phrase.spellings
        for i in range(len(tokens))
    )


def says(tokens: list[int], phrase: Phrase) -> bool:
    return count(tokens, phrase) > 0


@pytest.mark.parametrize("seed", range(40))
def test_every_hypothesis_says_its_phrases(seed: int) -> None:
    """However unlikely they are, with few beams, and in the very last tokens that are left."""
    rng = random.Random(seed)
    phrases = tuple(
        Phrase(((first, first + 1), (first + 2,)), once=rng.random() < 0.5) for first in range(20, 29, 3)
    )[: rng.randint(1, 3)]
    n_beams = rng.randint(1, 5)
    room = rng.choice([0, 4, 12])
    params = BeamParams(
        num_beams=n_beams,
        num_return_sequences=n_beams,
        max_new_tokens=2 * len(phrases) + 1 + room,
        required=phrases,
    )
    found = search(Table(seed, 40, rng.choice([-1.0, 2.0, 6.0])), params)
    assert found
    assert all(says(ended.tokens, phrase) for ended in found[:1] for phrase in phrases)
    finished = [ended for ended in found if ended.finished]
    assert all(says(ended.tokens, phrase) for ended in finished for phrase in phrases)
    for phrase in phrases:
        assert all(count(ended.tokens, phrase) == 1 for ended in finished if phrase.once)


@pytest.mark.parametrize("seed", range(12))
def test_with_beams_for_everything_the_best_that_says_the_phrase_is_found(seed: int) -> None:
    """Against every sequence there is: four tokens and the end, up to four of them."""
    numbers, phrase = Table(seed, 5, 0.0), Phrase(((2, 3), (4,)))
    params = BeamParams(num_beams=700, max_new_tokens=5, required=(phrase,))

    def sequences(tokens: list[int], total: float) -> Iterator[tuple[float, list[int]]]:
        logprobs = numbers.logprobs([START, *tokens], set())
        if says(tokens, phrase):
            yield normalise(total + logprobs[EOS], len(tokens) + 1, params), tokens
        if len(tokens) < 4:
            for token in range(1, 5):
                yield from sequences([*tokens, token], total + logprobs[token])

    score, tokens = max(sequences([], 0.0))
    (best,) = search(numbers, params)
    assert (best.tokens, best.finished) == (tokens, True)
    assert best.score == pytest.approx(score)
