"""The training loop: one place for optimisers, precision, checkpoints, several processes and progress."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch._dynamo.config as dynamo
import torch.fx.experimental._config as shapes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import checkpoint
from model.block import Block
from model.models import Model
from model.tokenizer import Tokenizer
from model.training.batches import Indices
from model.training.dropout import share_dropout
from model.training.feed import made_ahead
from model.training.loss import compile_loss
from model.training.muon import BatchedMuon
from model.training.precision import autocast, multiplies_bf16
from model.training.products import use_plain_products
from model.training.schedule import Schedule

Batch = dict[str, Tensor]
Place = tuple[int, Indices]  # a batch's number in the whole run, and its examples


class Task(Protocol):
    """What a kind of training has to say; batches are pure functions of the epoch."""

    def batches(self, epoch: int) -> list[Indices]: ...
    def collate(self, batch: Indices, rng: np.random.Generator) -> Batch: ...
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Options:
    """How to train; everything but the data and the model.

    With `minutes` the run ends after so much time in steps, or after `steps`, whichever comes first, and the
    schedule follows the share of the time that is gone: for a machine that is there for so long.
    `workers` are processes that make batches ready beside the training.
    `frozen` are beginnings of the names of parameters that stay as they are: to adapt a trained model, the
    embeddings (and with them an output that is tied to them) and the lower half of the encoder may (Thompson
    et al. 2018), which saves a third of a step.
    """

    steps: int
    minutes: float = 0.0
    lr: float = 1e-3
    warmup: int = 400
    decay: float = 0.4
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    compile: bool = False
    shared_dropout: bool = False
    frozen: Sequence[str] = ()
    workers: int = 0
    checkpoint_every: int = 500
    evaluate_every: int = 500
    log_every: int = 50


def make_optimizers(model: nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019); "muon" is Muon (Jordan et al. 2024) for the maps inside the layers.

    Embeddings, norms, biases and heads stay with AdamW in both; norms and biases are never decayed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    maps = [p for name, p in named if p.ndim == 2 and ".blocks." in name]
    inside = {id(p) for p in maps} if options.optimizer == "muon" else set()
    decayed = [p for _, p in named if p.ndim >= 2 and id(p) not in inside]
    plain = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = options.device.startswith("cuda")
    adamw = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=fused)
    if not inside:
        return [adamw]
    return [adamw, BatchedMuon(maps, lr=options.lr, weight_decay=options.weight_decay)]


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Leave every parameter out of the training whose name begins with one of these.

    Raises ValueError for a beginning that no parameter has, and if nothing is left to train.
    """
    for prefix in prefixes:
        chosen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not chosen:
            raise ValueError(f"[train] frozen: no parameter's name begins with {prefix!r}")
        for p in chosen:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("[train] frozen: nothing is left to train")


