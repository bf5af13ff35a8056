"""Filling masks after known sentences: which words stand there in texts that are like this one?

A masked model has seen few of the words that make sense in a sentence in that very sentence. As in Kassner
and Schütze 2020, "BERT-kNN", texts like the masked one are looked up, and the words that stand in the place
of the mask have votes, which are mixed with the model's probabilities. What stands there is told by the words
around, not by the model's states, which would have to be computed for each word of each text.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import TransformerConfig
from model.examples import Examples
from model.tokenizer import Tokenizer

# Texts that are looked at, and how much like the masked one they are at least.
_MOST_TEXTS, _LEAST_LIKENESS = 64, 0.15
# What is farther: a word beside which the first token is another one, the second one, neither.
_UNLIKE_BEFORE, _UNLIKE_BEHIND = (0.2, 0.08, 0.0), (0.3, 0.1, 0.0)
_MOST_NEAR = 32  # words that have a vote
# Votes count by this power of the model's probabilities: what fits little into the sentence has little say.
_OWN_SAY = 0.5
_ENDING = re.compile(r"\w+")
# A word beside a mask for which texts are looked up: in Korean. In English that gained one sentence in a
# hundred, and took as long as all else.
_BESIDE = re.compile(r"[가-힣]\S*")
_MOST_BESIDE = 4  # of more masks than a few what is looked up for each takes too long
_STEM = re.compile(
    r"(?<!\w)([가-힣]+?)"
    r"(?:은|는|이|가|을|를|에|의|로|으로|와|과|도|만|에서|에게|한테|부터|까지|이나|나|하고|랑|이랑)(?!\w)"
)


class Votes(NamedTuple):
    """Tokens that may fill a mask, what each counts among them, and what all together count, 0 to 1."""

    token_ids: tuple[int, ...]
    shares: tuple[float, ...]
    weight: float

    def mix(self, probs: Tensor) -> Tensor:
        """Probabilities (V,) of one mask -> probabilities of which the votes are part."""
        ids = torch.tensor(self.token_ids, device=probs.device)
        votes = probs[ids].pow(_OWN_SAY) * probs.new_tensor(self.shares)
        total = votes.sum()
        if not total > 0:  # what is voted for is impossible here
            return probs
        return (probs * (1 - self.weight)).index_add(0, ids, votes * (self.weight / total))


def find_votes(
    examples: Examples,
    sentence: str,
    tokenizer: Tokenizer,
    config: TransformerConfig,
    weight: float,
    *,
    follows: bool = False,
) -> list[Votes | None]:
    """Of each mask in a sentence what examples say about it; None where there is nothing like it.

    `weight` is the most that votes count together. The distance of a word in an example is what its text
    lacks in likeness, and what stands around it otherwise than around the mask; the nearest one's, over the
    config's `example_reach`, is what the weight loses. A sentence that `follows` another, behind a space, is
    looked up as if it stood alone; what fills a mask that it begins with has that space.
    """
    ids, spaced = tokenizer.masked_ids(sentence)
    slots = [slot for slot, token in enumerate(ids) if token == tokenizer.mask_id]
    parts = sentence.split(tokenizer.mask_token)
    masks = [
        _Mask(ids, slot, has_space, before, after)
        for slot, has_space, before, after in zip(slots, spaced, parts, parts[1:], strict=False)
    ]
    beside = {word for mask in masks for word in mask.words_beside()}
    looked_up = beside if len(beside) <= _MOST_BESIDE else ()
    # Without its masks, which no text has.
    likest, holding = examples.alike(" ".join(parts), _MOST_TEXTS, _LEAST_LIKENESS, looked_up)
    encoder = _Encoder(tokenizer)
    said = _twins(ids, tokenizer) | _stems(parts, encoder)
    votes = []
    for n, mask in enumerate(masks):
        texts = dict(likest)
        for word in mask.words_beside():
            texts |= holding.get(word, {})
        words = _parted(texts, mask, encoder) if mask.is_stem else _as_they_are(texts, mask, encoder)
        n_ending = len(encoder.one(mask.ending)) if mask.ending else 0
        near = heapq.nsmallest(
            _MOST_NEAR,
            ((1 - word.likeness + _unlike(mask, n_ending, word), word.row[word.place]) for word in words),
        )
        own = _votes(near, said, config, weight)
        is_first = follows and n == 0 and not parts[0]
        votes.append(_with_space(own, tokenizer) if own and is_first else own)
    return votes


class _Encoder:
    """A tokenizer that reads each text once, and many at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._ids = tokenizer, dict[str, list[int]]()

    def many(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of texts, each without anything around it."""
        texts = [*texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        self._ids |= zip(new, self.tokenizer.encode_batch(new), strict=True)
        return [self._ids[text] for text in texts]

    def one(self, text: str) -> list[int]:
        """`many` of one."""
        (ids,) = self.many([text])
        return ids


class _Mask(NamedTuple):
    """Where a mask stands in a sentence's tokens, whether a space goes before it, what stands beside it."""

    ids: list[int]
    slot: int
    has_space: bool
    before: str
    after: str

    @property
    def ending(self) -> str:
        """What makes one word with the mask that it stands behind: in Korean a particle, as a rule."""
        found = _ENDING.match(self.after)
        return found[0] if found else ""

    @property
    def is_stem(self) -> bool:
        """Is it a word with an ending?"""
        return bool(self.ending) and not _ENDING.match(self.before[-1:])

    def words_beside(self) -> list[str]:
        """The words before it, and behind it and its ending, for which texts are looked up."""
        words = self.before.split()[-1:] + self.after[len(self.ending) :].split()[:1]
        return [word for word in words if _BESIDE.match(word)]


class _Word(NamedTuple):
    """A token of a text that may stand for a mask, and how much the text is like the sentence."""

    row: list[int]
    place: int
    likeness: float


def _as_they_are(texts: Mapping[str, float], mask: _Mask, encoder: _Encoder) -> Iterator[_Word]:
    """Tokens of texts, which are given with their likeness, that are as much of a word as the mask is."""
    tokenizer = encoder.tokenizer

    @cache
    def is_in_word(token: int | None, side: int) -> bool:
        """Does a token that stands on a side of another, without a space, make one word with it?"""
        text = "" if token is None or token in tokenizer.special_ids else tokenizer.token_text(token)
        sign = text[:1] if side == 1 else text[-1:]
        return sign.isalnum() or sign == "\ufffd"

    def fits(row: list[int], place: int, side: int) -> bool:
        here, there = _at(mask.ids, mask.slot + side), _at(row, place + side)
        return here == there or not (is_in_word(here, side) or is_in_word(there, side))

    for ids, likeness in zip(encoder.many(texts), texts.values(), strict=True):
        row = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        for place, token in enumerate(ids, 1):
            if not _may_fill(token, mask, tokenizer):
                continue
            if fits(row, place, 1) and (mask.has_space or fits(row, place, -1)):
                yield _Word(row, place, likeness)


def _parted(texts: Mapping[str, float], mask: _Mask, encoder: _Encoder) -> Iterator[_Word]:
    """Words of texts that have a mask's ending, parted from it as the mask is.

    In Korean many words are one token with their particle, or parted elsewhere.
    """
    tokenizer = encoder.tokenizer
    with_ending = re.compile(rf"(?<!\w)\w+?(?={re.escape(mask.ending)}(?!\w))")
    having = [(word, known) for known in texts for word in with_ending.finditer(known)]
    space = " " if mask.has_space else ""
    stems = encoder.many(space + word[0] for word, _ in having)
    whole = [
        (word, known, stem)
        for (word, known), stem in zip(having, stems, strict=True)
        if len(stem) == 1 and _may_fill(stem[0], mask, tokenizer)
    ]
    befores = encoder.many(known[: word.start()].removesuffix(" ") for word, known, _ in whole)
    afters = encoder.many(known[word.end() :] for word, known, _ in whole)
    for (_, known, stem), before, after in zip(whole, befores, afters, strict=True):
        row = [tokenizer.cls_id, *before, *stem, *after, tokenizer.sep_id]
        yield _Word(row, 1 + len(before), texts[known])


def _may_fill(token: int, mask: _Mask, tokenizer: Tokenizer) -> bool:
    """Adopted tokenizers leave it to the model whether a special token may; a text never says one."""
    return token in tokenizer.fillers[mask.has_space] and token not in tokenizer.special_ids


def _stems(parts: Iterable[str], encoder: _Encoder) -> set[int]:
    """The tokens that stand before a particle in a sentence, with a space before them and without."""
    words = {stem[1] for part in parts for stem in _STEM.finditer(part)}
    ids = encoder.many(space + word for word in sorted(words) for space in (" ", ""))
    return {own[0] for own in ids if len(own) == 1}


def _twins(ids: Sequence[int], tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens, and the same ones with and without a space before them."""
    twins = set(ids)
    for token in set(ids) - tokenizer.special_ids:
        text = tokenizer.token_text(token)
        if "\ufffd" not in text:
            twins.update(_one_token(tokenizer, text[1:] if text.startswith(" ") else f" {text}"))
    return frozenset(twins)


def _one_token(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token that a text is; none where it is several."""
    ids = tokenizer.encode(text)
    return ids if len(ids) == 1 else []


def _with_space(votes: Votes, tokenizer: Tokenizer) -> Votes | None:
    """The same words behind a space; those that are one token there."""
    shares = {
        token: share
        for bare, share in zip(votes.token_ids, votes.shares, strict=True)
        for token in _one_token(tokenizer, f" {tokenizer.token_text(bare)}")
    }
    return Votes(tuple(shares), tuple(shares.values()), votes.weight) if shares else None


def fillable(tokenizer: Tokenizer, spaced: bool | None) -> Tensor:
    """(V,) True for what can fill a mask, as `Tokenizer.may_fill` says."""
    mask = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    mask[list(tokenizer.fillers[spaced])] = True
    return mask


def _unlike(mask: _Mask, n_ending: int, word: _Word) -> float:
    """How much farther away a word is for what stands beside it, and does not beside the mask.

    An ending, of so many tokens, says little: nearly all that comes here has it.
    """
    before = _n_agreeing(mask, word, -1, 2)
    behind = max(0, _n_agreeing(mask, word, 1, n_ending + 2) - n_ending)
    return _UNLIKE_BEFORE[before] + _UNLIKE_BEHIND[behind]


def _n_agreeing(mask: _Mask, word: _Word, side: int, most: int) -> int:
    """How many tokens on a side of a word are those beside the mask, until one is not."""
    n_agreeing = 0
    while n_agreeing < most:
        step = side * (n_agreeing + 1)
        if _at(mask.ids, mask.slot + step) != _at(word.row, word.place + step):
            break
        n_agreeing += 1
    return n_agreeing


def _at(ids: Sequence[int], place: int) -> int | None:
    """None beyond the ends."""
    return ids[place] if 0 <= place < len(ids) else None


def _votes(
    near: Sequence[tuple[float, int]], said: frozenset[int], config: TransformerConfig, weight: float
) -> Votes | None:
    """Of tokens with their distances, the nearest first.

    What the sentence says already is hardly what it lacks, so that no votes are counted for it; but they say
    that others count for less.
    """
    if not near:
        return None
    nearest = near[0][0]
    shares: dict[int, float] = {}
    for distance, token in near:
        shares[token] = shares.get(token, 0.0) + math.exp((nearest - distance) / config.example_temperature)
    others = {token: share for token, share in shares.items() if token not in said}
    weight *= (1 - nearest / config.example_reach) * sum(others.values()) / sum(shares.values())
    return Votes(tuple(others), tuple(others.values()), weight) if weight > 0 else None
