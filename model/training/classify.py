"""`python -m model.training classify`: a masked model's encoder learns to label texts, and what that gives.

One command trains the addition that ships and, where asked, beside it the same head from random weights
and with few labels; it prints the tables and writes the folder and its card. Its time is the processor's,
so that a busy machine makes it longer, not worse.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

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
from model.training.lowrank import adapt, adapter_tensors
from model.training.packs import PackError
from model.training.scores import Row, markdown_table
from model.training.transfer import take_encoder

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


class Transfer:
    """One masked model and one recipe: makes classifiers and trains them."""

    def __init__(self, base: Path, recipe: Recipe, device: str, seed: int) -> None:
        config = checkpoint.load_config(base)
        values = config.to_dict() | {"architecture": "classifier", "labels": recipe.labels}
        self.config, self.tokenizer = TransformerConfig.from_dict(values), Tokenizer.load(base)
        self.tensors = load_file(base / checkpoint.WEIGHTS)
        self.recipe, self.device, self.seed = recipe, device, seed

    def read(self, folder: Path, names: Sequence[str]) -> Labelled:
        """The examples of some files, as encoder inputs."""
        examples = [example for name in names for example in read_labelled(folder / name)]
        data = Labelled(examples, self.recipe.labels, self.tokenizer, self.config.max_len)
        if data.n_cut:
            print(
                f"{', '.join(names)}: {data.n_cut} examples longer than {self.config.max_len} tokens were cut"
            )
        return data

    def model(self, seed: int, *, pretrained: bool) -> Classifier:
        """A fresh head on the base with low-rank deltas, or on random weights that all learn."""
        torch.manual_seed(seed)
        model = Classifier(self.config)
        if pretrained:
            take_encoder(model, self.tensors)
            adapt(model, self.recipe.rank, self.recipe.scale, self.recipe.n_layers)
        return model

    def train(
        self, model: Classifier, data: Labelled, chosen: Indices, passes: float, budget: int, seed: int = 0
    ) -> None:
        """Learn the chosen examples in place: linear warm-up over a tenth of the steps, then decay."""
        trainer = self._trainer(model, data, chosen, passes, budget, seed)
        trainer.run()

    def accuracy(self, model: Classifier, data: Labelled) -> float:
        """In the precision of the training."""
        return accuracy(model, data, bf16=self.recipe.bf16)

    def tokens_per_second(self, data: Labelled, *, pretrained: bool) -> float:
        """The speed of a few steps on a model that is thrown away, by the processor's time."""
        model = self.model(0, pretrained=pretrained)
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
    ) -> Trainer:
        task = ClassifyTask(data, chosen, budget=budget, seed=seed)
        steps = steps or max(1, round(passes * len(task.batches(0))))
        adapted = any(not p.requires_grad for p in model.parameters())
        options = Options(
            steps=steps,
            lr=self.recipe.lr if adapted else self.recipe.random_lr,
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
    parser.add_argument("--minutes", type=float, help="of one processor, for all of it; else the recipe's")
    parser.add_argument(
        "--compare", action="store_true", help="show beside it what few labels and random weights give"
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
    train, test = transfer.read(arguments.data, recipe.train), transfer.read(arguments.data, [recipe.test])
    other = transfer.read(arguments.data, [recipe.other]) if recipe.other else None
    tables = [few_label_rows(transfer, train, test)] if arguments.compare else []
    left = started + 60 * (arguments.minutes or recipe.minutes) - time.process_time()
    kinds = (True, False) if arguments.compare else (True,)
    passes = affordable_passes(transfer, (train, test, other), left, kinds)
    print(f"{passes:.2f} passes over {len(train)} examples", flush=True)
    models: dict[bool, Classifier] = {}
    for kind in kinds:
        models[kind] = transfer.model(arguments.seed, pretrained=kind)
        transfer.train(
            models[kind], train, np.arange(len(train)), passes, recipe.batch_tokens, arguments.seed
        )
    found = {kind: transfer.accuracy(model, test) for kind, model in models.items()}
    if arguments.compare:
        name = f"{len(train)} ({passes:.2f} passes)"
        tables[0].append(_few_row(name, 1, len(test), [found[True]], [found[False]]))
    shipped = models[True]
    if other:
        rows, shipped = other_rows(transfer, models, found, (train, test, other))
        tables.append(rows)
    sha256 = _save(arguments, recipe, shipped)
    measured = checkpoint.load(arguments.out, arguments.device).model
    assert isinstance(measured, Classifier)
    tables.append([_shipped_row(transfer, measured, arguments, len(train), passes)])
    report = "\n\n".join(map(markdown_table, tables))
    seconds = time.process_time() - started
    return (
        f"{report}\n\nAccuracy in per cent; ±: standard deviation over seeds, each with its own examples. "
        f"Weights {sha256[:12]}; all of it in {seconds:.0f} s of a processor.\n"
    )


def _shipped_row(
    transfer: Transfer, model: Classifier, arguments: argparse.Namespace, n_train: int, passes: float
) -> Row:
    """What ships, read back from its folder, over all of the test."""
    recipe = transfer.recipe
    test = transfer.read(arguments.data, [recipe.test])
    learned = f"{n_train} of {_stem(recipe.train[0])} ({passes:.2f} passes)"
    return {
        "what ships": f"{learned}{f', all of {_stem(recipe.other)}' if recipe.other else ''}",
        "tested on": f"{_stem(recipe.test)} ({len(test)})",
        "accuracy": _percent(transfer.accuracy(model, test)),
    }


def few_label_rows(transfer: Transfer, train: Labelled, test: Labelled) -> list[Row]:
    """With few labels, drawn anew by every seed: from the base, and from random weights."""
    part = _first(test, transfer.recipe.few_test)
    rows = []
    for size, few in sorted(transfer.recipe.few.items()):
        found: dict[bool, list[float]] = {True: [], False: []}
        for seed in range(transfer.seed, transfer.seed + few.seeds):
            chosen = np.random.default_rng((seed, size)).permutation(len(train))[:size]
            for pretrained, accuracies in found.items():
                model = transfer.model(seed, pretrained=pretrained)
                transfer.train(model, train, chosen, few.passes, few.batch_tokens, seed)
                accuracies.append(transfer.accuracy(model, part))
        rows.append(_few_row(str(size), few.seeds, len(part), found[True], found[False]))
        print(rows[-1], flush=True)
    return rows


def _few_row(
    labels: str, seeds: int, n_test: int, pretrained: Sequence[float], random: Sequence[float]
) -> Row:
    return {
        "labels": labels,
        "seeds": str(seeds),
        "tested on": str(n_test),
        "pre-trained, low-rank": _spread(pretrained),
        "random weights": _spread(random),
    }


def affordable_passes(
    transfer: Transfer,
    data: tuple[Labelled, Labelled, Labelled | None],
    seconds: float,
    kinds: Sequence[bool],
) -> float:
    """How many passes over all labels fit into what is left of the time, for each kind, with the tests.

    Raises ValueError when it is less than a twentieth of one.
    """
    (train, test, other), recipe = data, transfer.recipe
    speeds = [transfer.tokens_per_second(train, pretrained=kind) for kind in kinds]
    mean = float(test.lengths.mean())
    fixed = (1 + len(kinds)) * len(test) * mean / (2 * speeds[0])  # a test is half the work at the least
    if other:  # every fold once alone, and once beside as many of the first kind; then all for what ships
        fixed += _FOLDS * recipe.few_test * mean / (2 * speeds[0])
        alone = _other_passes(recipe).passes * float(other.lengths.sum())
        beside = recipe.other_passes * len(other) * (mean + float(other.lengths.mean()))
        fixed += ((_FOLDS - 1) * alone + _FOLDS * beside) / speeds[0]
    one = sum(float(train.lengths.sum()) / speed for speed in speeds)
    passes = min(recipe.passes, 0.95 * (seconds - fixed) / one)
    if passes < 0.05:
        rates = " and ".join(f"{speed:.0f}" for speed in speeds)
        raise ValueError(
            f"{seconds:.0f} s left, {fixed:.0f} s for the tests, {one:.0f} s for a pass at {rates} tokens/s: "
            "give more --minutes"
        )
    return passes


def _other_passes(recipe: Recipe) -> Few:
    """How to train on the few labels of the other kind alone: as on the most of the few."""
    return recipe.few[max(recipe.few)] if recipe.few else Few(recipe.other_passes, recipe.batch_tokens, 1)


def other_rows(
    transfer: Transfer,
    models: dict[bool, Classifier],
    found: dict[bool, float],
    data: tuple[Labelled, Labelled, Labelled],
) -> tuple[list[Row], Classifier]:
    """What the labels of one kind give in the other, alone and together; and the model that learned both.

    The other kind is too little to be parted once, so that every fifth is tested after learning the rest.
    """
    train, test, other = data
    recipe = transfer.recipe
    part = _first(test, recipe.few_test)
    both = Both(train, other)
    alone, together, kept = [], [], []
    folds = np.array_split(np.random.default_rng(transfer.seed).permutation(len(other)), _FOLDS)
    for number, fold in enumerate(folds):
        rest = np.concatenate([f for i, f in enumerate(folds) if i != number])
        few = _other_passes(recipe)
        model = transfer.model(transfer.seed, pretrained=True)
        transfer.train(model, other, rest, few.passes, few.batch_tokens, number)
        held = other.subset(fold)
        alone.append(transfer.accuracy(model, held) * len(fold))
        model = _learn_other(transfer, models[True], both, rest, number)
        together.append(transfer.accuracy(model, held) * len(fold))
        kept.append(transfer.accuracy(model, part))
    names = (_stem(recipe.test), _stem(recipe.other))
    sizes = (len(test), len(other))
    header = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True)]

    def row(learned: str, first: str, second: str) -> Row:
        return {"learned from": learned, header[0]: first, header[1]: second}

    source = _stem(recipe.train[0])
    n_rest = len(other) - len(other) // _FOLDS
    rows = [
        row(f"{len(train)} of {source}", _percent(found[True]), _share(transfer, models[True], other)),
        row(f"{n_rest} of {names[1]}, {_FOLDS} folds", "-", _percent(sum(alone) / len(other))),
        row(
            f"both, {_FOLDS} folds",
            f"{_percent(statistics.mean(kept))} (of {len(part)})",
            _percent(sum(together) / len(other)),
        ),
    ]
    if False in models:
        learned = f"{len(train)} of {source}, random weights"
        rows.append(row(learned, _percent(found[False]), _share(transfer, models[False], other)))
    return rows, _learn_other(transfer, models[True], both, np.arange(len(other)), transfer.seed)


