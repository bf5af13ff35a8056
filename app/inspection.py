"""`python -m app inspect FOLDER`: what a checkpoint is and takes, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from app.engine.memory import cache_bytes, context_len, int8_bytes, weight_bytes
from app.engine.workshop import ARCHITECTURES
from app.settings import Settings
from model.checkpoint import CheckpointError, Folder
from model.config import TransformerConfig
from model.convert import stored_dtype
from model.languages import iso_code

_DTYPES = (torch.float32, torch.bfloat16)
_MANY = 12  # languages that are listed by name


def inspect_folder(path: Path, settings: Settings) -> tuple[list[str], bool]:
    """Lines for a person, and whether it can be served."""
    folder, lines = Folder(path), []
    try:
        for line in _describe(folder, settings):
            lines.append(line)  # noqa: PERF402 (what is known stands, whatever comes after it)
    except CheckpointError as error:
        return [*lines, f"cannot be served: {error}"], False
    return [*lines, "can be served"], True


def _describe(folder: Folder, settings: Settings) -> Iterator[str]:
    values = folder.values
    if not folder.is_own:
        names = ", ".join(map(str, values.get("architectures") or [])) or "no class named"
        yield f"published model: {values.get('model_type')} ({names})"
    config = folder.config
    endpoints = [name for name, architecture in ARCHITECTURES.items() if architecture == config.architecture]
    yield f"{config.architecture}, for {', '.join(endpoints)}{_heads(config)}"
    yield _sizes(config)
    n_files, n_tensors = len(folder.files), len(folder.stored)
    n_bytes = sum(tensor.n_bytes for tensor in folder.stored.values())
    many = "" if n_files == 1 else f" in {n_files} files"
    yield f"weights: {n_tensors} tensors{many}, {_size(n_bytes)}, mostly {stored_dtype(folder)}"
    n_parameters = folder.check()
    yield f"parameters: {n_parameters:,}"
    for dtype in _DTYPES:
        yield f"memory in {str(dtype).removeprefix('torch.')}: {_memory(config, dtype, settings)}"
    yield f"weights in int8, on the CPU: {_size(int8_bytes(config))}"
    tokenizer = folder.tokenizer()
    yield f"tokenizer: {tokenizer.vocab_size:,} ids{_languages(tokenizer.sources, tokenizer.targets)}"
    shortlist = folder.shortlist()
    if shortlist is not None:
        into = ", ".join(map(iso_code, shortlist.tables))
        yield f"shortlist, for int8 on the CPU with kernels: into {into}"


def _heads(config: TransformerConfig) -> str:
    if config.architecture == "classifier":
        return f"; labels: {', '.join(config.labels)}"
    if config.architecture != "masked_lm":
        return ""
    return f"; masked tokens: {_yes(config.mlm_head)}, next sentence: {_yes(config.nsp_head)}"


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _sizes(config: TransformerConfig) -> str:
    layers = {"encoder": config.n_encoder_layers, "decoder": config.n_decoder_layers}
    parts = [f"{n} {name} layers" for name, n in layers.items() if n]
    heads = f"{config.n_heads} heads of {config.head_dim}"
    shared = "" if config.kv_heads == config.n_heads else f" ({config.kv_heads} for keys and values)"
    return f"{', '.join(parts)}, width {config.d_model}, {heads}{shared}, {config.max_len:,} positions"


def _memory(config: TransformerConfig, dtype: torch.dtype, settings: Settings) -> str:
    weights = _size(weight_bytes(config, dtype))
    if not config.n_decoder_layers:
        return weights
    slots = settings.translate_slots if config.n_encoder_layers else settings.generate_slots
    kept = 0 if config.n_encoder_layers else settings.prefix_tokens
    caches = cache_bytes(config, dtype, slots, settings.max_context, kept)
    length = context_len(config, settings.max_context)
    more = f" and {kept:,} tokens that are kept of prompts" if kept else ""
    return f"{weights}, and {_size(caches)} for {slots} rows of {length:,} tokens{more}"


def _languages(sources: list[str], targets: list[str]) -> str:
    if not sources:
        return ""
    both = sources if sources == targets else [*sources, "to", *targets]
    if len(both) > _MANY:
        n_iso = len({iso_code(code) for code in (*sources, *targets)})
        return f"; {len(targets)} targets, {n_iso} languages"
    return f"; languages: {' '.join(both)}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"
