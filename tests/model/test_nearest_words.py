"""Words that stand in the place of a mask in known texts, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from model.config import TransformerConfig
from model.examples import Examples
from model.nearest_words import Votes, _Mask, _unlike, _Word, fillable, find_votes
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
    found, _ = examples.alike("I drink   every morning.", 9, 0.1)
    (likest, likeness), *_ = found.items()
    assert likest == TEXTS[0][0]
    assert votes.weight == pytest.approx(0.8 * (1 - (1 - likeness) / 2.0), rel=0.05)
    # The other text is less like, and has another second word behind.
    farther = likeness - found[TEXTS[1][0]] + 0.1
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


def test_a_word_is_parted_from_its_ending_as_the_mask_is(config: TransformerConfig) -> None:
    """The vocabulary has 물을 and 우유를 as one token each."""
    known = [
        ("I drink water.", "저는 물을 마신다."),
        ("I drink milk.", "저는 우유를 마신다."),
        ("Tea, too.", "나는 차를 마신다."),
        ("Water is good.", "물을 마신다."),
    ]
    korean = [text for _, text in known]
    glued = Tokenizer.train([*(korean * 20), *["물", "너 물", "너 우유", "너 차", "을", "를", "이"] * 5], 420)
    assert [len(glued.encode(f" {word}")) for word in ("물을", "물", "우유를", "우유")] == [1, 1, 1, 1]
    examples = Examples.build({("en", "ko"): known})
    config = replace(config, vocab_size=glued.vocab_size)

    def voted(sentence: str) -> set[str]:
        (votes,) = find_votes(examples, sentence, glued, config, 0.8)
        return set() if votes is None else {glued.token_text(token) for token in votes.token_ids}

    assert voted("나는 [MASK]을 마신다.") == {" 물"}
    assert voted("나는 [MASK]를 마신다.") == {" 우유", " 차"}
    assert voted("나는 [MASK]이 마신다.") == set()
    assert voted("[MASK]을 마신다.") == {"물"}
    assert voted("물이 없어서 [MASK]을 마신다.") == set()  # it is said already
    assert voted("물, [MASK]를 마신다.") == {" 우유", " 차"}
    # In the ending nearly all agree; it is what stands behind it that tells.
    ids, _ = glued.masked_ids("나는 [MASK]을 마신다.")
    mask = _Mask(ids, 2, True, "나는 ", "을 마신다.")
    drink = [glued.cls_id, *glued.encode("나는"), *glued.encode(" 물"), *glued.encode("을 마신다.")]
    see = [*drink[:4], *glued.encode(" 봤다."), glued.sep_id]
    assert glued.text_ids("나는 물을 마신다.") != [*drink, glued.sep_id]
    near, far = (_unlike(mask, 1, _Word(each, 2, 1.0)) for each in ([*drink, glued.sep_id], see))
    assert (near, far) == (0.0, 0.3)


def test_texts_that_hold_a_word_beside_the_mask_have_a_say_too(config: TransformerConfig) -> None:
    """However little they are like the sentence otherwise, and however many are more like it."""
    known = [(f"n{n}", f"우리는 오늘도 즐겁게 논다 {chr(0xAC00 + n)}.") for n in range(80)]
    known.append(
        ("The painter is drawing.", "그 화가가 아침부터 커다란 벽에 고래와 바다와 하늘이 있는 그림을 그린다.")
    )
    words = Tokenizer.train([*(text for _, text in known), *["너 그림", "을"] * 20], 420)
    assert len(words.encode(" 그림")) == 1
    examples = Examples.build({("en", "ko"): known})
    sentence = "우리는 오늘도 즐겁게 [MASK]을 그린다."
    likest, none = examples.alike(sentence.replace("[MASK]", " "), 64, 0.15)
    assert known[-1][1] not in likest
    assert none == {}
    same, holding = examples.alike(sentence.replace("[MASK]", " "), 64, 0.15, ["그린다.", "없는말"])
    assert same == likest
    assert [*holding["그린다."]] == [known[-1][1]]
    assert 0 < holding["그린다."][known[-1][1]] < min(likest.values())
    assert holding["없는말"] == {}
    (votes,) = find_votes(examples, sentence, words, config, 0.8)
    assert votes is not None
    assert votes.token_ids == (words.encode(" 그림")[0],)


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
