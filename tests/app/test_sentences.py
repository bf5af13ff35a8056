"""Splitting: the parts joined are the text, whatever the text is; no sentence is over the limit."""

import random

import pytest

from app.sentences import split_text
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


def test_a_long_text_is_split_in_reasonable_time() -> None:
    assert len(sentences("word " * 4000, max_tokens=128)) >= 4000 * 5 / 128
