"""Learning to translate: both directions in one model, teacher forcing, label smoothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.models import Translator
from model.tokenizer import Tokenizer
from model.training.batches import (
    WIDTH_STEP,
    Indices,
    pad,
    sample_by_weight,
    token_budget_batches,
    weights_by_label,
)
from model.training.loss import linear_cross_entropy
from model.training.shards import Shard

Batch = dict[str, Tensor]


class TranslateTask:
    """Pairs in a shard: units of a document are English, Korean and, where there are four, noisy twins.

    `weights` maps a prefix of a source's name to how often an epoch holds each of its pairs; the longest
    prefix that fits counts, and "" is the default.
    """

    def __init__(
        self,
        shard: Shard,
        tokenizer: Tokenizer,
        *,
        weights: Mapping[str, float],
        budget: int,
        max_len: int = 128,
        label_smoothing: float = 0.1,
        noise: float = 0.15,
        width_step: int = WIDTH_STEP,
        seed: int = 0,
    ) -> None:
        self.shard, self.tokenizer = shard, tokenizer
        self.budget, self.label_smoothing, self.noise, self.seed = budget, label_smoothing, noise, seed
        self.max_len, self.width_step = max_len, width_step
        self.first, sizes = np.asarray(shard.docs[:-1]), np.diff(np.asarray(shard.units))
        self.sizes = sizes + 3  # tag, language, end
        self.lengths = np.maximum(self.sizes[self.first], self.sizes[self.first + 1])
        self.twins = np.diff(np.asarray(shard.docs)) == 4
        by_label = weights_by_label(np.asarray(shard.labels), shard.label_names, weights)
        self.weights: NDArray[np.float64] = by_label * (self.lengths <= max_len)
        self.tags = [source_tag(name) for name in shard.label_names]
        # In this shape where there is no document, too.
        learned = np.array(
            [[_learned(name, d) for d in (0, 1)] for name in shard.label_names], dtype=np.bool_
        )
        self.learned = learned.reshape(-1, 2)[np.asarray(shard.labels)]  # (documents, direction)

    def batches(self, epoch: int) -> list[Indices]:
        """Batches of 4 * document + 2 * noisy + direction (0 to Korean, 1 to English).

        Which sources are noisy is drawn here, because text in capitals has twice the tokens: one such row
        would widen its whole batch.
        """
        rng = np.random.default_rng((self.seed, epoch))
        documents = sample_by_weight(self.weights, rng)
        documents, directions = np.tile(documents, 2), np.repeat((0, 1), len(documents))
        learned = self.learned[documents, directions]
        documents, directions = documents[learned], directions[learned]
        noisy = self.twins[documents] & (rng.random(len(documents)) < self.noise)
        first = self.first[documents]
        noisy[noisy] = self.sizes[(first + directions)[noisy] + 2] <= self.max_len
        sides = self.sizes[first + directions + 2 * noisy], self.sizes[first + 1 - directions]
        examples = 4 * documents + 2 * noisy + directions
        lengths = np.stack(sides, axis=1)
        batches = token_budget_batches(lengths, self.budget, rng, self.width_step)
        return [examples[batch] for batch in batches]

    def collate(self, batch: Indices, rng: np.random.Generator) -> Batch:
        """src (B, S); tgt (B, T), which the decoder reads; labels (B, T), which it should say."""
        sources, inputs, labels = [], [], []
        for example in batch:
            document, source = divmod(int(example), 4)
            direction = source % 2
            units = self.shard.document(document)
            src, tgt = units[source].tolist(), units[1 - direction].tolist()
            language = ("ko", "en")[direction]
            sources.append(self.tokenizer.source_ids(src, language, self.tags[self.shard.labels[document]]))
            inputs.append([self.tokenizer.languages[language], *tgt])
            labels.append([*tgt, self.tokenizer.eos_id])
        rows = {"src": sources, "tgt": inputs, "labels": labels}
        padded = {name: pad(each, self.tokenizer.pad_id, self.width_step) for name, each in rows.items()}
        return {name: torch.from_numpy(array) for name, array in padded.items()}

    def loss(self, model: Translator, batch: Batch) -> tuple[Tensor, int]:
        """Mean label-smoothed cross-entropy over the real target tokens, and their number."""
        hidden = model.decode(batch["tgt"], *model.encode(batch["src"]))
        real = batch["labels"] != self.tokenizer.pad_id
        labels = batch["labels"][real]
        smoothing = self.label_smoothing if model.training else 0.0
        weight = model.embeddings.tokens.weight
        return linear_cross_entropy(hidden[real], weight, labels, label_smoothing=smoothing), len(labels)


def source_tag(label: str) -> str:
    """The tag that goes before a source's sentences: software documentation has a voice of its own."""
    everyday = ("written", "mixed", "wiki", "grammar", "tatoeba", "ncsoft", "risawoz", "xpersona", "korsts")
    if label.startswith("back-"):
        return "back"
    return "everyday" if label.startswith(everyday) else "docs"


def _learned(name: str, direction: int) -> bool:
    """Is this direction (0 to Korean, 1 to English) learned from a source?

    Not towards a machine's words, nor towards a side that has words of the other language in it.
    """
    written = {"back-ko": 0, "back-en": 1, "mixed-ko": 0, "mixed-en": 1}
    return all(direction == only for prefix, only in written.items() if name.startswith(prefix))
