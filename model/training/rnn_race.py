"""`python -m model.training rnn`: a recurrent translator and a Transformer, equal in size and time, compared.

Both read the same batches in the same order under the same optimiser, turn by turn in one process, so that a
busy machine slows both alike. The time is the processor's, not the clock's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from model.models import Translator, build_model
from model.sampling import BeamParams
from model.tokenizer import Tokenizer
from model.training.batches import Indices
from model.training.evaluate import read_parallel, write_card
from model.training.loop import Batch, Options, Task, Trainer
from model.training.precision import autocast
from model.training.rnn import RNNConfig, RNNTranslator, greedy
from model.training.schedule import Schedule
from model.training.scores import DIRECTIONS, Row, markdown_table
from model.training.translate import TranslateTask
from model.training.translate_batch import BeamTranslator, by_length

KINDS = ("RNN", "Transformer")
Either = RNNTranslator | Translator
_TICKS = 1000  # the schedule's steps: thousandths of the time
_TOKENS, _ROWS, _REPEATS = 3072, 16, 3  # of a training batch, of a decoding batch, of a measurement


@dataclass
class Runner:
    """One of the two: its trainer, and the batches that are still to come."""

    trainer: Trainer
    batches: Iterator[Batch]


def add_rnn_arguments(parser: argparse.ArgumentParser) -> None:
    """What `rnn` takes beyond the arguments of every training."""
    parser.add_argument("--dev", type=Path, help="stem of line-parallel files .eng and .kor to translate")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="lines of --dev; 0 is all")
    parser.add_argument("--report", type=Path, help="write the tables between the marks of this file")
    parser.add_argument("--measure-only", action="store_true", help="train nothing, compare what --run holds")


def build(kind: str, recipe: dict[str, Any], tokenizer: Tokenizer, transformer: Any, seed: int) -> Either:
    """A fresh model of a kind; `transformer` is the configuration of the one that is no RNN."""
    torch.manual_seed(seed)
    if kind == "Transformer":
        model = build_model(transformer)
        assert isinstance(model, Translator)
        return model
    ids: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
    }
    return RNNTranslator(RNNConfig(**recipe["rnn"], **ids, languages=tokenizer.languages))


def race(
    models: dict[str, Either],
    tokenizer: Tokenizer,
    tasks: tuple[Task, Task],
    options: Options,
    minutes: float,
    folder: Path,
) -> dict[str, Trainer]:
    """Train each for so many minutes of the processor, going on from what the folder holds."""
    schedule = Schedule(_TICKS, options.warmup, options.decay)
    budget = 60 * minutes
    runners = {}
    for kind, model in models.items():
        trainer = Trainer(model, tokenizer, *tasks, options, folder / kind.lower())  # type: ignore[arg-type]
        trainer.resume()
        runners[kind] = Runner(trainer, trainer.batches_from(trainer.step))
    while racing := [r for r in runners.values() if r.trainer.seconds < budget]:
        runner = min(racing, key=lambda r: r.trainer.seconds)
        trainer = runner.trainer
        tick = min(_TICKS - 1, int(_TICKS * trainer.seconds / budget))
        started = time.process_time()
        loss, tokens = trainer.train_step(runner.batches, schedule(tick))
        trainer.seconds += time.process_time() - started
        trainer.tokens += tokens
        over = trainer.seconds >= budget
        if over or trainer.step % options.checkpoint_every == 0:
            trainer.save()
        if over or trainer.step % options.log_every == 0:
            name = trainer.folder.name if trainer.folder else ""
            print(f"{name}: step {trainer.step}, {trainer.seconds:.0f} s, loss {loss:.3f}", flush=True)
    return {kind: runner.trainer for kind, runner in runners.items()}


# --- quality ----------------------------------------------------------------------------------


@torch.no_grad()
def held_rows(trainers: dict[str, Trainer], task: TranslateTask, edges: Sequence[int]) -> list[Row]:
    """Held-out loss per target token, by the longer side's length in tokens."""
    examples = np.concatenate(task.batches(0))
    lengths = task.lengths[examples // 4] - 3  # without tag, language and end
    rows = []
    for low, high in spans(edges):
        chosen = np.sort(examples[(lengths > low) & (lengths <= high)])
        if not len(chosen):
            continue
        row = {"tokens": _span(low, high), "sentences": str(len(chosen))}
        for kind, trainer in trainers.items():
            row[f"{kind}: loss"] = f"{_loss(trainer, task, chosen):.3f}"
        rows.append(row)
    return rows


def _loss(trainer: Trainer, task: TranslateTask, examples: Indices) -> float:
    trainer.model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), 64):
        batch = task.collate(examples[start : start + 64], np.random.default_rng(0))
        loss, tokens = task.loss(trainer.model, batch)  # type: ignore[arg-type]
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


def translate(model: Either, tokenizer: Tokenizer, texts: Sequence[str], language: str) -> list[str]:
    """Greedy translations, at most 96 new tokens each."""
    sources = [tokenizer.source_ids(tokenizer.encode(text), language) for text in texts]
    found: dict[int, str] = {}
    for batch in by_length(sources, 32):
        chosen = [sources[i] for i in batch]
        for i, ids in zip(batch, decode(model, tokenizer, chosen, language, 96), strict=True):
            found[i] = tokenizer.decode(ids).strip()
    return [found[i] for i in range(len(texts))]


def decode(
    model: Either,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[int]],
    language: str,
    n_new: int,
    *,
    at_least: int = 0,
) -> list[list[int]]:
    """Greedy decoding of either kind: one state, or one cache, that grows by a token a step."""
    prompts = [tokenizer.languages[language]] * len(sources)
    suppress = sorted(tokenizer.special_ids - {tokenizer.eos_id})
    if isinstance(model, RNNTranslator):
        never = [tokenizer.eos_id] if at_least else []
        return greedy(model, sources, prompts, n_new, [*suppress, *never])
    params = BeamParams(1, max_new_tokens=n_new, min_new_tokens=at_least)
    return [best.token_ids for best, *_ in BeamTranslator(model, params, suppress).search(sources, prompts)]


