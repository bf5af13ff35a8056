"""`python -m model.training classify`: a masked model's encoder learns to label texts, and what that gives.

One command trains the addition that ships and, where asked, beside it the same head from random weights
and with few labels; it prints the tables and writes the folder and its card. The time it may take is the
processor's, so that a busy machine makes it longer, not worse.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint
from model.adapter import Adapter
from model.checkpoint import CheckpointError
from model.config import TransformerConfig
from model.models import Classifier
from model.tokenizer import Tokenizer
from model.training.batches import Indices
from model.training.evaluate import CARD, write_card
from model.training.labelled import ClassifyTask, Labelled, accuracy, read_labelled
from model.training.loop import Options, Trainer
from model.training.lowrank import adapt, adapter_tensors, take_adapter
from model.training.packs import PackError
from model.training.scores import Row, markdown_table
from model.training.transfer import take_encoder
from model.weights import read_all

LOW_RANK, ALL_WEIGHTS, RANDOM = "pre-trained, low-rank", "pre-trained, all weights", "random weights"
STARTS = (LOW_RANK, ALL_WEIGHTS, RANDOM)  # where a classifier begins, and with it what it learns

_FOLDS = 5
_PROBE = 4  # steps by which the speed is judged


@dataclass(frozen=True)
class Few:
    """How to train on few labels."""

    passes: float
    batch_tokens: int
    seeds: int


@dataclass(frozen=True)
class Recipe:
    """A file under recipes/; its sections [data], [adapter] and [train] stand here side by side.

    A label in the files is one of `labels` or its number from 0 on; `other` is a second test of another kind,
    of which `other_passes` over four fifths are learned on top of `train` in turn.
    """

    train: list[str]
    test: str
    labels: list[str]
    rank: int
    scale: float
    n_layers: int
    minutes: float
    passes: float
    batch_tokens: int
    lr: float
    random_lr: float
    all_lr: float = 1e-4
    other: str = ""
    other_passes: float = 4.0
    few_test: int = 2000
    weight_decay: float = 0.01
    bf16: bool = False
    few: dict[int, Few] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Raises ValueError naming the file on a missing or an unknown key."""
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
        try:
            few = {int(size): Few(**values) for size, values in sections.pop("few", {}).items()}
            flat = {key: value for section in sections.values() for key, value in section.items()}
            return cls(**flat, few=few)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None


class Data(NamedTuple):
    """What is learned, what is tested, and a second test of another kind."""

    train: Labelled
    test: Labelled
    other: Labelled | None