class _TaskLoss(nn.Module):
    """Model and loss as one module, so that several processes meet in its forward."""

    def __init__(self, model: Model, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        return self.task.loss(self.model, batch)


def _compile_blocks(model: Model) -> None:
    """Compile each layer on its own: equal layers share one compilation. Pays on a GPU, not on a CPU."""
    # Sources and targets of one width, now and then, are no case of their own; encoder and decoder are.
    shapes.use_duck_shape = False
    dynamo.recompile_limit = 32
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


class Trainer:
    """Runs a task from wherever its folder's checkpoint left off.

    Everything that happens at a step follows from (seed, step, rank), so a resumed run repeats the
    unbroken one exactly on the same machine. Without a folder nothing is kept or shown, which suits runs of
    a minute; without a held-out task nothing is measured on the way.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        task: Task,
        held: Task | None,
        options: Options,
        folder: Path | None,
    ) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(options.device)
        if self.world > 1 and options.minutes:
            raise ValueError("[train] minutes: several processes have a clock each; give them steps")
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
        if options.bf16 and not multiplies_bf16(self.device.type) and folder:
            print("bf16 is left off: this processor has no instructions for it, float32 is faster")
        self.model: Model = model.to(self.device)
        self.tokenizer, self.task, self.held, self.options, self.folder = (
            tokenizer,
            task,
            held,
            options,
            folder,
        )
        freeze(model, options.frozen)
        self._use_fast_paths()
        self.runner: nn.Module = _TaskLoss(model, task)
        if self.world > 1:
            # A batch without a second sentence leaves the next-sentence head unused.
            self.runner = DistributedDataParallel(self.runner, find_unused_parameters=True)
        self.optimizers = make_optimizers(model, options)
        self.schedule = Schedule(options.steps, options.warmup, options.decay)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._logged = (0, 0.0)
        self.losses: list[Tensor] = []

    def _use_fast_paths(self) -> None:
        compile_loss(self.options.compile)
        if self.options.shared_dropout:
            share_dropout(self.model)
        if self.device.type == "cpu":
            use_plain_products(self.model)
        elif self.options.compile:
            _compile_blocks(self.model)

    def run(self, on_evaluate: Callable[[int, float], None] | None = None) -> None:
        """Train to the last step, resuming from the folder's checkpoint where there is one."""
        self.resume()
        options = self.options
        batches = self.batches_from(self.step)
        last = self.is_finished()
        hidden = self.rank > 0 or self.folder is None
        with tqdm(total=options.steps, initial=self.step, disable=hidden, mininterval=5, unit="step") as bar:
            while not last:
                started = time.monotonic()
                _, tokens = self.train_step(batches)
                self.tokens += tokens
                self.seconds += time.monotonic() - started
                bar.update()
                last = self.is_finished()
                if self.step % options.log_every == 0 or last:
                    self._log(bar)
                if self.held and (self.step % options.evaluate_every == 0 or last):
                    held = self.evaluate()
                    self._record({"step": self.step, "held_loss": held})
                    bar.write(f"step {self.step}: held-out loss {held:.4f}")
                    if on_evaluate:
                        on_evaluate(self.step, held)
                if self.step % options.checkpoint_every == 0 or last:
                    self.save()
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def is_finished(self) -> bool:
        """Are all steps made, or is the time up?"""
        return self.progress() >= 1.0

    def progress(self) -> float:
        """The share of the run that lies behind."""
        gone = self.seconds / (60 * self.options.minutes) if self.options.minutes else 0.0
        return max(gone, self.step / self.options.steps)

    def train_step(self, batches: Iterator[Batch], factor: float | None = None) -> tuple[Tensor, int]:
        """One optimiser step over `accumulate` batches: the mean loss (), and the tokens of this process.

        `factor` scales the peak rate; left out, the schedule says it by the step. The loss stays where it was
        computed: to read it is to wait for the device.
        """
        options = self.options
        self.runner.train()
        torch.manual_seed(_mix(options.seed, self.step, self.rank))
        total, tokens = torch.zeros((), device=self.device), 0
        for part in range(options.accumulate):
            arrays = self._to_device(next(batches))
            last = part == options.accumulate - 1
            sync = nullcontext() if last or self.world == 1 else self.runner.no_sync()  # type: ignore[operator]
            with sync:
                with autocast(self.device.type, bf16=self.options.bf16):
                    loss, count = self.runner(arrays)
                (loss / options.accumulate).backward()
            total += loss.detach() / options.accumulate
            tokens += count
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        factor = self.schedule(self.step, self.progress()) if factor is None else factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(total)
        return total, tokens

    @torch.no_grad()
    def evaluate(self, max_batches: int = 20) -> float:
        """Mean loss over the same held-out batches every time."""
        assert self.held, "there is no held-out task"
        self.model.eval()
        total, count = 0.0, 0
        for index, batch in enumerate(self.held.batches(0)[:max_batches]):
            arrays = self._to_device(self.held.collate(batch, np.random.default_rng((0, index))))
            # As it is: compiling the layers once more takes longer than all these batches.
            with autocast(self.device.type, bf16=self.options.bf16), torch.compiler.set_stance("force_eager"):
                loss, tokens = self.held.loss(self.model, arrays)
            total += float(loss) * tokens
            count += tokens
        return total / count if count else float("nan")

    def save(self) -> None:
        """Write the checkpoint (one file, replaced at once) and the model as a folder that can be served."""
        if self.rank or self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": p.detach().cpu().clone() for name, p in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value).cpu().clone()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "frozen": list(self.options.frozen),
        }
        part = self.folder / "checkpoint.part"
        save_file(tensors, part, metadata={"state": json.dumps(state)})
        part.replace(self.folder / "checkpoint.safetensors")
        checkpoint.save(self.folder / "model", self.model, self.tokenizer)
        (self.folder / "options.json").write_text(json.dumps(asdict(self.options), indent=2) + "\n")

    def resume(self) -> None:
        """Take up the folder's checkpoint; without one, begin at step 0."""
        path = self.folder / "checkpoint.safetensors" if self.folder else None
        if path is None or not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        frozen = list(self.options.frozen)
        if state.get("frozen", frozen) != frozen:  # the optimisers number what they train
            raise ValueError(
                f"[train] frozen: {path} was trained with {state['frozen']}; a new run may change it"
            )
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            current = optimizer.state_dict()
            current["state"] = _optimizer_state(tensors, f"optimizer.{number}.")
            optimizer.load_state_dict(current)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self._logged = self.tokens, self.seconds

    def batches_from(self, step: int) -> Iterator[Batch]:
        """The batches of this process, from a step on: epoch after epoch."""
        make = partial(_collate, self.task, self.options.seed)
        pin = self.device.type == "cuda"
        return made_ahead(make, self._places_from(step), self.options.workers, pin=pin)

    def _places_from(self, step: int) -> Iterator[Place]:
        first, index = step * self.options.accumulate * self.world, 0
        # Another process draws the next epoch's batches while this one's are read.
        for batches in made_ahead(self.task.batches, count(), min(1, self.options.workers), ahead=1):
            if not batches:
                raise ValueError("the training data holds no batch: is the shard empty?")
            for offset in range(max(0, first - index), len(batches)):
                position = index + offset
                if position % self.world == self.rank:
                    yield position, batches[offset]
            index += len(batches)

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type != "cuda":
            return batch
        pinned = {name: t if t.is_pinned() else t.pin_memory() for name, t in batch.items()}
        return {name: t.to(self.device, non_blocking=True) for name, t in pinned.items()}

    def _log(self, bar: Any) -> None:
        mean = float(torch.stack(self.losses[-self.options.log_every :]).mean())
        now, logged = (self.tokens, self.seconds), self._logged
        rate = (now[0] - logged[0]) / max(1e-9, now[1] - logged[1]) * self.world
        self._logged = now
        bar.set_postfix(loss=f"{mean:.3f}", tok_s=f"{rate:.0f}", refresh=False)
        self._record(
            {"step": self.step, "loss": mean, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        )

    def _record(self, row: dict[str, Any]) -> None:
        if self.rank == 0 and self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _collate(task: Task, seed: int, place: Place) -> Batch:
    index, batch = place
    return task.collate(batch, np.random.default_rng((seed, 2, index)))


def _optimizer_state(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    return state


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
