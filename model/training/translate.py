"""Learning to translate: both directions in one model, teacher forcing, label smoothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.models import Translator
from model.tokenizer import Tokenizer
from model.training.batches import Indices, pad, sample_by_weight, token_budget_batches
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
        seed: int = 0,
    ) -> None:
        self.shard, self.tokenizer = shard, tokenizer
        self.budget, self.label_smoothing, self.noise, self.seed = budget, label_smoothing, noise, seed
        first = np.asarray(shard.docs[:-1])
        sizes = np.diff(np.asarray(shard.units))
        self.lengths = np.maximum(sizes[first], sizes[first + 1]) + 3  # tag, language, end
        by_label = np.array([_weight(name, weights) for name in shard.label_names])
        self.weights: NDArray[np.float64] = by_label[np.asarray(shard.labels)] * (self.lengths <= max_len)
        self.tags = [source_tag(name) for name in shard.label_names]
        learned = np.array([[_learned(name, d) for d in (0, 1)] for name in shard.label_names])
        self.learned = learned[np.asarray(shard.labels)]  # (documents, direction)

    def batches(self, epoch: int) -> list[Indices]:
        """Batches of 2 * document + direction (0 to Korean, 1 to English)."""
        rng = np.random.default_rng((self.seed, epoch))
        documents = sample_by_weight(self.weights, rng)
        examples = np.concatenate((2 * documents, 2 * documents + 1))
        examples = examples[self.learned[examples // 2, examples % 2]]
        order = token_budget_batches(self.lengths[examples // 2], self.budget, rng)
        return [examples[batch] for batch in order]

    def collate(self, batch: Indices, rng: np.random.Generator) -> Batch:
        """src (B, S); tgt (B, T), which the decoder reads; labels (B, T), which it should say."""
        sources, inputs, labels = [], [], []
        for example in batch:
            document, direction = divmod(int(example), 2)
            units = self.shard.document(document)
            noisy = len(units) == 4 and rng.random() < self.noise
            src, tgt = units[direction + 2 * noisy].tolist(), units[1 - direction].tolist()
            language = ("ko", "en")[direction]
            sources.append(self.tokenizer.source_ids(src, language, self.tags[self.shard.labels[document]]))
            inputs.append([self.tokenizer.languages[language], *tgt])
            labels.append([*tgt, self.tokenizer.eos_id])
        pad_id = self.tokenizer.pad_id
        arrays = {"src": pad(sources, pad_id), "tgt": pad(inputs, pad_id), "labels": pad(labels, pad_id)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

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
    everyday = ("written", "wiki", "grammar", "tatoeba", "ncsoft", "risawoz", "xpersona", "korsts")
    if label.startswith("back-"):
        return "back"
    return "everyday" if label.startswith(everyday) else "docs"


def _learned(name: str, direction: int) -> bool:
    """Is this direction (0 to Korean, 1 to English) learned from a source? Not towards a machine's words."""
    written = {"back-ko": 0, "back-en": 1}
    return all(direction == only for prefix, only in written.items() if name.startswith(prefix))


def _weight(name: str, weights: Mapping[str, float]) -> float:
    fitting = [prefix for prefix in weights if name.startswith(prefix)]
    return weights[max(fitting, key=len)] if fitting else 0.0
