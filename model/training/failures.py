"""What a translator must not do: garble what should be copied, fall silent, loop, use the wrong script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from model.training.packs import TEXTS, PackError, clean_pair, read_pairs
from model.training.scores import DIRECTIONS, Corpus, Row, Translation, percent, score_corpus
from model.training.shards import held_out

COPYING = TEXTS / "copying.tsv"
EVERYDAY = TEXTS / "everyday.tsv"
KINDS = ("name", "number", "address", "code")
Translate = Callable[[Sequence[str], str], list[Translation]]  # texts, the language to translate into


class Copying(NamedTuple):
    """A sentence with stretches that a translation should hold as they are."""

    kind: str
    language: str
    text: str
    spans: tuple[str, ...]


def read_copying(path: Path = COPYING) -> list[Copying]:
    """kind TAB language TAB sentence TAB stretches. Raises `PackError` where they do not fit together."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        kind, language, text, *spans = line.split("\t")
        if (
            kind not in KINDS
            or language not in ("en", "ko")
            or not spans
            or any(s not in text for s in spans)
        ):
            raise PackError(f"{path}:{number}: not a kind, a language, a sentence and stretches of it")
        found.append(Copying(kind, language, text, tuple(spans)))
    return found


def everyday_rows(translate: Translate, path: Path = EVERYDAY) -> list[Row]:
    """Everyday sentences (language TAB sentence) with their translations, for a person to read."""
    sentences = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    rows: list[Row] = []
    for direction in DIRECTIONS:
        texts = [text for language, text in sentences if language == direction[:2]]
        translations = translate(texts, direction[-2:])
        rows += [{"everyday": s, "translation": t.text} for s, t in zip(texts, translations, strict=True)]
    return rows


def copying_rows(translate: Translate, sentences: Sequence[Copying]) -> list[Row]:
    """Per direction and kind, the share of stretches that come through exactly."""
    rows = []
    for direction in DIRECTIONS:
        chosen = [s for s in sentences if s.language == direction[:2]]
        translations = translate([s.text for s in chosen], direction[-2:])
        row = {"direction": direction, "sentences": str(len(chosen))}
        total = [0, 0]
        for kind in KINDS:
            hits = [
                span in translation.text
                for sentence, translation in zip(chosen, translations, strict=True)
                if sentence.kind == kind
                for span in sentence.spans
            ]
            total = [total[0] + sum(hits), total[1] + len(hits)]
            row[f"{kind} copied"] = f"{percent(sum(hits), len(hits))} of {len(hits)}"
        rows.append(row | {"all": f"{percent(*total)} of {total[1]}"})
    return rows


def failure_rows(translate: Translate, packs: Iterable[Path], count: int) -> list[Row]:
    """Plain failures over `count` held-out sentences of all sources, half of them each way."""
    pairs = held_sentences(packs, count)
    rows = []
    for direction, side in zip(DIRECTIONS, (0, 1), strict=True):
        chosen = pairs[side::2]
        sources, references = [p[side] for p in chosen], [p[1 - side] for p in chosen]
        corpus = Corpus("held-out, every source", direction, sources, references)
        scored = score_corpus(corpus, translate(sources, direction[-2:]))
        rows.append({key: value for key, value in scored.items() if key not in ("BLEU", "chrF")})
    return rows


def held_sentences(packs: Iterable[Path], count: int) -> list[tuple[str, str]]:
    """(English, Korean) pairs that never trained, the sources by turns until each is used up."""
    by_source: dict[str, list[tuple[str, str]]] = {}
    for pack in packs:
        for pair in read_pairs(pack):
            if held_out(pair.en) and clean_pair(pair):
                by_source.setdefault(pair.source, []).append((pair.en, pair.ko))
    turns = zip_longest(*by_source.values())
    return list(islice((pair for turn in turns for pair in turn if pair is not None), count))
