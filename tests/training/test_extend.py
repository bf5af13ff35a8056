"""Whole words that join a vocabulary, and the model that grows with it."""

import json
import lzma
from pathlib import Path

import torch

from model import checkpoint
from model.models import MaskedLM
from model.tokenizer import Tokenizer
from model.training.__main__ import main
from model.training.extend import missing_words
from model.training.packs import Pair
from tests.tiny import TinyFolders

PARTICLES = ("가", "를", "는", "에")


def seen(noun: str, source: str = "written") -> list[Pair]:
    """A noun with the particles of one, twelve times; its English is a word that stands as often."""
    return [
        Pair(source, f"She saw umbrella{i} there.", f"{noun}{particle} 그리고 {noun}{particle} 보았다.")
        for i in range(3)
        for particle in PARTICLES
    ]


def test_the_words_that_are_missing(tokenizer: Tokenizer) -> None:
    pairs = [*seen("우산"), *seen("찌개"), *seen("릴리", "written-tales")]
    verbs = [Pair("written", "a", text) for text in ("달리는 사람", "달려가 보았다") for _ in range(20)]
    found = missing_words([*pairs, *verbs], tokenizer, 10, 10, 10)
    assert found[:2] == [" 우산", " 찌개"]  # no hero of a story, nothing but nouns
    assert set(found[-2:]) == {"우산", "찌개"}  # the same with a space are there already
    assert not any("달리" in word or "릴리" in word for word in found)
    assert all(len(tokenizer.encode(word)) > 1 for word in found)
    assert missing_words(pairs, tokenizer, 1, 0, 0) == [" 우산"]


def test_a_noun_that_opens_sentences_stays_whole_behind_a_space(tokenizer: Tokenizer) -> None:
    """Also where its piece with the space is an old one."""
    known = tokenizer.extended([" 우산"])
    found = missing_words(seen("우산"), known, 0, 1, 0)
    assert found == ["우산", " 우산"]
    longer = tokenizer.extended(found)
    assert [longer.token_text(i) for i in longer.encode("우산 새 우산")][-1] == " 우산"


def test_a_stem_that_other_words_begin_with_is_none(tokenizer: Tokenizer) -> None:
    others = [Pair("written", "a", "우산장수 우산장수 우산장수") for _ in range(40)]
    assert missing_words([*seen("우산"), *others], tokenizer, 10, 0, 0) == []


def test_halves_of_words_are_none(tokenizer: Tokenizer) -> None:
    texts = [Pair("written", "We mustn't wait, it isn’t well-known.", "우산-가 집") for _ in range(20)]
    assert missing_words(texts, tokenizer, 10, 10, 10) == [" wait"]


def test_a_text_comes_back_from_an_extended_tokenizer(tokenizer: Tokenizer) -> None:
    longer = tokenizer.extended([" 우산", "엄마", " 우산꽂이"])
    assert longer.vocab_size == tokenizer.vocab_size + 3
    text = "엄마가 새 우산을 우산꽂이에 꽂았다. [MASK] Ġ우산"
    ids = longer.encode(text)
    assert longer.decode(ids) == text
    texts = [longer.token_text(i) for i in ids if i >= tokenizer.vocab_size]
    assert texts == ["엄마", " 우산", " 우산꽂이"]
    assert longer.encode("[MASK]") == tokenizer.encode("[MASK]")
    pieces = longer.encode_with_offsets(text)
    assert [text[piece.start : piece.stop] for piece in pieces if piece.id == ids[0]] == ["엄마"]


def test_the_command(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    rows = [f"{pair.source}\t{pair.en}\t{pair.ko}" for pair in seen("우산")]
    (tmp_path / "some.en-ko.tsv.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    out = tmp_path / "grown"
    command = ["extend", "--data", str(tmp_path), "--pairs", "some.en-ko.tsv.xz", "--out", str(out)]
    assert main([*command, "--model", str(tiny_folders.fill_mask)]) == 0
    before, after = checkpoint.load(tiny_folders.fill_mask), checkpoint.load(out)
    assert isinstance(before.model, MaskedLM)
    assert isinstance(after.model, MaskedLM)
    n = before.config.vocab_size
    assert json.loads((out / "config.json").read_text())["vocab_size"] > n
    words = [after.tokenizer.decode([i]) for i in range(n, after.config.vocab_size)]
    pieces = [before.tokenizer.encode(word) for word in words]
    assert len(words) > 1
    old, new = before.model.embeddings.tokens.weight, after.model.embeddings.tokens.weight
    bias, new_bias = before.model.mlm_head.bias, after.model.mlm_head.bias
    for table, grown in ((old, new), (bias, new_bias)):
        means = torch.stack([table[each].mean(0) for each in pieces])
        torch.testing.assert_close(grown, torch.cat([table, means]), rtol=0.01, atol=0.01)  # in 16 bit
    assert main([*command, "--model", str(tiny_folders.translate)]) == 1
