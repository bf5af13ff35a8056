"""From a folder to a model that runs: what it needs of memory, its lane, its first work."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.engine.batch import BatchItem, BatchLane
from app.engine.decode import make_decode_lane
from app.engine.errors import NoRoom
from app.engine.memory import (
    RowSizing,
    cache_bytes,
    context_len,
    free_bytes,
    held_bytes,
    pass_bytes,
    rows_that_fit,
    total_bytes,
    weight_bytes,
)
from app.engine.registry import AnyTask, Task
from app.engine.sequence import Sequence
from model.adopted import AdoptedTokenizer
from model.checkpoint import Checkpoint, CheckpointError, load, load_config
from model.config import TransformerConfig
from model.examples import Examples
from model.inference import Quantization, optimise, quantization_of
from model.kernels import Kernels
from model.models import Model
from model.quantize import share_int8
from model.sampling import BeamParams, SamplingParams
from model.tokenizer import Tokenizer

log = logging.getLogger("app.engine")

QuantizationChoice = Quantization | Literal["auto"]

_WARM_UP_SECONDS = 600.0  # a device that does not answer ends the start, not the patience of whoever waits
ARCHITECTURES = {
    "translate": "translator",
    "fill-mask": "masked_lm",
    "generate": "causal_lm",
    "classify": "classifier",
}


class ModelWorkshop:
    """Builds models for one device and number format; `n_slots` are the rows of each decoding endpoint.

    `max_bytes` bounds all models together, 0 stands for what the device has. `max_context` bounds the tokens
    that a row of a decoding model holds, 0 stands for what the model can. `quantization` "auto" is int8 for
    models trained here, of which it is known what that costs, and none for those that others made. With
    `sizing`, `n_slots` are the least of the endpoints that it names. Where there is no room for `n_slots`, an
    endpoint of `fewest` has a half of them or a half of that, down to so many. `kernels` are for a CPU;
    without `use_shortlist` translations choose among all tokens there, too. `examples` are for
    translators and masked models.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        n_slots: dict[str, int],
        prefill_tokens: int,
        max_batch_tokens: int,
        max_queue_items: int,
        max_queue_tokens: int,
        max_wait_seconds: float,
        max_bytes: int = 0,
        max_context: int = 0,
        quantization: QuantizationChoice = "none",
        kernels: Kernels | None = None,
        use_shortlist: bool = True,
        examples: Examples | None = None,
        chunk_tokens: int | None = None,
        n_prefix_tokens: int = 0,
        launch_ahead: bool | None = None,
        sizing: RowSizing | None = None,
        fewest: dict[str, int] | None = None,
    ) -> None:
        self._launch_ahead, self._sizing, self._fewest = launch_ahead, sizing, fewest or {}
        self._n_sized = 0
        self.device, self.dtype, self._quantization = device, dtype, quantization
        self._kernels, self._use_shortlist, self._examples = kernels, use_shortlist, examples
        self._chunk_tokens, self._n_prefix_tokens = chunk_tokens, n_prefix_tokens
        self._n_slots, self._max_bytes, self._max_context = n_slots, max_bytes, max_context
        self._prefill_tokens, self._max_batch_tokens = prefill_tokens, max_batch_tokens
        self._max_wait_seconds = max_wait_seconds
        self._queue = {"max_queue_items": max_queue_items, "max_queue_tokens": max_queue_tokens}

    def build(self, endpoint: str, name: str, folder: Path, loaded: list[AnyTask]) -> AnyTask:
        """The model of a folder with its lane, which has had no turn yet.

        Blocks. Raises CheckpointError for a folder that cannot be served, NoRoom for one that does not fit
        beside what is loaded already.
        """
        config = self._check_folder(endpoint, folder)
        n_weights = weight_bytes(config, self.dtype)
        n_slots = self._rows_with_room(endpoint, config, n_weights, loaded)
        needed = n_weights + self._cache_bytes(config, n_slots)
        self._check_room(str(folder), needed, loaded)
        try:
            checkpoint = load(folder, device=self.device, dtype=self.dtype)
            optimise(checkpoint.model, self._quantization_of(checkpoint), self._kernels)
            share_weights(checkpoint.model, [task.model for task in loaded if task.model is not None])
            n_slots = self._count_rows(endpoint, checkpoint.model, loaded, n_slots)
            shortlist = checkpoint.shortlist if self._use_shortlist else None
            checkpoint = dataclasses.replace(checkpoint, name=name, shortlist=shortlist)
            return self._task(endpoint, checkpoint, folder, n_slots)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise NoRoom(str(folder), needed, free_bytes(self.device) or 0, "the device has") from None

    def _quantization_of(self, checkpoint: Checkpoint) -> Quantization:
        if self._quantization != "auto":
            return self._quantization
        return "none" if isinstance(checkpoint.tokenizer, AdoptedTokenizer) else "int8"

    async def warm_up(self, endpoint: str, task: AnyTask) -> None:
        """Send a small job through a lane, so that the first client finds it warm. Raises EngineError."""
        job = _FIRST_WORK[endpoint](task.tokenizer, task.config)
        lane: Any = task.lane
        lane.submit([job])
        async with asyncio.timeout(_WARM_UP_SECONDS):
            await job.result()

    def _check_folder(self, endpoint: str, folder: Path) -> TransformerConfig:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder ({endpoint})")
        config = load_config(folder)
        if config.architecture != ARCHITECTURES[endpoint]:
            wanted = ARCHITECTURES[endpoint]
            raise CheckpointError(f"{folder}: holds a {config.architecture}, {endpoint} takes a {wanted}")
        return config

    def _check_room(self, model: str, needed: int, loaded: list[AnyTask]) -> None:
        left, free = self._left(loaded), free_bytes(self.device)
        if left is not None and needed > left:
            raise NoRoom(model, needed, max(left, 0), f"of max_model_bytes {self._max_bytes} there are left")
        if free is not None and needed > free:
            raise NoRoom(model, needed, free, "the device has")

    def _left(self, loaded: list[AnyTask]) -> int | None:
        """Of `max_bytes`, if there is such a bound."""
        taken = held_bytes(task.model for task in loaded) + sum(task.n_cache_bytes for task in loaded)
        return self._max_bytes - taken if self._max_bytes else None

    def _rows_with_room(
        self, endpoint: str, config: TransformerConfig, n_weights: int, loaded: list[AnyTask]
    ) -> int:
        """As many rows as were said, or fewer where that may be: big models have big rows."""
        n_slots, fewest = self._n_slots.get(endpoint, 0), self._fewest.get(endpoint)
        bounds = [n for n in (self._left(loaded), free_bytes(self.device)) if n is not None]
        if fewest is None or not bounds:
            return n_slots
        while n_slots // 2 >= fewest and n_weights + self._cache_bytes(config, n_slots) > min(bounds):
            n_slots //= 2
        return n_slots

    def _count_rows(self, endpoint: str, model: Model, loaded: list[AnyTask], least: int) -> int:
        """The rows of a model whose weights are on the device: the least, or as many as memory holds."""
        sizing = self._sizing
        if not least or sizing is None:
            return least
        n_sharing = max(1, sizing.n_sharing - self._n_sized)
        self._n_sized += 1
        if endpoint not in sizing.endpoints:
            return least
        total = total_bytes(self.device)
        left = int(sizing.utilization * total) - (total - (free_bytes(self.device) or 0))
        if self._max_bytes:
            taken = held_bytes([model, *(task.model for task in loaded)])
            left = min(left, self._max_bytes - taken - sum(task.n_cache_bytes for task in loaded))
        one, two = (self._cache_bytes(model.config, n) for n in (1, 2))
        n_tokens = min(self._prefill_tokens, least * context_len(model.config, self._max_context))
        fixed = one - (two - one) + pass_bytes(model, n_tokens)  # and what is kept of prompts
        row = two - one + model.config.vocab_size * torch.float32.itemsize  # and its logits
        n_rows = rows_that_fit(left // n_sharing - fixed, row, least, sizing.max_slots)
        log.info("%d rows", n_rows, extra={"fields": {"endpoint": endpoint, "row_bytes": row, "left": left}})
        return n_rows

    def _cache_bytes(self, config: TransformerConfig, n_slots: int) -> int:
        return cache_bytes(config, self.dtype, n_slots, self._max_context, self._n_prefix_tokens)

    def _task(self, endpoint: str, checkpoint: Checkpoint, folder: Path, n_slots: int) -> AnyTask:
        n_cache_bytes = self._cache_bytes(checkpoint.config, n_slots)
        known = checkpoint.tokenizer, checkpoint.config, checkpoint.name, checkpoint.sha256
        more: dict[str, Any] = {
            "folder": folder,
            "model": checkpoint.model,
            "n_cache_bytes": n_cache_bytes,
            "quantization": quantization_of(checkpoint.model),
        }
        if endpoint not in self._n_slots:
            batches = BatchLane(endpoint, checkpoint, max_batch_tokens=self._max_batch_tokens, **self._queue)
            batches.door.max_wait_seconds = self._max_wait_seconds
            if endpoint == "fill-mask":
                more["examples"] = self._examples
            return Task(batches, *known, **more)
        steps = make_decode_lane(
            endpoint,
            checkpoint,
            n_slots=n_slots,
            prefill_tokens=self._prefill_tokens,
            max_context=self._max_context,
            chunk_tokens=self._chunk_tokens,
            n_prefix_tokens=self._n_prefix_tokens,
            launch_ahead=self._launch_ahead,
            **self._queue,
        )
        steps.door.max_wait_seconds = self._max_wait_seconds
        if endpoint == "translate":
            more["examples"] = self._examples
        return Task(steps, *known, **more, shortlist=steps.runner.shortlist_languages)


def share_weights(model: nn.Module, others: Iterable[nn.Module]) -> None:
    """Take from other models what is the same to the last bit, so that it is held once.

    A classifier that adds a little to a masked model then costs that little.
    """
    for other in others:
        share_int8(model, other)
        theirs = dict(other.named_parameters())
        twins = {
            parameter: theirs[name]
            for name, parameter in model.named_parameters()
            if name in theirs and _is_same(parameter, theirs[name])
        }
        for module in model.modules():  # an embedding may stand in several places
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter in twins:
                    setattr(module, key, twins[parameter])


def _is_same(parameter: Tensor, twin: Tensor) -> bool:
    alike = (parameter.dtype, parameter.device, parameter.shape) == (twin.dtype, twin.device, twin.shape)
    return alike and torch.equal(parameter, twin)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """On the CPU torch says it in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _translation(tokenizer: Tokenizer, _: TransformerConfig) -> Sequence:
    src, tgt = tokenizer.sources[0], tokenizer.targets[-1]
    ids = tokenizer.source_ids(tokenizer.encode("Hello."), tgt, src_lang=src)
    params = BeamParams(num_beams=1, max_new_tokens=4)
    return Sequence(ids, params, target_ids=tokenizer.target_ids(tgt))


def _generation(tokenizer: Tokenizer, _: TransformerConfig) -> Sequence:
    return Sequence(tokenizer.prompt_ids([]), SamplingParams(max_new_tokens=4))


def _filling(tokenizer: Tokenizer, config: TransformerConfig) -> BatchItem:
    if not config.mlm_head:
        ids, segments = tokenizer.pair_ids("a", "b")
        return BatchItem(token_ids=ids, segment_ids=segments, task="next-sentence")
    ids, _ = tokenizer.masked_ids(tokenizer.mask_token)
    return BatchItem(
        token_ids=ids, segment_ids=[0] * len(ids), task="fill-mask", top_k=1, targets=[None], allowed=[None]
    )


def _classification(tokenizer: Tokenizer, _: TransformerConfig) -> BatchItem:
    ids = tokenizer.text_ids("")
    return BatchItem(token_ids=ids, segment_ids=[0] * len(ids), task="classify")


_FIRST_WORK: dict[str, Callable[[Tokenizer, TransformerConfig], Sequence | BatchItem]] = {
    "translate": _translation,
    "fill-mask": _filling,
    "generate": _generation,
    "classify": _classification,
}
