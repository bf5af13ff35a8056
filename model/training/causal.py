"""Learning the next token: documents packed into windows, no attention across their boundaries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from model.masks import document_mask
from model.models import CausalLM
from model.tokenizer import Tokenizer
from model.training.batches import Indices, sample_by_weight, weights_by_label
from model.training.loss import linear_cross_entropy
from model.training.shards import Shard

Batch = dict[str, Tensor]


class CausalTask:
    """Windows of `max_len` tokens cut from begin, document, end, begin, document, end, ...

    A window that falls inside a document begins with its next sentence, behind a begin token of its own. In
    use every prompt stands behind one; without this it would mostly be seen before texts of one sentence.
    `weights` maps a prefix of a document's label to how often an epoch holds it; the longest prefix counts.
    """

    def __init__(
        self,
        shard: Shard,
        tokenizer: Tokenizer,
        *,
        budget: int,
        max_len: int = 256,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.shard, self.tokenizer, self.max_len, self.seed = shard, tokenizer, max_len, seed
        self.rows = max(1, budget // max_len)
        units = np.asarray(shard.units)
        docs = np.asarray(shard.docs)
        self.starts, self.sizes = units[docs[:-1]], units[docs[1:]] - units[docs[:-1]]
        self.weights = weights_by_label(np.asarray(shard.labels), shard.label_names, weights or {"": 1.0})

    def batches(self, epoch: int) -> list[Indices]:
        """Batches of windows (B, 2): offset in the epoch's stream, epoch; a partial batch only alone."""
        rng = np.random.default_rng((self.seed, epoch))
        _, ends = self._stream(epoch)
        total = int(ends[-1]) if len(ends) else 0
        windows = np.arange(max(0, total - 1) // self.max_len, dtype=np.int64)
        rng.shuffle(windows)
        n_batches = max(min(1, len(windows)), len(windows) // self.rows)
        columns = np.stack((windows * self.max_len, np.full_like(windows, epoch)), axis=1)
        return [columns[i * self.rows : (i + 1) * self.rows] for i in range(n_batches)]

    def collate(self, batch: Indices, rng: np.random.Generator) -> Batch:
        """token_ids and labels (B, T); documents (B, T), a number per document."""
        windows = np.stack([self._window(int(offset), int(epoch)) for offset, epoch in batch])
        token_ids, labels = windows[:, :-1], windows[:, 1:]
        # The label of an end token would be the next document's begin: nothing to learn there.
        labels = np.where(token_ids == self.tokenizer.eos_id, self.tokenizer.pad_id, labels)
        documents = np.cumsum(token_ids == self.tokenizer.bos_id, axis=1)
        arrays = {"token_ids": token_ids, "labels": labels, "documents": documents}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def _window(self, offset: int, epoch: int) -> Indices:
        """max_len + 1 tokens of the epoch's stream from `offset`, or the next sentence behind it, on."""
        order, ends = self._stream(epoch)
        place = int(np.searchsorted(ends, offset, side="right"))
        first = self._framed(order[place], offset - (int(ends[place - 1]) if place else 0))
        parts, filled = [first], len(first)
        while filled <= self.max_len:
            place = (place + 1) % len(order)
            parts.append(self._framed(order[place]))
            filled += len(parts[-1])
        return np.concatenate(parts)[: self.max_len + 1]

    def _framed(self, document: int, skip: int = 0) -> Indices:
        """Begin, document, end; or begin, and what follows from the first sentence at or behind `skip` on."""
        start, size = int(self.starts[document]), int(self.sizes[document])
        tokens = np.asarray(self.shard.tokens[start : start + size], dtype=np.int64)
        framed = np.concatenate(([self.tokenizer.bos_id], tokens, [self.tokenizer.eos_id]))
        if not skip:
            return framed
        units = self.shard.units[self.shard.docs[document] : self.shard.docs[document + 1]]
        behind = [place for place in (units - start + 1).tolist() if place >= skip]
        return np.concatenate((framed[:1], framed[behind[0] :])) if behind else framed[:0]

    def _stream(self, epoch: int) -> tuple[Indices, Indices]:
        if getattr(self, "_epoch", None) != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            order = rng.permutation(sample_by_weight(self.weights, rng))
            self._order, self._ends, self._epoch = order, np.cumsum(self.sizes[order] + 2), epoch
        return self._order, self._ends

    def loss(self, model: CausalLM, batch: Batch) -> tuple[Tensor, int]:
        """Mean cross-entropy of the next token, and the number of tokens."""
        hidden = model.hidden(batch["token_ids"], document_mask(batch["documents"]))
        real = batch["labels"] != self.tokenizer.pad_id
        labels = batch["labels"][real]
        return linear_cross_entropy(hidden[real], model.embeddings.tokens.weight, labels), len(labels)
