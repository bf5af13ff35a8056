"""Splitting: the parts joined are the text, whatever the text is; no sentence is over the limit."""

import random
from typing import Any

import pytest

from app.sentences import split_text
from model.tokenizer import Piece
from tests.app.fakes import byte_tokenizer


def sentences(text: str, language: str = "en", max_tokens: int = 1000) -> list[str]:
    parts = split_text(text, language, byte_tokenizer(), max_tokens)
    assert "".join(part.text for part in parts) == text
    assert all(part.text.strip() == part.text for part in parts if part.is_sentence)
    assert all(part.text.isspace() for part in parts if not part.is_sentence)
    assert all(len(part.text.encode()) <= max_tokens for part in parts if part.is_sentence)
    return [part.text for part in parts if part.is_sentence]


def test_english() -> None:
    text = 'Dr. Smith paid $3.14. He left at 5 p.m. "Really?" she asked.'
    assert sentences(text)[0] == "Dr. Smith paid $3.14."
    assert sentences(text)[-1] == "she asked." or sentences(text)[-1].endswith("she asked.")


def test_korean() -> None:
    assert sentences("나는 집에 간다. 너는? 좋아요!", "ko") == ["나는 집에 간다.", "너는?", "좋아요!"]


def test_line_breaks_part_and_stay() -> None:
    assert sentences("one\ntwo\r\n\r\n  three\u2028four") == ["one", "two", "three", "four"]


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u3000\t"])
def test_nothing_to_translate(text: str) -> None:
    assert sentences(text) == []


def test_too_long_is_cut_at_clauses_then_spaces_then_anywhere() -> None:
    assert sentences("aaaa bbbb, cccc dddd", max_tokens=12) == ["aaaa bbbb,", "cccc dddd"]
    assert sentences("aaaa bbbb cccc", max_tokens=11) == ["aaaa bbbb", "cccc"]
    assert sentences("a" * 25, max_tokens=10) == ["a" * 10, "a" * 10, "a" * 5]
    assert sentences("가나다라", "ko", max_tokens=7) == ["가나", "다라"]


def test_any_text() -> None:
    noise = random.Random(0)
    alphabet = "aB1 .,!?\n\r\t\u2028\u3000가힣。…\"'()\x00\ufeff🙂é\u0301-"
    for _ in range(300):
        text = "".join(noise.choices(alphabet, k=noise.randrange(60)))
        for language in ("en", "ko"):
            sentences(text, language, max_tokens=noise.randrange(4, 30))


class CountingTokenizer:
    """Every UTF-8 byte is a token; counts the characters it is given."""

    def __init__(self) -> None:
        self.n_chars = 0

    def encode(self, text: str) -> list[int]:
        self.n_chars += len(text)
        return byte_tokenizer().encode(text)

    def encode_with_offsets(self, text: str) -> list[Piece]:
        self.n_chars += len(text)
        return byte_tokenizer().encode_with_offsets(text)


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "가",
        "word ",
        ",",
        "a. ",
        "(",
        "\u200b",
        "\u0301",
        "🙂",
        "👨\u200d👩\u200d👧",
        "x" + " " * 50,
        "a  ",
    ],
)
def test_a_text_is_looked_at_a_few_times_however_long(unit: str) -> None:
    tokenizer: Any = CountingTokenizer()
    text = unit * (20_000 // len(unit))
    parts = split_text(text, "en", tokenizer, 250)
    assert "".join(part.text for part in parts) == text
    assert max(len(part.text.encode()) for part in parts) <= 250
    assert tokenizer.n_chars <= 8 * len(text)


@pytest.mark.parametrize("space", [" ", "\n", "\n ", "\u3000"])
def test_a_run_of_white_space_is_looked_at_once(space: str) -> None:
    # Long enough that looking at it anew from each of its characters would outlast the test's time limit.
    run = space * 300_000
    assert [part.text for part in split_text(f"a{run}b{run}", "en", byte_tokenizer(), 250)] == [
        *("a", run),
        *("b", run),
    ]


def test_what_stands_before_a_space_is_not_cut_before_it() -> None:
    assert sentences("aaaa bbbb cccc", max_tokens=9) == ["aaaa bbbb", "cccc"]
    assert sentences("aaaa bbbb     cccc", max_tokens=9) == ["aaaa bbbb", "cccc"]


def test_a_character_of_more_tokens_than_fit_stands_alone() -> None:
    parts = split_text("🙂🙂a", "en", byte_tokenizer(), 3)
    assert [part.text for part in parts] == ["🙂", "🙂", "a"]
