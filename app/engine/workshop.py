"""From a folder to a model that runs: what it needs of memory, its lane, its first work."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.engine.batch import BatchItem, BatchLane
from app.engine.decode import make_decode_lane
from app.engine.errors import NoRoom
from app.engine.memory import free_bytes, needed_bytes
from app.engine.registry import AnyTask, Task
from app.engine.sequence import Sequence
from model.checkpoint import Checkpoint, CheckpointError, load, load_config
from model.config import TransformerConfig
from model.sampling import BeamParams, SamplingParams
from model.tokenizer import Tokenizer

_WARM_UP_SECONDS = 600.0  # a device that does not answer ends the start, not the patience of whoever waits
_ARCHITECTURES = {"translate": "translator", "fill-mask": "masked_lm", "generate": "causal_lm"}


class ModelWorkshop:
    """Builds models for one device and number format; `n_slots` are the rows of each decoding endpoint.

    `max_bytes` bounds all models together, 0 stands for what the device has.
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
        max_bytes: int = 0,
    ) -> None:
        self.device, self.dtype = device, dtype
        self._n_slots, self._max_bytes = n_slots, max_bytes
        self._prefill_tokens, self._max_batch_tokens = prefill_tokens, max_batch_tokens
        self._queue = {"max_queue_items": max_queue_items, "max_queue_tokens": max_queue_tokens}

    def build(self, endpoint: str, name: str, folder: Path, n_bytes_loaded: int) -> AnyTask:
        """The model of a folder with its lane, which has had no turn yet.

        Blocks. Raises CheckpointError for a folder that cannot be served, NoRoom for one that does not fit
        beside what is loaded already.
        """
        config = self._check_folder(endpoint, folder)
        needed = needed_bytes(config, self.dtype, self._n_slots.get(endpoint, 0))
        self._check_room(needed, n_bytes_loaded)
        try:
            checkpoint = load(folder, device=self.device, dtype=self.dtype)
            return self._task(endpoint, dataclasses.replace(checkpoint, name=name), folder, needed)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise NoRoom(needed, free_bytes(self.device) or 0, "the device has") from None

    async def warm_up(self, endpoint: str, task: AnyTask) -> None:
        """Send a small job through a lane, so that the first client finds it warm. Raises EngineError."""
        job = _FIRST_WORK[endpoint](task.tokenizer)
        lane: Any = task.lane
        lane.submit([job])
        async with asyncio.timeout(_WARM_UP_SECONDS):
            await job.result()

    def _check_folder(self, endpoint: str, folder: Path) -> TransformerConfig:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder ({endpoint})")
        config = load_config(folder)
        if config.architecture != _ARCHITECTURES[endpoint]:
            wanted = _ARCHITECTURES[endpoint]
            raise CheckpointError(f"{folder}: holds a {config.architecture}, {endpoint} takes a {wanted}")
        return config

    def _check_room(self, needed: int, n_bytes_loaded: int) -> None:
        left, free = self._max_bytes - n_bytes_loaded, free_bytes(self.device)
        if self._max_bytes and needed > left:
            raise NoRoom(needed, max(left, 0), f"of max_model_bytes {self._max_bytes} there are left")
        if free is not None and needed > free:
            raise NoRoom(needed, free, "the device has")

    def _task(self, endpoint: str, checkpoint: Checkpoint, folder: Path, n_bytes: int) -> AnyTask:
        known = checkpoint.tokenizer, checkpoint.config, checkpoint.name, checkpoint.sha256, folder, n_bytes
        if endpoint not in self._n_slots:
            batches = BatchLane(endpoint, checkpoint, max_batch_tokens=self._max_batch_tokens, **self._queue)
            return Task(batches, *known)
        n_slots, prefill_tokens = self._n_slots[endpoint], self._prefill_tokens
        steps = make_decode_lane(
            endpoint, checkpoint, n_slots=n_slots, prefill_tokens=prefill_tokens, **self._queue
        )
        return Task(steps, *known)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """On the CPU torch says it in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _translation(tokenizer: Tokenizer) -> Sequence:
    ids = tokenizer.source_ids(tokenizer.encode("Hello."), next(iter(tokenizer.languages)))
    return Sequence(ids, BeamParams(num_beams=1, max_new_tokens=4))


def _generation(tokenizer: Tokenizer) -> Sequence:
    return Sequence([tokenizer.bos_id], SamplingParams(max_new_tokens=4))


def _filling(tokenizer: Tokenizer) -> BatchItem:
    ids = [tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id]
    return BatchItem(
        token_ids=ids, segment_ids=[0] * 3, task="fill-mask", top_k=1, targets=[None], allowed=[None]
    )


_FIRST_WORK: dict[str, Callable[[Tokenizer], Sequence | BatchItem]] = {
    "translate": _translation,
    "fill-mask": _filling,
    "generate": _generation,
}
