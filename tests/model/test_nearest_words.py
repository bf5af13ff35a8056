"""Words that stand in the place of a mask in known texts, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from model.config import TransformerConfig
from model.examples import Examples
from model.nearest_words import Votes, fillable, find_votes
from model.tokenizer import Tokenizer
from tests.tiny import fitting_config

TEXTS = [
    ("I drink milk every morning.", "나는 아침마다 우유를 마신다."),
    ("I drink water every evening.", "나는 저녁마다 물을 마신다."),
    ("My house has three doors.", "우리 집에는 문이 세 개 있다."),
]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Knows every word of TEXTS, and some with a space before them or without."""
    more = ["So I", "water", "milk", "You say"]
    return Tokenizer.train([*(text for pair in TEXTS for text in pair), *more] * 9, 520)


@pytest.fixture
def config(words: Tokenizer) -> TransformerConfig:
    return replace(fitting_config("masked_lm", words), example_reach=2.0, example_temperature=0.1)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples.build({("en", "ko"): TEXTS})


def test_a_mix_by_hand() -> None:
    probs = torch.tensor([0.64, 0.16, 0.2, 0.0])
    mixed = Votes((1, 0, 3), (3.0, 1.0, 5.0), 0.5).mix(probs)
    # By the root of the model's own: 3 x 0.4 and 1 x 0.8, and nothing for what is impossible.
    assert mixed.tolist() == pytest.approx([0.32 + 0.5 * 0.8 / 2, 0.08 + 0.5 * 1.2 / 2, 0.1, 0.0])
    assert Votes((3,), (1.0,), 0.5).mix(probs).tolist() == pytest.approx(probs.tolist())
    assert probs.tolist() == pytest.approx([0.64, 0.16, 0.2, 0.0])  # as it was


def test_words_of_like_texts_have_votes(
    words: Tokenizer, examples: Examples, config: TransformerConfig
) -> None:
    (votes,) = find_votes(examples, "I drink [MASK] every morning.", words, config, 0.8)
    assert votes is not None
    milk, water = (words.encode(f" {word}") for word in ("milk", "water"))
    assert len(milk) == len(water) == 1
    by_token = dict(zip(votes.token_ids, votes.shares, strict=True))
    assert max(by_token, key=lambda token: by_token[token]) == milk[0]
    # What is said already has none, nor what needs no space before it.
    said = {words.encode(f" {word}")[0] for word in ("drink", "every", "morning")}
    assert not said & set(votes.token_ids)
    assert all(words.token_text(token).startswith(" ") for token in votes.token_ids)
    # The likest text lacks something: the mask's word.
    (likest, likeness), *_ = examples.alike("I drink   every morning.", 9, 0.1)
    assert likest == TEXTS[0][0]
    assert votes.weight == pytest.approx(0.8 * (1 - (1 - likeness) / 2.0), rel=0.05)
    # The other text is less like, and has another second word behind.
    others = dict(examples.alike("I drink   every morning.", 9, 0.1))
    farther = likeness - others[TEXTS[1][0]] + 0.1
    assert by_token[water[0]] == pytest.approx(math.exp(-farther / 0.1), rel=1e-3)


def test_what_the_sentence_says_already_counts_against_the_others(
    words: Tokenizer, config: TransformerConfig
) -> None:
    texts = ["I drink water every day.", "You drink water every day.", "You drink milk every day."]
    examples = Examples.build({("en", "ko"): [(text, "나") for text in texts]})
    (votes,) = find_votes(examples, "water drink [MASK] every day.", words, config, 0.8)
    (alone,) = find_votes(examples, "You drink [MASK] every day.", words, config, 0.8)
    assert votes is not None
    assert alone is not None
    (milk,), (water,), (bare,) = (words.encode(word) for word in (" milk", " water", "water"))
    assert water in alone.token_ids
    assert milk in votes.token_ids
    assert not {water, bare} & set(votes.token_ids)  # with a space before it or without
    assert votes.weight < 0.6 * alone.weight


def test_what_is_glued_to_a_mask_must_stand_there(
    words: Tokenizer, examples: Examples, config: TransformerConfig
) -> None:
    (votes,) = find_votes(examples, "My house has three [MASK]s.", words, config, 0.8)
    assert votes is None or words.encode(" doors")[0] not in votes.token_ids
    (votes,) = find_votes(examples, "My house has three [MASK].", words, config, 0.8)
    assert votes is not None
    assert words.encode(" doors")[0] in votes.token_ids
    (votes,) = find_votes(examples, "My house has a[MASK] three doors.", words, config, 0.8)
    assert votes is None


def test_a_sentence_behind_another_is_looked_up_alone(words: Tokenizer, config: TransformerConfig) -> None:
    examples = Examples.build({("en", "ko"): [("I drink milk every morning.", "나"), ("My house.", "나")]})
    (alone,) = find_votes(examples, "[MASK] drink milk every morning.", words, config, 0.8)
    (behind,) = find_votes(examples, "[MASK] drink milk every morning.", words, config, 0.8, follows=True)
    assert alone is not None
    assert behind is not None
    assert alone.token_ids[0] == words.encode("I")[0]
    assert behind.token_ids[0] == words.encode(" I")[0]
    assert behind.weight == alone.weight
    for follows in (False, True):
        (votes,) = find_votes(examples, "I drink [MASK] every morning.", words, config, 0.8, follows=follows)
        assert votes is not None
        assert votes.token_ids[0] == words.encode(" milk")[0]


def test_every_mask_has_its_own(words: Tokenizer, examples: Examples, config: TransformerConfig) -> None:
    first, second = find_votes(examples, "[MASK] house has three [MASK].", words, config, 0.8)
    assert first is not None
    assert second is not None
    best = [
        words.token_text(max(zip(votes.shares, votes.token_ids, strict=True))[1]) for votes in (first, second)
    ]
    assert best == ["My", " doors"]


def test_far_from_all_texts_there_are_none(
    words: Tokenizer, examples: Examples, config: TransformerConfig
) -> None:
    assert find_votes(examples, "Zzz [MASK] qqq", words, config, 0.8) == [None]
    assert find_votes(examples, "[MASK] [MASK]", words, config, 0.8) == [None, None]
    assert find_votes(examples, "I drink [MASK]. " + "a" * 400, words, config, 0.8) == [None]
    near = replace(config, example_reach=0.01)
    assert find_votes(examples, "I drink [MASK] every day.", words, near, 0.8) == [None]


@pytest.mark.parametrize("spaced", [None, True, False])
def test_what_can_fill_a_mask(words: Tokenizer, spaced: bool | None) -> None:
    expected = [words.may_fill(token, spaced) for token in range(words.vocab_size)]
    assert fillable(words, spaced).tolist() == expected
    assert 0 < sum(expected) < words.vocab_size
