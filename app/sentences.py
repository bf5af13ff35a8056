"""Texts as sentences and the white space between them. The parts joined are the text: nothing is cut."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencex

from model.tokenizer import Tokenizer

# White space that holds a line break (whatever `str.splitlines` takes for one) always parts sentences.
_LINE_BREAK = re.compile(r"(\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*)")
_EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
_CLAUSE_END = re.compile(r"[,;:)\]—–…,、;:]\s*")
_SPACE = re.compile(r"\s+")
# Text beyond so many characters for each token is not looked at before it is that text's turn.
_CHARS_PER_TOKEN = 8


@dataclass(frozen=True)
class Part:
    """A run of a text: a sentence, or the white space between two."""

    text: str
    is_sentence: bool


def split_text(text: str, language: str, tokenizer: Tokenizer, max_tokens: int) -> list[Part]:
    """Sentences of at most max_tokens tokens each, and the white space around them, in order."""
    parts: list[Part] = []
    for line in _LINE_BREAK.split(text):
        for sentence in _sentences(line, language):
            for piece in _shorten(sentence, tokenizer, max_tokens):
                parts.extend(_trim(piece))
    return parts


def _sentences(line: str, language: str) -> list[str]:
    if not line or line.isspace():
        return [line]
    found = [str(sentence) for sentence in sentencex.segment(language, line)]
    return found if "".join(found) == line else [line]


def _trim(piece: str) -> Iterator[Part]:
    match = _EDGES.fullmatch(piece)
    assert match is not None
    before, sentence, after = match.groups()
    for run, is_sentence in ((before, False), (sentence, True), (after, False)):
        if run:
            yield Part(run, is_sentence)


def _shorten(sentence: str, tokenizer: Tokenizer, max_tokens: int) -> Iterator[str]:
    """Cut what is too long after a clause, else after a space, else anywhere."""
    while True:
        head = sentence[: _CHARS_PER_TOKEN * max_tokens]
        pieces = tokenizer.encode_with_offsets(head)
        fits = len(pieces) <= max_tokens
        if fits and len(head) == len(sentence):
            yield sentence
            return
        end = len(head) if fits else max(pieces[max_tokens - 1].stop, 1)
        # Less text may be more tokens where a cut parts what one token held together.
        while end > 1 and len(tokenizer.encode(sentence[:end])) > max_tokens:
            end -= 1
        cut = _cut(sentence[:end])
        yield sentence[:cut]
        sentence = sentence[cut:]


def _cut(head: str) -> int:
    clauses = [m.end() for m in _CLAUSE_END.finditer(head) if m.end() > len(head) // 2]
    spaces = [m.end() for m in _SPACE.finditer(head)]
    return next((ends[-1] for ends in (clauses, spaces) if ends), len(head))
