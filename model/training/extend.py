"""`python -m model.training extend`: whole words for a mask to be filled with.

A mask stands for one piece. Of 16,000 pieces in two languages so few are Korean that a third of the nouns of
daily life are several, and no mask could ever be filled with them. Those become pieces of their own, and a
model's row for each begins as the mean of the pieces that it was made of (Gee et al. 2022, "Fast Vocabulary
Transfer for Language Model Compression"); training must follow.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.models import MaskedLM, build_model
from model.tokenizer import Tokenizer
from model.training.masked import PARTICLES
from model.training.packs import Pair, find_pack, read_pairs
from model.training.shards import held_out

# Longest first. Verbs end in some of these, too, but a verb's beginning stands before few of the others.
_PARTICLES = sorted(
    {*PARTICLES, *("에서도", "에게서", "에도", "한테", "이다", "입니다", "이에요", "예요")}, key=len
)[::-1]
# Whole words: no halves of mustn't or well-being.
_HANGUL = re.compile(r"(?:^|(?<=[ \"'(]))[가-힣]+(?![\w'’-])")
_LATIN = re.compile(r"(?:^|(?<=[ \"'(]))[a-z]+(?![\w'’-])")
_FEWEST_PARTICLES = 4
_FEWEST = 8  # sightings outside the stories
_SHARE = 0.4  # of the words that begin like it; else the rest of them would be cut where no stem ends
_SHORTEST_ENGLISH = 4
_SHORTEST_AT_START = 2  # syllables: without a space before it a piece is found in the midst of words, too


@dataclass
class WordCounts:
    """How often words stand in sentences.

    Stories show what is a noun, but count for nothing else: nobody asks for the names of their heroes.
    """

    stems: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    english: Counter[str] = field(default_factory=Counter)
    at_start: Counter[str] = field(default_factory=Counter)  # of a sentence outside of stories
    outside: Counter[str] = field(default_factory=Counter)  # of stories
    beginnings: Counter[str] = field(default_factory=Counter)  # of all words, however they go on

    def add(self, pair: Pair) -> None:
        """Count the words of both sides."""
        told = "tales" in pair.source
        for found in _HANGUL.finditer(pair.ko):
            self._begin(found[0])
            particle = next((p for p in _PARTICLES if found[0].endswith(p)), "")
            stem = found[0].removesuffix(particle)
            if particle and stem:
                self.stems[stem][particle] += 1
                self.outside[stem] += not told
                self.at_start[stem] += found.start() == 0 and not told
        for found in _LATIN.finditer(pair.en):
            self._begin(found[0])
            self.english[found[0]] += 1
            self.outside[found[0]] += not told

    def _begin(self, word: str) -> None:
        self.beginnings.update(word[:end] for end in range(1, len(word) + 1))

    def nouns(self) -> list[str]:
        """Korean stems that take the particles of a noun, the most frequent first outside of stories."""
        counts = {stem: particles.total() for stem, particles in self.stems.items() if _is_noun(particles)}
        return self._frequent(counts)

    def english_words(self) -> list[str]:
        """English words in small letters, the most frequent first outside of stories."""
        return self._frequent({w: n for w, n in self.english.items() if len(w) >= _SHORTEST_ENGLISH})

    def _frequent(self, counts: dict[str, int]) -> list[str]:
        kept = (
            word
            for word, n in counts.items()
            if self.outside[word] >= _FEWEST and n >= _SHARE * self.beginnings[word]
        )
        return sorted(kept, key=lambda word: (-self.outside[word], word))


def _is_noun(particles: Counter[str]) -> bool:
    as_object = particles["을"] + particles["를"]
    as_subject = particles["이"] + particles["가"]
    return as_object >= 3 and as_subject >= 2 and len(particles) >= _FEWEST_PARTICLES


def missing_words(
    pairs: Iterable[Pair], tokenizer: Tokenizer, n_korean: int, n_at_start: int, n_english: int
) -> list[str]:
    """The most frequent words that are several pieces so far.

    Korean nouns and English words with the space before them, then the nouns that open sentences without, and
    what those need beside them.
    """
    counts = WordCounts()
    for pair in pairs:
        counts.add(pair)
    nouns = counts.nouns()
    opening = sorted(nouns, key=lambda noun: -counts.at_start[noun])
    spaced = [
        *_several_pieces((f" {word}" for word in nouns), tokenizer)[:n_korean],
        *_several_pieces((f" {word}" for word in counts.english_words()), tokenizer)[:n_english],
    ]
    long_enough = [noun for noun in opening if len(noun) >= _SHORTEST_AT_START]
    bare = _several_pieces(long_enough, tokenizer)[:n_at_start]
    # Else they would be found behind a space, too, which is then a piece of its own: the longest counts.
    beside = [f" {noun}" for noun in bare if f" {noun}" not in spaced]
    return [*spaced, *bare, *beside]


def _several_pieces(words: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    return [word for word in words if len(tokenizer.encode(word)) > 1]


@torch.no_grad()
def extend(found: Checkpoint, words: list[str]) -> tuple[MaskedLM, Tokenizer]:
    """The model with one more piece for each word. Raises ValueError where a word is a piece already."""
    tokenizer = found.tokenizer.extended(words)
    if tokenizer.vocab_size != found.tokenizer.vocab_size + len(words):
        raise ValueError("a word is twice among the new ones, or a piece already")
    model = build_model(replace(found.config, vocab_size=tokenizer.vocab_size))
    assert isinstance(model, MaskedLM)
    pieces = [found.tokenizer.encode(word) for word in words]
    old, new = found.model.state_dict(), model.state_dict()
    model.load_state_dict(
        {
            name: rows if rows.shape == new[name].shape else _with_means(rows, pieces)
            for name, rows in old.items()
        }
    )
    return model, tokenizer


def _with_means(rows: Tensor, pieces: list[list[int]]) -> Tensor:
    """(V, ...) -> (V + words, ...)."""
    return torch.cat([rows, *(rows[each].mean(0, keepdim=True) for each in pieces)])


def add_extend_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `extend`."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a masked model")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the packs")
    parser.add_argument("--pairs", nargs="+", required=True, help="packs of pairs whose words are counted")
    parser.add_argument("--korean", type=int, default=1480, help="pieces for nouns after a space")
    parser.add_argument("--at-start", type=int, default=216, help="for nouns that open a sentence")
    parser.add_argument("--english", type=int, default=352, help="for English words after a space")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")


def extend_command(arguments: argparse.Namespace) -> int:
    """Write the grown model; returns the exit status."""
    packs = [find_pack(arguments.data, name) for name in arguments.pairs]
    pairs = (pair for pack in packs for pair in read_pairs(pack) if not held_out(pair.en))
    try:
        found = checkpoint.load(arguments.model)
        if not isinstance(found.model, MaskedLM):
            print(f"extend: {found.name} is no masked model")
            return 1
        words = missing_words(pairs, found.tokenizer, arguments.korean, arguments.at_start, arguments.english)
        model, tokenizer = extend(found, words)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"extend: {error}")
        return 1
    checkpoint.save(arguments.out, model, tokenizer)
    print(f"{len(words)} more pieces, {tokenizer.vocab_size} in all -> {arguments.out}")
    return 0
