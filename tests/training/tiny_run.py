"""A tiny training run: in a test's own process, or `python -m tests.training.tiny_run` in another."""

import argparse
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.models import build_model
from model.tokenizer import Tokenizer
from model.training.loop import Batch, Options, Task, Trainer
from model.training.masked import MaskedTask
from model.training.shards import Document, Shard, write_shard
from model.training.translate import TranslateTask
from tests.tiny import PAIRS, fitting_config

OPTIONS = Options(
    steps=8,
    lr=3e-3,
    warmup=2,
    checkpoint_every=3,
    evaluate_every=4,
    log_every=2,
    accumulate=2,
    optimizer="muon",
)


class MortalTrainer(Trainer):
    """Dies without a word at a step."""

    kill_at = -1

    def train_step(self, batches: Iterator[Batch], factor: float | None = None) -> tuple[Tensor, int]:
        if self.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batches, factor)


def pair_texts() -> list[Document]:
    """Every pair, with twins in small letters."""
    return [("written-daily", [en, ko, en.lower(), ko.removesuffix(".")]) for en, ko in PAIRS]


def passage_texts() -> list[Document]:
    """Four documents of three sentences each, and four of one sentence, which know no next."""
    english = [en for en, _ in PAIRS]
    documents = [("books", [" " + s for s in english[i : i + 3]]) for i in range(0, 12, 3)]
    return [*documents, *(("sentences", [sentence]) for sentence in english[:4])]


def make_task(kind: str, shard: Shard, tokenizer: Tokenizer) -> Task:
    """Small batches, so that a few steps go through several epochs."""
    if kind == "translate":
        return TranslateTask(shard, tokenizer, weights={"": 1.0}, budget=400, noise=0.5)
    return MaskedTask(shard, tokenizer, budget=100, max_len=96)


def make_trainer(folder: Path, kind: str, options: Options, dropout: float = 0.1) -> MortalTrainer:
    """A trainer of a tiny model in `folder`, which holds tokenizer.json."""
    tokenizer = Tokenizer.load(folder)
    texts = pair_texts() if kind == "translate" else passage_texts()
    shard = write_shard(folder / f"shard-{os.environ.get('RANK', 0)}", tokenizer, texts)
    task, held = (make_task(kind, shard, tokenizer) for _ in range(2))
    torch.manual_seed(options.seed)
    architecture = "translator" if kind == "translate" else "masked_lm"
    model = build_model(fitting_config(architecture, tokenizer, dropout=dropout, max_len=96))
    return MortalTrainer(model, tokenizer, task, held, options, folder / "run")


def main() -> None:
    """Run to the end, or to the death."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--accumulate", type=int, default=OPTIONS.accumulate)
    parser.add_argument("--dropout", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = replace(OPTIONS, accumulate=arguments.accumulate)
    trainer = make_trainer(arguments.folder, arguments.kind, options, arguments.dropout)
    trainer.kill_at = arguments.kill_at
    trainer.run()


if __name__ == "__main__":
    main()