class Transfer:
    """One masked model and one recipe: makes classifiers and trains them."""

    def __init__(self, base: Path, recipe: Recipe, device: str, seed: int) -> None:
        config = checkpoint.load_config(base)
        values = config.to_dict() | {"architecture": "classifier", "labels": recipe.labels}
        self.config, self.tokenizer = TransformerConfig.from_dict(values), Tokenizer.load(base)
        self.tensors = load_file(base / checkpoint.WEIGHTS)
        self.recipe, self.device, self.seed = recipe, device, seed
        self.names = (_stem(recipe.train[0]), _stem(recipe.other))
        self.columns = (f"on {_stem(recipe.test)}", f"on {_stem(recipe.other)}")

    def read(self, folder: Path, names: Sequence[str]) -> Labelled:
        """The examples of some files, as encoder inputs."""
        examples = [example for name in names for example in read_labelled(folder / name)]
        data = Labelled(examples, self.recipe.labels, self.tokenizer, self.config.max_len)
        if data.n_cut:
            print(
                f"{', '.join(names)}: {data.n_cut} examples longer than {self.config.max_len} tokens were cut"
            )
        return data

    def model(self, seed: int, start: str = LOW_RANK) -> Classifier:
        """A fresh head on the base, of which low-rank deltas or all weights learn, or on random weights."""
        torch.manual_seed(seed)
        model = Classifier(self.config)
        if start != RANDOM:
            take_encoder(model, self.tensors)
        if start == LOW_RANK:
            adapt(model, self.recipe.rank, self.recipe.scale, self.recipe.n_layers)
        return model

    def train(
        self,
        model: Classifier,
        data: Labelled,
        chosen: Indices,
        passes: float,
        budget: int,
        seed: int = 0,
        start: str = LOW_RANK,
    ) -> None:
        """Learn the chosen examples in place: linear warm-up over a tenth of the steps, then decay."""
        trainer = self._trainer(model, data, chosen, passes, budget, seed, start=start)
        trainer.run()

    def learn(
        self, data: Labelled, passes: float, start: str = LOW_RANK, earlier: Path | None = None
    ) -> Classifier:
        """A model that has learned all the examples, beginning with an earlier addition where given."""
        model = self.model(self.seed, start)
        if earlier:
            take_adapter(model, self._earlier_tensors(earlier))
        budget = self.recipe.batch_tokens
        self.train(model, data, np.arange(len(data)), passes, budget, self.seed, start)
        return model

    def _earlier_tensors(self, folder: Path) -> dict[str, Tensor]:
        """An addition's tensors. Raises ValueError on other labels, `CheckpointError` where it is broken."""
        found = checkpoint.Folder(folder)
        if found.adapter is None:
            raise ValueError(f"{folder} is no addition to a base")
        if (found.adapter.labels, found.adapter.scale) != (self.recipe.labels, self.recipe.scale):
            raise ValueError(f"{folder}: its labels or its scale are not those of the recipe")
        return read_all(found.stored)

    def row(self, learned: str, model: Classifier, data: Data) -> Row:
        """Accuracy on the beginning of the test, and on the other kind."""
        part = _first(data.test, self.recipe.few_test)
        tested = {self.columns[0]: part} | ({self.columns[1]: data.other} if data.other else {})
        found = {
            column: f"{_percent(self.accuracy(model, some))}% of {len(some)}"
            for column, some in tested.items()
        }
        return {"learned from": learned} | found

    def accuracy(self, model: Classifier, data: Labelled) -> float:
        """In the precision of the training."""
        return accuracy(model, data, bf16=self.recipe.bf16)

    def tokens_per_second(self, data: Labelled) -> float:
        """The speed of a few steps on a model that is thrown away, by the processor's time."""
        model = self.model(0)
        trainer = self._trainer(model, data, np.arange(len(data)), 1.0, self.recipe.batch_tokens, 0, _PROBE)
        started = time.process_time()
        trainer.run()
        return trainer.tokens / (time.process_time() - started)

    def _trainer(
        self,
        model: Classifier,
        data: Labelled,
        chosen: Indices,
        passes: float,
        budget: int,
        seed: int,
        steps: int = 0,
        start: str = LOW_RANK,
    ) -> Trainer:
        task = ClassifyTask(data, chosen, budget=budget, seed=seed)
        steps = steps or max(1, round(passes * len(task.batches(0))))
        rates = {LOW_RANK: self.recipe.lr, ALL_WEIGHTS: self.recipe.all_lr, RANDOM: self.recipe.random_lr}
        options = Options(
            steps=steps,
            lr=rates[start],
            warmup=steps // 10,
            decay=1.0,
            weight_decay=self.recipe.weight_decay,
            seed=seed,
            device=self.device,
            bf16=self.recipe.bf16,
        )
        return Trainer(model, self.tokenizer, task, None, options, None)


def add_classify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `classify`."""
    parser.add_argument(
        "--recipe", type=Path, required=True, help="TOML with [data], [adapter], [few], [train]"
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the masked model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the addition, beside its base")
    parser.add_argument("--minutes", type=float, help="of a processor, for what ships; else the recipe's")
    made = parser.add_mutually_exclusive_group()
    made.add_argument(
        "--compare", action="store_true", help="then show what few labels, random weights and folds give"
    )
    made.add_argument(
        "--continue-from",
        type=Path,
        metavar="ADDITION",
        help="begin with this folder's deltas and head, made for the base as it was before",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--card", action="store_true", help=f"write the tables into {CARD} of --out")


def classify_command(arguments: argparse.Namespace) -> int:
    """Train, save, measure; returns the exit status."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        recipe = Recipe.read(arguments.recipe)
        report = _run(arguments, recipe)
    except (CheckpointError, PackError, OSError, ValueError) as error:
        print(f"classify: {error}")
        return 1
    print(report)
    if arguments.card:
        write_card(arguments.out / CARD, report)
    return 0


