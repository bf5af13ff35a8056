"""Readers of text packs: pairs (`source TAB english TAB korean`) and documents (a paragraph a line).

A pack may be compressed with xz. A blank line ends a document; pairs, too, may stand in documents, as a
story told in two languages does.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

TEXTS = Path(__file__).parent / "texts"  # packs that come with the code
_T = TypeVar("_T")


class Pair(NamedTuple):
    """One sentence in two languages."""

    source: str
    en: str
    ko: str


class PackError(ValueError):
    """A pack that cannot be read; the message names the file and the line."""


def find_pack(folder: Path, name: str) -> Path:
    """The pack of this name, .xz behind it or not, in the folder of the data, or else among ours."""
    places = (folder / name, folder / f"{name}.xz", TEXTS / name)
    return next((place for place in places if place.exists()), folder / name)


def _open(path: Path) -> TextIO:
    """Open a text or an xz file for reading as UTF-8; every \\r stays where it is."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a pack without what ends them. Raises `PackError` on what is no UTF-8."""
    with _open(path) as file:
        try:
            for line in file:
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise PackError(f"{path} is not UTF-8: {error.reason}") from None


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a pack. Raises `PackError` on a line without exactly three columns."""
    return (pair for pair in pairs_and_ends(path) if pair is not None)


def read_stories(path: Path) -> Iterator[list[Pair]]:
    """The documents of a pack of pairs, each a list of pairs. Raises as `read_pairs` does."""
    return _documents(pairs_and_ends(path))


def read_documents(path: Path) -> Iterator[list[str]]:
    """The documents of a pack, each a list of paragraphs."""
    yield from _documents(line.strip() or None for line in lines_of(path))


def pairs_and_ends(path: Path) -> Iterator[Pair | None]:
    """The lines of a pack: pairs, and None for a blank one, which ends a document. Raises as `read_pairs`."""
    for number, text in enumerate(lines_of(path), 1):
        if not text:
            yield None
            continue
        columns = text.split("\t")
        if len(columns) != 3:
            raise PackError(f"{path}:{number}: {len(columns)} columns, not 3 (source TAB english TAB korean)")
        yield Pair(*columns)


def is_pair_pack(path: Path) -> bool:
    """Do the lines of this pack hold pairs, by its name?"""
    return ".tsv" in path.suffixes


def _documents(parts: Iterable[_T | None]) -> Iterator[list[_T]]:
    """Runs of parts between the places where there is None."""
    document: list[_T] = []
    for part in parts:
        if part is not None:
            document.append(part)
        elif document:
            yield document
            document = []
    if document:
        yield document


# Good enough for training passages: an end mark, closing quotes, white space. Abbreviations split wrongly
# now and then, which costs a passage boundary and nothing else.
_SENTENCE_END = re.compile(r"(?<=[.!?…。])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9가-힣])")


def split_sentences(paragraph: str) -> list[str]:
    """Rough sentences of a paragraph."""
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(paragraph):
        sentences.append(paragraph[start : match.end()].strip())
        start = match.end()
    return [s for s in [*sentences, paragraph[start:].strip()] if s]


_HANGUL = re.compile(r"[가-힣]")
_LATIN = re.compile(r"[A-Za-z]")


def clean_pair(pair: Pair, max_ratio: float = 3.0) -> bool:
    """Is this pair worth learning? Language, length and length ratio are judged, in characters."""
    if not 1 <= len(pair.en) <= 400 or not 1 <= len(pair.ko) <= 300:
        return False
    if not _HANGUL.search(pair.ko) or not _LATIN.search(pair.en):
        return False
    if _HANGUL.search(pair.en) and not pair.source.startswith("mixed-"):
        return False
    # Korean takes about half the characters; short texts vary, so ten characters are free.
    en, ko = len(pair.en) + 10, 2 * len(pair.ko) + 10
    return max(en, ko) <= max_ratio * min(en, ko)


_MARKUP = re.compile(r"[|{}=<>*_\\]|https?:")
# What is left where a template or a foreign name was cut out of an article: "(, )", "(~ )", "[[...]]".
_REMAINS = re.compile(r"\(\s*[,;~)]|[,;~]\s*\)|\[\[|\]\]")
_IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def clean_paragraph(text: str) -> bool:
    """Is this paragraph prose? Lists, tables and boilerplate are not."""
    if len(text) < 40 or not text.rstrip("\"'”’)").endswith((".", "!", "?", "…", "다")):
        return False
    if _REMAINS.search(text) or len(_IDEOGRAPH.findall(text)) > 0.03 * len(text):
        return False
    marks = sum(not (c.isalpha() or c.isspace() or c in ".,'\"“”‘’!?;:-—()") for c in text)
    return marks <= 0.15 * len(text) and len(_MARKUP.findall(text)) <= 1


def figures(text: str) -> float:
    """The share of characters that are neither letters nor white space nor everyday punctuation.

    Dates, sums and brackets: what makes a paragraph of an encyclopedia hard to imitate.
    """
    return sum(not (c.isalpha() or c.isspace() or c in ".,'\"“”‘’!?;:-—") for c in text) / len(text)


def reading_grade(paragraphs: Sequence[str]) -> float:
    """The Automated Readability Index (Senter and Smith 1967) of a text with a word in it.

    About the school year that reads it with ease. It was fitted to English; Korean words are short in
    characters, so every Korean text is easy by it.
    """
    words = sum(len(paragraph.split()) for paragraph in paragraphs)
    characters = sum(c.isalnum() for paragraph in paragraphs for c in paragraph)
    sentences = sum(len(split_sentences(paragraph)) for paragraph in paragraphs)
    return 4.71 * characters / words + 0.5 * words / sentences - 21.43
