"""Labelled texts: a label, then a text or a pair of texts, TAB between; the first line names the columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.models import Classifier
from model.tokenizer import Tokenizer
from model.training.batches import Indices, pad, token_budget_batches
from model.training.packs import PackError, lines_of
from model.training.precision import autocast
from model.training.scores import Row, percent

Batch = dict[str, Tensor]


class Example(NamedTuple):
    """A text, or two, and what it is."""

    label: str
    texts: tuple[str, ...]


def read_labelled(path: Path) -> list[Example]:
    """The examples of a file, xz or not. Raises `PackError` naming the line."""
    lines = lines_of(path)
    columns = next(lines, "").split("\t")
    if columns[0] != "label" or len(columns) not in (2, 3):
        raise PackError(f"{path}:1: the columns are {columns}, not label and one text or two")
    examples = []
    for number, line in enumerate(lines, 2):
        label, *texts = line.split("\t")
        if len(texts) != len(columns) - 1:
            raise PackError(f"{path}:{number}: {len(texts) + 1} columns, not {len(columns)}")
        examples.append(Example(label, tuple(texts)))
    if not examples:
        raise PackError(f"{path}: no examples")
    return examples


class Labelled:
    """Examples as encoder inputs, [CLS] A [SEP] or [CLS] A [SEP] B [SEP], with the number of their label.

    A label is a name or its number. `n_cut` counts the examples that were longer than `max_len` and lost
    their ends.
    """

    def __init__(
        self, examples: Sequence[Example], names: Sequence[str], tokenizer: Tokenizer, max_len: int
    ) -> None:
        numbers = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
        if unknown := {e.label for e in examples} - numbers.keys():
            raise ValueError(f"a label that is none of {', '.join(names)}: {min(unknown)!r}")
        self.tokenizer = tokenizer
        self.labels: Indices = np.array([numbers[e.label] for e in examples], dtype=np.int64)
        self.rows, self.segments, self.n_cut = [], [], 0
        encoded = iter(tokenizer.encode_batch([text for e in examples for text in e.texts]))
        for example in examples:
            parts = [next(encoded) for _ in example.texts]
            room = (max_len - 1) // len(parts) - 1
            self.n_cut += any(len(part) > room for part in parts)
            row, segment = [tokenizer.cls_id], [0]
            for number, part in enumerate(parts):
                row += [*part[:room], tokenizer.sep_id]
                segment += [number] * (len(row) - len(segment))
            self.rows.append(np.array(row, dtype=np.uint16))
            self.segments.append(np.array(segment, dtype=np.uint16))
        self.lengths: Indices = np.array([len(row) for row in self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Indices) -> Labelled:
        """Some of the examples, in that order."""
        part = copy.copy(self)
        part.rows, part.segments = [self.rows[i] for i in indices], [self.segments[i] for i in indices]
        part.labels, part.lengths = self.labels[indices], self.lengths[indices]
        return part

    def joined(self, other: Labelled) -> Labelled:
        """These examples, then the others."""
        both = copy.copy(self)
        both.rows, both.segments = self.rows + other.rows, self.segments + other.segments
        both.labels = np.concatenate((self.labels, other.labels))
        both.lengths = np.concatenate((self.lengths, other.lengths))
        both.n_cut = self.n_cut + other.n_cut
        return both

    def batch(self, indices: Indices) -> Batch:
        """token_ids and segment_ids (B, T), labels (B,)."""
        arrays = {
            "token_ids": pad([self.rows[i] for i in indices], self.tokenizer.pad_id),
            "segment_ids": pad([self.segments[i] for i in indices], 0),
            "labels": self.labels[indices],
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class ClassifyTask:
    """Learning the labels of some of the examples: `chosen` may name one more than once."""

    def __init__(self, data: Labelled, chosen: Indices, *, budget: int, seed: int = 0) -> None:
        self.data, self.chosen, self.budget, self.seed = data, chosen, budget, seed

    def batches(self, epoch: int) -> list[Indices]:
        """Batches of at most `budget` padded tokens."""
        rng = np.random.default_rng((self.seed, epoch))
        found = token_budget_batches(self.data.lengths[self.chosen], self.budget, rng)
        return [self.chosen[batch] for batch in found]

    def collate(self, batch: Indices, _: np.random.Generator) -> Batch:
        return self.data.batch(batch)

    def loss(self, model: Classifier, batch: Batch) -> tuple[Tensor, int]:
        """Mean cross-entropy of the labels, and the tokens read."""
        logits = model(batch["token_ids"], batch["segment_ids"])
        real = batch["token_ids"] != self.data.tokenizer.pad_id
        return F.cross_entropy(logits.float(), batch["labels"]), int(real.sum())


@torch.no_grad()
def probabilities(model: Classifier, data: Labelled, *, bf16: bool = False, budget: int = 8192) -> Tensor:
    """What a classifier says of every example (N, labels), in the order of the examples."""
    device = next(model.parameters()).device
    model.eval()
    out = torch.empty(len(data), len(model.config.labels))
    for indices in token_budget_batches(data.lengths, budget, np.random.default_rng(0)):
        batch = {name: t.to(device) for name, t in data.batch(indices).items()}
        with autocast(device.type, bf16=bf16):
            logits = model(batch["token_ids"], batch["segment_ids"])
        out[torch.from_numpy(indices)] = logits.float().softmax(-1).cpu()
    return out


def accuracy(model: Classifier, data: Labelled, *, bf16: bool = False) -> float:
    """The share of examples whose most likely label is the right one."""
    best = probabilities(model, data, bf16=bf16).argmax(-1).numpy()
    return float((best == data.labels).mean())


def score_labels(name: str, labels: Sequence[str], data: Labelled, found: Tensor) -> Row:
    """Accuracy and the recall of every label; `found` (N, labels) holds probabilities."""
    right = found.argmax(-1).numpy() == data.labels
    row = {
        "text": name,
        "n": str(len(data)),
        "cut": str(data.n_cut),
        "accuracy": percent(int(right.sum()), len(right)),
    }
    for number, label in enumerate(labels):
        mine = right[data.labels == number]
        row[label] = percent(int(mine.sum()), len(mine))
    return row
