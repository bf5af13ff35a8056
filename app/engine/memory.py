"""What a model takes of a device's memory, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.block import Block
from model.config import TransformerConfig
from model.heads import LMHead
from model.models import CausalLM, Model, Translator, build_model, make_cache
from model.quantize import Int8Linear
from model.weights import empty_model

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class _Cgroup:
    """Where one version of control groups says what a container may take, and takes."""

    folder: Path
    limit: str
    used: str
    reclaimable: str  # in memory.stat: pages of files that the kernel drops when they are in the way


_CGROUPS = (
    _Cgroup(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    _Cgroup(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def weight_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """What a model's weights take: built on the meta device, which holds no numbers."""
    model: Model = empty_model(lambda: build_model(config))
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def int8_bytes(config: TransformerConfig) -> int:
    """The same with 8-bit products (`model.inference`): maps of blocks and heads in a byte a weight."""
    model: Model = empty_model(lambda: build_model(config))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    maps = sum(m.weight.numel() for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    heads = sum(m.tokens.weight.numel() for m in model.modules() if isinstance(m, LMHead))
    floats = sum(parameter.numel() for parameter in model.parameters()) - maps
    floats -= 0 if config.tied else heads  # a tied head's weights stay as embeddings, too
    return floats * torch.float32.itemsize + maps + heads


def context_len(config: TransformerConfig, max_context: int) -> int:
    """The tokens that a row holds: what the model can, within the bound, if there is one."""
    return min(config.max_len, max_context or config.max_len)


def cache_bytes(
    config: TransformerConfig,
    dtype: torch.dtype,
    n_slots: int,
    max_context: int = 0,
    n_prefix_tokens: int = 0,
) -> int:
    """What the caches of a decoding model's rows take, and the kept beginnings of prompts."""
    if not n_slots or not config.n_decoder_layers:
        return 0
    rows = make_cache(config, n_slots, context_len(config, max_context), "meta", dtype).n_bytes
    if config.n_encoder_layers:
        return 2 * rows  # a translator keeps the projected memory too
    return rows + make_cache(config, 1, n_prefix_tokens, "meta", dtype).n_bytes


def held_bytes(models: Iterable[nn.Module | None]) -> int:
    """What the weights of models take together, those that several of them hold counted once."""
    loaded = [model for model in models if model is not None]
    weights = {p.data_ptr(): p.nbytes for model in loaded for p in model.parameters()}
    eights = {id(m): m.n_bytes for model in loaded for m in model.modules() if isinstance(m, Int8Linear)}
    return sum(weights.values()) + sum(eights.values())


def free_bytes(device: torch.device) -> int | None:
    """What could be allocated now; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator keeps for itself is as good as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [n_bytes for n_bytes in (_available(), _left_in_container()) if n_bytes is not None]
    return min(known, default=None)


def total_bytes(device: torch.device) -> int:
    """What a GPU has."""
    _, total = torch.cuda.mem_get_info(device)
    return total


def pass_bytes(model: Model, n_tokens: int) -> int:
    """What a GPU needs beside the weights while a decoding model takes in so many tokens; 0 on a CPU.

    It is tried out, with rows as long as the model can.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 0
    length = min(n_tokens, model.config.max_len)
    ids = torch.ones(n_tokens // length, length, dtype=torch.long, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        if isinstance(model, CausalLM):
            model.hidden(ids)
        elif isinstance(model, Translator):
            model.encode(ids)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class RowSizing:
    """How the rows of endpoints follow from a GPU's memory, where nobody said how many there should be.

    `utilization` is the share of the memory that may be in use, by whomever, when all is loaded; the rest is
    for graphs, and for what comes and goes. No endpoint has more than `max_slots`. At the start `n_sharing`
    decoding models are loaded, and each gets an equal share of what those before it left.
    """

    endpoints: frozenset[str]
    utilization: float
    max_slots: int
    n_sharing: int


def rows_that_fit(n_bytes: int, row_bytes: int, least: int, most: int) -> int:
    """Rows for so many bytes; never under the least, for which there is room or the start fails elsewhere."""
    return max(least, min(most, n_bytes // row_bytes))


def _available(path: Path = _MEMINFO) -> int | None:
    n_kib = _field(path, "MemAvailable:")
    return None if n_kib is None else 1024 * n_kib


def _left_in_container(cgroups: Iterable[_Cgroup] = _CGROUPS) -> int | None:
    for cgroup in cgroups:
        try:
            limit, used = ((cgroup.folder / name).read_text().strip() for name in (cgroup.limit, cgroup.used))
        except OSError:
            continue
        if not limit.isdecimal():  # "max"
            return None
        reclaimable = _field(cgroup.folder / "memory.stat", cgroup.reclaimable) or 0
        return max(int(limit) - int(used) + reclaimable, 0)
    return None


def _field(path: Path, name: str) -> int | None:
    """The number behind a name at the beginning of a line."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(words[1]) for words in map(str.split, lines) if words[:1] == [name]), None)
