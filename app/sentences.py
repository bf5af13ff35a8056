"""Texts as sentences and the white space between them. The parts joined are the text: nothing is cut.

All of it in linear time, whatever the text: a text is a client's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencex

from model.tokenizer import Tokenizer

# White space that holds a line break (whatever `str.splitlines` takes for one) always parts sentences.
_LINE_BREAK = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_CLAUSE_END = re.compile(r"[,;:)\]—–…,、;:]")
# One search takes a whole run, so that no run is looked at twice.
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Part:
    """A run of a text: a sentence, or the white space between two."""

    text: str
    is_sentence: bool


def split_text(text: str, language: str, tokenizer: Tokenizer, max_tokens: int) -> list[Part]:
    """Sentences of at most max_tokens tokens each, and the white space around them, in order."""
    parts: list[Part] = []
    for line in _lines(text):
        for sentence in _sentences(line, language):
            parts.extend(_parts(sentence, tokenizer, max_tokens))
    return parts


def _lines(text: str) -> Iterator[str]:
    """Lines, and the white space between them."""
    start = 0
    for space in _SPACE.finditer(text):
        if _LINE_BREAK.search(space.group()):
            yield text[start : space.start()]
            yield space.group()
            start = space.end()
    yield text[start:]


def _sentences(line: str, language: str) -> list[str]:
    if not line or line.isspace():
        return [line]
    found = [str(sentence) for sentence in sentencex.segment(language, line)]
    return found if "".join(found) == line else [line]


def _parts(sentence: str, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Part]:
    text = sentence.rstrip()
    start = 0
    while start < len(text):
        space = _SPACE.match(text, start)
        run = space.group() if space else _piece(text, start, tokenizer, max_tokens)
        yield Part(run, space is None)
        start += len(run)
    if len(text) < len(sentence):
        yield Part(sentence[len(text) :], False)


def _piece(text: str, start: int, tokenizer: Tokenizer, max_tokens: int) -> str:
    """What is left from start on; if too long, cut after a clause, else after a space, else anywhere."""
    head = _head(text, start, tokenizer, max_tokens)
    if start + len(head) == len(text):
        return head
    for cut in _cuts(head, text[start : start + len(head) + 1]):
        piece = head[:cut].rstrip()
        # Less text may be more tokens where a cut parts what one token held together.
        if len(tokenizer.encode(piece)) <= max_tokens:
            return piece
    return head


def _head(text: str, start: int, tokenizer: Tokenizer, max_tokens: int) -> str:
    """As much from start on as fits, or one character; no text far beyond that is looked at."""
    n_chars = max_tokens
    while True:
        head = text[start : start + n_chars].rstrip()
        pieces = tokenizer.encode_with_offsets(head)
        if len(pieces) > max_tokens:
            break
        if start + n_chars >= len(text):
            return head
        n_chars *= 2
    while len(pieces) > max_tokens and len(head) > 1:
        head = head[: max(pieces[max_tokens].start, 1)].rstrip()
        pieces = tokenizer.encode_with_offsets(head)
    return head


def _cuts(head: str, with_next: str) -> Iterator[int]:
    """Where head may be cut, best first; the character after it tells whether it ends before a space."""
    clauses = [m.end() for m in _CLAUSE_END.finditer(head) if m.end() > len(head) // 2]
    spaces = [m.start() for m in _SPACE.finditer(with_next)]
    return (ends[-1] for ends in (clauses, spaces) if ends)
