"""From packs to a tokenizer and shards: what is read, what is kept, what is held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from model.tokenizer import Tokenizer
from model.training.packs import (
    Pair,
    clean_pair,
    clean_paragraph,
    figures,
    is_pair_pack,
    read_documents,
    read_pairs,
    read_stories,
    reading_grade,
    split_sentences,
)
from model.training.shards import Document, held_out

SOFTWARE = ("msdocs", "ms-cpp", "tensorflow")  # many, alike: a small part is enough for the tokenizer


def tokenizer_texts(pairs: Iterable[Path], documents: Iterable[Path], megabytes: float) -> Iterator[str]:
    """Both sides of the pairs (little software text), then about `megabytes` of each document pack.

    What is held out trains no tokenizer either.
    """
    for path in pairs:
        for pair in read_pairs(path):
            few = pair.source.startswith(SOFTWARE) and not held_out(pair.en + "tokenizer", 0.05)
            if not few and not held_out(pair.en):
                yield pair.en
                yield pair.ko
    for path in documents:
        share = min(1.0, megabytes * 1e6 / max(1, _text_bytes(path)))
        for paragraphs in read_documents(path):
            if held_out(paragraphs[0] + "tokenizer", share) and not held_out(paragraphs[0]):
                yield from paragraphs


PRECIOUS = ("written", "wiki")  # sources worth measuring by


def pair_documents(
    paths: Iterable[Path], *, held: bool, measured: Sequence[str] = PRECIOUS
) -> Iterator[Document]:
    """Clean pairs as documents (English, Korean), everyday ones with noisy twins: held out, or the rest.

    Held out is a slice, by the English side, of the sources that begin with one of `measured`.
    """
    seen: set[int] = set()
    for path in paths:
        for pair in read_pairs(path):
            key = hash((pair.en.casefold(), pair.ko))
            if key in seen or not clean_pair(pair):
                continue
            seen.add(key)
            if held:
                if pair.source.startswith(tuple(measured)) and held_out(pair.en):
                    yield pair.source, [pair.en, pair.ko]
            # A held-out sentence must not come back through another source.
            elif not held_out(pair.en):
                yield pair.source, _units(pair)


def passages(
    paths: Iterable[Path],
    *,
    held: bool,
    share: float = 1.0,
    max_grade: float = math.inf,
    max_figures: float = 1.0,
) -> Iterator[Document]:
    """Documents as lists of sentences, each with the space before it; `share` keeps a sample by hash.

    What is held out is taken as it is. For training, `max_grade` keeps the documents that are easy to read
    (`packs.reading_grade`), `max_figures` the paragraphs with few dates and brackets (`packs.figures`).
    A pack of pairs gives all the stories that it holds, once in each language.
    """
    for path in paths:
        if is_pair_pack(path):
            yield from stories(path, held=held)
            continue
        label = path.name.split(".txt")[0]
        for paragraphs in read_documents(path):
            if held_out(paragraphs[0]) != held or not held_out(paragraphs[0] + "sample", share):
                continue
            prose = [paragraph for paragraph in paragraphs if clean_paragraph(paragraph)]
            if not held:
                prose = _easy(prose, max_grade, max_figures)
            units: list[str] = []
            for paragraph in prose:
                first, *rest = split_sentences(paragraph)
                units += ["\n" + first if units else first, *(" " + sentence for sentence in rest)]
            if units:
                yield label, units


def stories(path: Path, *, held: bool) -> Iterator[Document]:
    """The documents of a pack of pairs, in English and in Korean; units as `passages` gives them.

    Single pairs are none: they tell no story.
    """
    for pairs in read_stories(path):
        if len(pairs) > 1 and held_out(pairs[0].en) == held:
            for label, (first, *rest) in (("en", [p.en for p in pairs]), ("ko", [p.ko for p in pairs])):
                yield f"stories.{label}", [first, *(" " + sentence for sentence in rest)]


def _easy(paragraphs: list[str], max_grade: float, max_figures: float) -> list[str]:
    prose = [paragraph for paragraph in paragraphs if figures(paragraph) <= max_figures]
    return prose if prose and reading_grade(prose) <= max_grade else []


def single_sentences(
    paths: Iterable[Path], *, held: bool, shares: Mapping[str, float], measured: Sequence[str] = PRECIOUS
) -> Iterator[Document]:
    """Each side of each pair of some sources as a document of its own.

    `shares` maps a prefix of a source's name to the share of its pairs that a sample by hash keeps.
    """
    for label, units in pair_documents(paths, held=held, measured=measured):
        share = max((shares[prefix] for prefix in shares if label.startswith(prefix)), default=0.0)
        if held_out(units[0] + "sample", share):
            yield "sentences.en", units[:1]
            yield "sentences.ko", units[1:2]


def _units(pair: Pair) -> list[str]:
    if pair.source.startswith(("written", "tatoeba", "grammar", "xpersona", "korsts")):
        return [pair.en, pair.ko, noisy_english(pair.en), noisy_korean(pair.ko)]
    return [pair.en, pair.ko]


def noisy_english(text: str) -> str:
    """As people type it: no full stop, small letters or, in a fifth of the texts, capitals."""
    bare = text.removesuffix(".")
    return bare.upper() if held_out(bare + "capitals", 1 / 5) else bare.lower()


def noisy_korean(text: str) -> str:
    """As people type it: no full stop, and in a third of the texts without the spaces."""
    bare = text.removesuffix(".")
    return bare.replace(" ", "") if len(bare) < 20 and held_out(bare, 1 / 3) else bare


def _text_bytes(path: Path) -> int:
    return sum(len(p.encode()) for paragraphs in read_documents(path) for p in paragraphs)


def train_tokenizer(
    pairs: list[Path], documents: list[Path], vocab_size: int, megabytes: float = 40
) -> Tokenizer:
    """The shared English and Korean tokenizer."""
    return Tokenizer.train(tokenizer_texts(pairs, documents, megabytes), vocab_size)
