"""Self-supervised pre-training of the encoder: masked tokens and next sentence (Devlin et al. 2018, 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.models import MaskedLM
from model.tokenizer import Tokenizer
from model.training.batches import (
    WIDTH_STEP,
    Indices,
    pad,
    padded_width,
    sample_by_weight,
    token_budget_batches,
    weights_by_label,
)
from model.training.loss import linear_cross_entropy
from model.training.shards import Shard

Batch = dict[str, Tensor]
Passage = tuple[int, int, int, int, int]
IGNORE = -100
STEM_NOISE = 0.3  # a stem before its particle is masked about three times as often as its neighbours


class MaskedTask:
    """Passages of consecutive sentences, [CLS] A [SEP] B [SEP]; B is the real continuation half the time.

    A document of one sentence gives [CLS] A [SEP], which takes no part in next-sentence prediction. `weights`
    maps a prefix of a document's label to how often an epoch holds it; the longest prefix counts. With
    `sightings`, an epoch holds about so many single sentences for each word that was added to the tokenizer
    (`extend`), or all that there are, and such words are masked as stems are.
    """

    def __init__(
        self,
        shard: Shard,
        tokenizer: Tokenizer,
        *,
        budget: int,
        max_len: int = 128,
        mask_ratio: float = 0.15,
        whole_word: float = 0.5,
        short: float = 0.3,
        split_particles: float = 0.4,
        stems: float = 0.0,
        sightings: float = 0.0,
        weights: Mapping[str, float] | None = None,
        width_step: int = WIDTH_STEP,
        seed: int = 0,
    ) -> None:
        self.shard, self.tokenizer, self.budget, self.max_len = shard, tokenizer, budget, max_len
        self.width_step = width_step
        self.mask_ratio, self.whole_word, self.short, self.seed = mask_ratio, whole_word, short, seed
        self.split_particles, self.particles = split_particles, particle_splits(tokenizer)
        self.stems, self.particle_ids = stems, particle_ids(tokenizer)
        self.sizes = np.diff(np.asarray(shard.units))
        self.weights = weights_by_label(np.asarray(shard.labels), shard.label_names, weights or {"": 1.0})
        self.added_ids = np.array(sorted(tokenizer.added_ids), dtype=np.int64) if sightings else None
        if self.added_ids is not None:
            if not len(self.added_ids):
                raise ValueError(f"{sightings} sightings of words that were added: the tokenizer has none")
            self.weights = np.maximum(self.weights, self._weights_of_added(self.added_ids, sightings))
        self.newline = tokenizer.encode("\n")[0]
        self.starts_word, self.is_mark = word_starts(tokenizer), marks(tokenizer)
        self.of_label = [np.flatnonzero(np.asarray(shard.labels) == i) for i in range(len(shard.label_names))]

    def batches(self, epoch: int) -> list[Indices]:
        """Batches of passages: (first unit, first of B, end, and what replaces B: first unit, end; or -1)."""
        rng = np.random.default_rng((self.seed, epoch))
        passages = self._passages(rng)
        ends = np.concatenate(([0], np.cumsum(self.sizes)))
        a = ends[passages[:, 1]] - ends[passages[:, 0]]
        replaced = passages[:, 3] >= 0
        b_first, b_end = (np.where(replaced, passages[:, 3 + i], passages[:, 1 + i]) for i in (0, 1))
        b = ends[b_end] - ends[b_first]
        lengths = np.minimum(a + b + 3, self.max_len)
        return [passages[batch] for batch in token_budget_batches(lengths, self.budget, rng, self.width_step)]

    def _weights_of_added(self, added_ids: Indices, sightings: float) -> NDArray[np.float64]:
        """Per document: of a sentence's added words the rarest says how much of it an epoch holds."""
        weights = np.zeros(len(self.shard))
        tokens = np.asarray(self.shard.tokens)
        places = np.flatnonzero(np.isin(tokens, added_ids))
        documents = np.searchsorted(self.shard.units[self.shard.docs], places, side="right") - 1
        alone = np.diff(np.asarray(self.shard.docs))[documents] == 1
        words, documents = tokens[places[alone]], documents[alone]
        counts = np.bincount(words, minlength=self.tokenizer.vocab_size)
        np.maximum.at(weights, documents, np.minimum(1.0, sightings / counts[words]))
        return weights

    def _passages(self, rng: np.random.Generator) -> Indices:
        found: list[Passage] = []
        room = self.max_len - 3
        for document in rng.permutation(sample_by_weight(self.weights, rng)):
            first, end = int(self.shard.docs[document]), int(self.shard.docs[document + 1])
            while first < end:
                # Some passages are just two sentences, the length at which people ask.
                limit = 2 if rng.random() < self.short else end - first
                last, total = first + 1, int(self.sizes[first])
                while last < end and last - first < limit and total + self.sizes[last] <= room:
                    total += int(self.sizes[last])
                    last += 1
                found.append(self._passage(first, last, int(document), rng))
                first = last
        return np.array(found, dtype=np.int64).reshape(-1, 5)

    def _passage(self, first: int, last: int, document: int, rng: np.random.Generator) -> Passage:
        if last - first < 2:
            return first, last, last, -1, -1
        split = int(rng.integers(first + 1, last))
        if rng.random() < 0.5:
            return first, split, last, -1, -1
        # Another document of the same kind, or language and style would give the answer away.
        others = self.of_label[self.shard.labels[document]]
        other = int(others[rng.integers(len(others))])
        if other == document:
            return first, split, last, -1, -1
        # As many sentences as the real B has, or its length would give the answer away too.
        begin, end = int(self.shard.docs[other]), int(self.shard.docs[other + 1])
        unit = int(rng.integers(begin, max(begin, end - (last - split)) + 1))
        return first, split, last, unit, min(end, unit + last - split)

    def collate(self, batch: Indices, rng: np.random.Generator) -> Batch:
        """token_ids and segment_ids (B, T); slots (B, M) of masked positions, labels (B, M); follows (B,)."""
        rows, segments, follows = [], [], []
        for first, split, last, other, other_end in batch.tolist():
            parted = rng.random() < self.split_particles
            a = self._text(first, split, parted)
            b = self._text(other, other_end, parted) if other >= 0 else self._text(split, last, parted)
            a, b = _fit(a, b, self.max_len - 3)
            row = [self.tokenizer.cls_id, *a, self.tokenizer.sep_id]
            segment = [0] * len(row)
            if split < last or other >= 0:
                row += [*b, self.tokenizer.sep_id]
                segment += [1] * (len(row) - len(segment))
                follows.append(int(other < 0))
            else:
                follows.append(IGNORE)
            rows.append(row)
            segments.append(segment)
        token_ids = pad(rows, self.tokenizer.pad_id, self.width_step)
        slots, labels = self.mask(token_ids, rng)
        arrays = {
            "token_ids": token_ids,
            "segment_ids": pad(segments, 0, self.width_step),
            "slots": slots,
            "labels": labels,
            "follows": np.array(follows),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def mask(self, token_ids: Indices, rng: np.random.Generator) -> tuple[Indices, Indices]:
        """Choose positions and put 80% masks, 10% random tokens, 10% nothing there, in place.

        Returns slots and labels, each (B, M); a slot without a label is padding (`IGNORE`).
        """
        t = self.tokenizer
        real = ~np.isin(token_ids, (t.pad_id, t.cls_id, t.sep_id))
        noise = np.where(real, rng.random(token_ids.shape), 2.0)
        whole = rng.random(len(token_ids)) < self.whole_word
        noise[whole] = self._word_noise(token_ids[whole], noise[whole])
        if self.stems:
            asked = (rng.random(len(token_ids)) < self.stems)[:, None]
            sought = self._stems(token_ids)
            if self.added_ids is not None:
                sought |= np.isin(token_ids, self.added_ids)
            noise = np.where(asked & sought, noise * STEM_NOISE, noise)
        counts = np.maximum(1, np.round(real.sum(1) * self.mask_ratio)).astype(np.int64)
        width = padded_width(int(counts.max()), self.width_step)
        # Ties share a word: a stable sort keeps a word's pieces together, in order.
        slots = np.argsort(noise, axis=1, kind="stable")[:, :width].astype(np.int64)
        chosen = np.arange(slots.shape[1]) < counts[:, None]
        labels = np.where(chosen, np.take_along_axis(token_ids, slots, 1), IGNORE)
        fate = rng.random(slots.shape)
        replaced = np.where(fate < 0.8, t.mask_id, np.take_along_axis(token_ids, slots, 1))
        ordinary = rng.integers(max(t.special_ids) + 1, t.vocab_size, slots.shape)
        replaced = np.where(fate >= 0.9, ordinary, replaced)
        kept = np.take_along_axis(token_ids, slots, 1)
        np.put_along_axis(token_ids, slots, np.where(chosen, replaced, kept), 1)
        return slots, labels

    def _word_noise(self, token_ids: Indices, noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every piece of a word gets the noise of its first piece, so that they are chosen together."""
        positions = np.arange(token_ids.shape[1])
        special = noise > 1.0
        after_special = np.pad(special, ((0, 0), (1, 0)))[:, :-1]  # the first word has no space before it
        starts = np.where(self.starts_word[token_ids] | special | after_special, positions, 0)
        first = np.maximum.accumulate(starts, axis=1)
        return np.where(special, noise, np.take_along_axis(noise, first, 1))

    def _stems(self, token_ids: Indices) -> NDArray[np.bool_]:
        """Is a token a word's whole stem, with nothing but a particle between it and the next word?"""
        special = np.isin(token_ids, list(self.tokenizer.special_ids))
        # Behind a mark that begins or opens a text, or what is in brackets, a word has no space before it.
        after_mark = np.pad(special | self.is_mark[token_ids], ((0, 0), (1, 0)))[:, :-1]
        begins = self.starts_word[token_ids] | special | after_mark
        after = np.pad(np.isin(token_ids, self.particle_ids)[:, :-1] & begins[:, 1:], ((0, 0), (0, 1)))
        stem = np.zeros_like(special)
        stem[:, :-1] = begins[:, :-1] & ~special[:, :-1] & after[:, 1:]
        return stem

    def loss(self, model: MaskedLM, batch: Batch) -> tuple[Tensor, int]:
        """Mean cross-entropy of masked tokens plus that of next sentence, and the tokens read."""
        hidden = model.encode(batch["token_ids"], batch["segment_ids"])
        chosen = batch["labels"] != IGNORE
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        features = model.mlm_head.features(hidden[rows, batch["slots"]][chosen])  # (masked, D)
        weight, bias = model.embeddings.tokens.weight, model.mlm_head.bias
        loss = linear_cross_entropy(features, weight, batch["labels"][chosen], bias=bias)
        known = batch["follows"] != IGNORE
        if bool(known.any()):
            loss = loss + F.cross_entropy(model.nsp_head(hidden)[known].float(), batch["follows"][known])
        return loss, int((batch["token_ids"] != self.tokenizer.pad_id).sum())

    def _text(self, first: int, last: int, parted: bool) -> list[int]:
        ids = [i for unit in range(first, last) for i in self.shard.unit(unit).tolist() if i != self.newline]
        return [part for i in ids for part in self.particles.get(i, (i,))] if parted else ids


# Case, topic and subject markers, and the plain postpositions, longest first.
PARTICLES = (
    *("에서는", "으로는", "에서", "에는", "으로", "까지", "부터", "에게", "이나", "처럼", "보다", "하고"),
    *("은", "는", "이", "가", "을", "를", "에", "의", "도", "로", "와", "과", "만"),
)


def particle_splits(tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
    """Korean pieces that are a stem with its particle, and the two pieces that say the same.

    People write a mask for the stem and leave its particle ("[MASK]를 마신다"); unless training parts
    them now and then, the model never sees a stem before a particle of its own.
    """
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids}
    splits: dict[int, tuple[int, int]] = {}
    for raw, token_id in ids.items():
        for particle in PARTICLES:
            tail = particle.encode()
            stem = raw.removesuffix(tail)
            if stem != raw and len(stem) > 3 and stem in ids and tail in ids:
                splits[token_id] = (ids[stem], ids[tail])
                break
    return splits


def particle_ids(tokenizer: Tokenizer) -> list[int]:
    """The pieces that are a particle and nothing else."""
    raws = {particle.encode() for particle in PARTICLES}
    return [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in raws]


def marks(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Per token: does it end with neither a letter nor a digit nor a space?"""
    last = [tokenizer.token_bytes(i)[-1:] for i in range(tokenizer.vocab_size)]
    return np.array([raw.isascii() and raw.strip() != b"" and not raw.isalnum() for raw in last])


def word_starts(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Per token: does it begin a word? Pieces that go on with a letter in the midst of a word do not."""
    starts = np.ones(tokenizer.vocab_size, dtype=np.bool_)
    for token_id in range(tokenizer.vocab_size):
        raw = tokenizer.token_bytes(token_id)
        first = raw[:1]
        inside = first.isalpha() or first >= b"\x80"
        starts[token_id] = not raw or not inside
    return starts


def _fit(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """Drop tokens from the front of A and the end of B until both fit, the longer one first."""
    over = len(a) + len(b) - room
    while over > 0:
        if len(a) > len(b):
            cut = min(over, len(a) - len(b))
            a = a[cut:]
        else:
            cut = min(over, max(1, len(b) - len(a)))
            b = b[: len(b) - cut]
        over -= cut
    return a, b
