"""Filling masks after known sentences: which words stand there in texts that are like this one?

A masked model has seen few of the words that make sense in a sentence in that very sentence. As in Kassner
and Schütze 2020, "BERT-kNN", texts like the masked one are looked up, and the words that stand in the place
of the mask have votes, which are mixed with the model's probabilities. What stands there is told by the words
around, not by the model's states, which would have to be computed for each word of each text.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import TransformerConfig
from model.examples import Examples
from model.tokenizer import Tokenizer

# Texts that are looked at, and how much like the masked one they are at least.
_MOST_TEXTS, _LEAST_LIKENESS = 64, 0.15
# What is farther: a word beside which the first token is another one, the second one, neither; for each side.
_UNLIKE = (0.25, 0.1, 0.0)
_MOST_NEAR = 32  # words that have a vote
# Votes count by this power of the model's probabilities: what fits little into the sentence has little say.
_OWN_SAY = 0.5


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
    # Without its masks, which no text has.
    found = examples.alike(sentence.replace(tokenizer.mask_token, " "), _MOST_TEXTS, _LEAST_LIKENESS)
    rows = [(tokenizer.text_ids(known), likeness) for known, likeness in found]
    said = _twins(ids, tokenizer)

    @cache
    def is_in_word(token: int | None, side: int) -> bool:
        """Does a token that stands on a side of another, without a space, make one word with it?"""
        text = "" if token is None or token in tokenizer.special_ids else tokenizer.token_text(token)
        sign = text[:1] if side == 1 else text[-1:]
        return sign.isalnum() or sign == "\ufffd"

    def fits(slot: int, has_space: bool, row: Sequence[int], place: int) -> bool:
        """Is a token of a row as much of a word as the mask is?"""
        besides = (
            (side, _at(ids, slot + side), _at(row, place + side)) for side in ((1,) if has_space else (1, -1))
        )
        return all(
            here == there or not (is_in_word(here, side) or is_in_word(there, side))
            for side, here, there in besides
        )

    votes = []
    for slot, has_space in zip(slots, spaced, strict=True):
        fillers = tokenizer.fillers[has_space]
        near = heapq.nsmallest(
            _MOST_NEAR,
            (
                (1 - likeness + _unlike(ids, slot, row, place), token)
                for row, likeness in rows
                for place, token in enumerate(row)
                if token in fillers and fits(slot, has_space, row, place)
            ),
        )
        own = _votes(near, said, config, weight)
        is_first = follows and sentence.startswith(tokenizer.mask_token) and slot == slots[0]
        votes.append(_with_space(own, tokenizer) if own and is_first else own)
    return votes


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


def _unlike(ids: Sequence[int], slot: int, row: Sequence[int], place: int) -> float:
    """How much farther away a word of a row is for what stands beside it, and does not beside the mask."""
    unlike = 0.0
    for side in (-1, 1):
        n_agreeing = 0
        for step in (side, 2 * side):
            if _at(ids, slot + step) != _at(row, place + step):
                break
            n_agreeing += 1
        unlike += _UNLIKE[n_agreeing]
    return unlike


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