def _run(arguments: argparse.Namespace, recipe: Recipe) -> str:
    started = time.process_time()
    transfer = Transfer(arguments.base, recipe, arguments.device, arguments.seed)
    data = Data(
        transfer.read(arguments.data, recipe.train),
        transfer.read(arguments.data, [recipe.test]),
        transfer.read(arguments.data, [recipe.other]) if recipe.other else None,
    )
    left = started + 60 * (arguments.minutes or recipe.minutes) - time.process_time()
    passes = affordable_passes(transfer, data, left)
    print(f"{passes:.2f} passes over {len(data.train)} examples", flush=True)
    earlier: Path | None = arguments.continue_from
    model = transfer.learn(data.train, passes, earlier=earlier)
    shipped = model
    if data.other:
        shipped = _learn_other(transfer, model, data, np.arange(len(data.other)), arguments.seed)
    sha256 = _save(arguments, recipe, shipped)
    rows = []
    if not earlier:  # which has learned the other kind, too
        rows.append(transfer.row(f"{transfer.names[0]} alone", model, data))
        print(rows[-1], flush=True)
    rows.append(_shipped_row(arguments, transfer, data))
    tables = [rows]
    if arguments.compare:
        part = _first(data.test, recipe.few_test)
        found = {LOW_RANK: [transfer.accuracy(model, part)]}
        more = []
        for start in STARTS[1:]:
            other = transfer.learn(data.train, passes, start)
            more.append(transfer.row(f"{transfer.names[0]} alone, {start}", other, data))
            print(more[-1], flush=True)
            found[start] = [transfer.accuracy(other, part)]
        rows[1:1] = [*more, *(fold_rows(transfer, model, data) if data.other else [])]
        tables.append(few_label_rows(transfer, data))
        tables[-1].append(_few_row(str(round(passes * len(data.train))), 1, len(part), found))
    report = "\n\n".join(map(markdown_table, tables))
    seconds = time.process_time() - started
    return (
        f"{report}\n\nAccuracy in per cent, and of how many; ±: standard deviation over seeds, each with its "
        f"own examples. {passes:.2f} passes over the {len(data.train)} of {transfer.names[0]}"
        f"{', after those of an earlier addition' if earlier else ''}. "
        f"Weights {sha256[:12]}; all of it in {seconds:.0f} s of a processor.\n"
    )


def _shipped_row(arguments: argparse.Namespace, transfer: Transfer, data: Data) -> Row:
    """What ships, read back from its folder, over all of the test."""
    model = checkpoint.load(arguments.out, arguments.device).model
    assert isinstance(model, Classifier)
    whole = f"{_percent(transfer.accuracy(model, data.test))}% of {len(data.test)}"
    row = {"learned from": "what ships", transfer.columns[0]: whole}
    return row | ({transfer.columns[1]: "learned"} if data.other else {})


def few_label_rows(transfer: Transfer, data: Data) -> list[Row]:
    """With few labels, drawn anew by every seed: from the base in both ways, and from random weights."""
    part = _first(data.test, transfer.recipe.few_test)
    rows = []
    for size, few in sorted(transfer.recipe.few.items()):
        found: dict[str, list[float]] = {start: [] for start in STARTS}
        for seed in range(transfer.seed, transfer.seed + few.seeds):
            chosen = np.random.default_rng((seed, size)).permutation(len(data.train))[:size]
            for start, accuracies in found.items():
                model = transfer.model(seed, start)
                transfer.train(model, data.train, chosen, few.passes, few.batch_tokens, seed, start)
                accuracies.append(transfer.accuracy(model, part))
        rows.append(_few_row(str(size), few.seeds, len(part), found))
        print(rows[-1], flush=True)
    return rows


def _few_row(labels: str, seeds: int, n_test: int, found: Mapping[str, Sequence[float]]) -> Row:
    row = {"labels": labels, "seeds": str(seeds), "tested on": str(n_test)}
    return row | {start: _spread(shares) for start, shares in found.items()}