class Both(Labelled):
    """Two sets of examples as one, the second after the first."""

    def __init__(self, first: Labelled, second: Labelled) -> None:
        self.tokenizer, self.n_cut = first.tokenizer, first.n_cut + second.n_cut
        self.rows, self.segments = first.rows + second.rows, first.segments + second.segments
        self.labels = np.concatenate((first.labels, second.labels))
        self.lengths = np.concatenate((first.lengths, second.lengths))
        self.n_first = len(first)


def _learn_other(transfer: Transfer, model: Classifier, both: Both, chosen: Indices, seed: int) -> Classifier:
    """A copy that has also learned examples of the second kind, as many of the first beside them."""
    model = copy.deepcopy(model)
    again = np.random.default_rng((seed, 3)).permutation(both.n_first)[: len(chosen)]
    examples = np.concatenate((both.n_first + chosen, again))
    budget = _other_passes(transfer.recipe).batch_tokens
    transfer.train(model, both, examples, transfer.recipe.other_passes, budget, seed)
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


def _share(transfer: Transfer, model: Classifier, data: Labelled) -> str:
    return _percent(transfer.accuracy(model, data))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _spread(shares: Sequence[float]) -> str:
    mean = _percent(statistics.mean(shares))
    return mean if len(shares) < 2 else f"{mean} ± {100 * statistics.stdev(shares):.1f}"