def quality_rows(
    models: dict[str, Either], tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], edges: Sequence[int]
) -> list[Row]:
    """chrF of greedy translations by the source's length in words; pairs of (English, Korean)."""
    rows = []
    for direction in DIRECTIONS:
        source, target = (0, 1) if direction == "en-ko" else (1, 0)
        texts = [pair[source] for pair in pairs]
        found = {kind: translate(m, tokenizer, texts, direction[-2:]) for kind, m in models.items()}
        words = np.array([len(text.split()) for text in texts])
        for low, high in [*spans(edges), (0, math.inf)]:
            chosen = np.flatnonzero((words > low) & (words <= high)).tolist()
            if not chosen:
                continue
            row = {"direction": direction, "words": _span(low, high), "sentences": str(len(chosen))}
            references = [pairs[i][target] for i in chosen]
            for kind, translations in found.items():
                score = CHRF().corpus_score([translations[i] for i in chosen], [references]).score
                row[f"{kind}: chrF"] = f"{score:.1f}"
            rows.append(row)
    return rows


# --- speed ------------------------------------------------------------------------------------


def speed_rows(
    models: dict[str, Either],
    tokenizer: Tokenizer,
    task: TranslateTask,
    lengths: Sequence[int],
    *,
    bf16: bool,
) -> list[Row]:
    """Target tokens per second of the processor, by length: training, and greedy decoding of 16 sentences.

    Random tokens, source and target of one length: what they say does not matter to the speed.
    """
    rows = []
    for length in lengths:
        row = {"tokens": str(length)}
        for kind, model in models.items():
            row[f"{kind}: training"] = f"{_training_speed(model, tokenizer, task, length, bf16):.0f}"
        for kind, model in models.items():
            row[f"{kind}: decoding"] = f"{_decoding_speed(model.eval(), tokenizer, length):.0f}"
        rows.append(row)
    return rows


def _training_speed(
    model: Either, tokenizer: Tokenizer, task: TranslateTask, length: int, bf16: bool
) -> float:
    model.train()
    n_rows = max(1, _TOKENS // length)
    ids = _noise(tokenizer, n_rows, length)
    batch = {"src": ids, "tgt": ids, "labels": ids}
    best = math.inf
    for _ in range(_REPEATS):
        started = time.process_time()
        with autocast("cpu", bf16=bf16):
            loss, _tokens = task.loss(model, batch)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        best = min(best, time.process_time() - started)
        model.zero_grad(set_to_none=True)
    return ids.numel() / best


def _decoding_speed(model: Either, tokenizer: Tokenizer, length: int) -> float:
    sources = _noise(tokenizer, _ROWS, length).tolist()
    best = math.inf
    for _ in range(_REPEATS):
        started = time.process_time()
        decode(model, tokenizer, sources, "en", length, at_least=length)
        best = min(best, time.process_time() - started)
    return _ROWS * length / best


def _noise(tokenizer: Tokenizer, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    low = max(tokenizer.special_ids) + 1
    return torch.randint(low, tokenizer.vocab_size, (rows, length), generator=generator)


# --- the command ------------------------------------------------------------------------------


def rnn_command(
    arguments: argparse.Namespace,
    recipe: dict[str, Any],
    tokenizer: Tokenizer,
    transformer: Any,
    tasks: tuple[TranslateTask, TranslateTask],
    options: Options,
) -> str:
    """Train both, compare them, and return the tables."""
    models = {kind: build(kind, recipe, tokenizer, transformer, options.seed) for kind in KINDS}
    for kind, model in models.items():
        print(f"{kind}: {_millions(model):.2f} M parameters", flush=True)
    minutes = 0.0 if arguments.measure_only else float(recipe["race"]["minutes"])
    trainers = race(models, tokenizer, tasks, options, minutes, arguments.run)
    sizes: list[Row] = [
        {
            "model": kind,
            "parameters": f"{_millions(models[kind]):.2f} M",
            "steps": str(trainer.step),
            "target tokens": str(trainer.tokens),
            "processor seconds": f"{trainer.seconds:.0f}",
        }
        for kind, trainer in trainers.items()
    ]
    held = tasks[1]
    held.label_smoothing = 0.0  # losses are plain cross-entropies
    parts = [sizes, held_rows(trainers, held, (10, 20, 30, 40))]
    if arguments.dev:
        pairs = _development(arguments.dev, arguments.limit)
        parts.append(quality_rows(models, tokenizer, pairs, (5, 10, 15)))
    parts.append(speed_rows(models, tokenizer, held, recipe["race"]["lengths"], bf16=options.bf16))
    report = "\n\n".join(map(markdown_table, parts))
    if arguments.report:
        write_card(arguments.report, report)
    return report


def _development(stem: Path, limit: int) -> list[tuple[str, str]]:
    pairs = read_parallel(stem.with_name(f"{stem.name}.eng"), stem.with_name(f"{stem.name}.kor"))
    return pairs[:limit] if limit else pairs


def _millions(model: Either) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def spans(edges: Iterable[int]) -> list[tuple[float, float]]:
    """(above, up to) of every span between 0, the edges and infinity."""
    limits = [0.0, *map(float, edges), math.inf]
    return list(pairwise(limits))


def _span(low: float, high: float) -> str:
    if high == math.inf:
        return f"over {low:.0f}" if low else "all"
    return f"{low + 1:.0f} to {high:.0f}"