def affordable_passes(transfer: Transfer, data: Data, seconds: float) -> float:
    """How many passes over all labels fit into the time, with all else that makes what ships.

    Raises ValueError when it is less than a twentieth of one.
    """
    recipe, mean = transfer.recipe, float(data.test.lengths.mean())
    speed = transfer.tokens_per_second(data.train)
    tokens = (
        (len(data.test) + recipe.few_test) * mean / 2
    )  # to test is half the work of training, at the least
    if data.other:
        beside = len(data.other) * (mean + float(data.other.lengths.mean()))
        tokens += recipe.other_passes * beside
    fixed, one = tokens / speed, float(data.train.lengths.sum()) / speed
    passes = min(recipe.passes, 0.95 * (seconds - fixed) / one)
    if passes < 0.05:
        raise ValueError(
            f"{seconds:.0f} s left; {fixed:.0f} s for the tests and {one:.0f} s for a pass at {speed:.0f} "
            "tokens/s: give more --minutes"
        )
    return passes


def fold_rows(transfer: Transfer, model: Classifier, data: Data) -> list[Row]:
    """What the labels of the other kind give alone, and on top of a model that learned the first.

    The other kind is too little to be parted once, so that every fifth is tested after learning the rest.
    """
    assert data.other
    part = _first(data.test, transfer.recipe.few_test)
    alone, together, kept = 0.0, 0.0, []
    folds = np.array_split(np.random.default_rng(transfer.seed).permutation(len(data.other)), _FOLDS)
    few = _most_of_few(transfer.recipe)
    for number, fold in enumerate(folds):
        rest = np.concatenate([f for i, f in enumerate(folds) if i != number])
        held = data.other.subset(fold)
        fresh = transfer.model(transfer.seed)
        transfer.train(fresh, data.other, rest, few.passes, few.batch_tokens, number)
        alone += transfer.accuracy(fresh, held) * len(fold) / len(data.other)
        both = _learn_other(transfer, model, data, rest, number)
        together += transfer.accuracy(both, held) * len(fold) / len(data.other)
        kept.append(transfer.accuracy(both, part))
    first, second = transfer.columns
    n = len(data.other)
    mean = f"{_percent(statistics.mean(kept))}% of {len(part)}"
    return [
        {
            "learned from": f"{transfer.names[1]} alone, {_FOLDS} folds",
            first: "-",
            second: f"{_percent(alone)}% of {n}",
        },
        {"learned from": f"both, {_FOLDS} folds", first: mean, second: f"{_percent(together)}% of {n}"},
    ]


def _most_of_few(recipe: Recipe) -> Few:
    """How to train on some hundreds of labels."""
    return recipe.few[max(recipe.few)] if recipe.few else Few(recipe.other_passes, recipe.batch_tokens, 1)


def _learn_other(transfer: Transfer, model: Classifier, data: Data, chosen: Indices, seed: int) -> Classifier:
    """A copy that has also learned examples of the other kind, as many of the first beside them."""
    assert data.other
    model = copy.deepcopy(model)
    again = np.random.default_rng((seed, 3)).permutation(len(data.train))[: len(chosen)]
    both = data.other.subset(chosen).joined(data.train.subset(again))
    budget = _most_of_few(transfer.recipe).batch_tokens
    transfer.train(model, both, np.arange(len(both)), transfer.recipe.other_passes, budget, seed)
    return model


def _save(arguments: argparse.Namespace, recipe: Recipe, model: Classifier) -> str:
    """Write the addition; returns the digest of its weights."""
    base: Path = arguments.base
    adapter = Adapter(
        base=os.path.relpath(base.resolve(), arguments.out.resolve()),
        base_sha256=checkpoint.file_sha256(base / checkpoint.WEIGHTS),
        scale=recipe.scale,
        labels=recipe.labels,
    )
    checkpoint.save_adapter(arguments.out, adapter, adapter_tensors(model))
    return checkpoint.file_sha256(arguments.out / checkpoint.WEIGHTS)


def _first(data: Labelled, count: int) -> Labelled:
    return data.subset(np.arange(min(count, len(data))))


def _stem(name: str) -> str:
    return name.split(".")[0]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _spread(shares: Sequence[float]) -> str:
    mean = _percent(statistics.mean(shares))
    return mean if len(shares) < 2 else f"{mean} ± {100 * statistics.stdev(shares):.1f}"
