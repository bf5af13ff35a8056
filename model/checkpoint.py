"""A model as a folder: config.json, model.safetensors, tokenizer.json. Never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ConfigError, TransformerConfig
from model.models import Model, build_model
from model.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class CheckpointError(Exception):
    """A folder that cannot be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder. `sha256` is the weights file's."""

    model: Model
    tokenizer: Tokenizer
    config: TransformerConfig
    name: str
    sha256: str


def save(folder: Path | str, model: Model, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a folder that `load` reads, weights in `dtype`; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    _replace(folder / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))
    _replace(folder / TOKENIZER, lambda part: tokenizer.backend.save(str(part)))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.chmod(0o644)  # safetensors makes it private; a service may run as another user
    part.replace(path)


def load(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Read a folder written by `save`, ready for inference.

    Raises `CheckpointError` when a file is missing, truncated, or does not fit the others.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file")
    config = load_config(folder)
    tokenizer = _load_tokenizer(folder, config)
    model = build_model(config)
    _fill(model, _read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Checkpoint(model, tokenizer, config, folder.resolve().name, file_sha256(folder / WEIGHTS))


def load_config(folder: Path) -> TransformerConfig:
    """The configuration of a folder; raises `CheckpointError`."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError("not a JSON object")
        return TransformerConfig.from_dict(values)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _load_tokenizer(folder: Path, config: TransformerConfig) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        tokenizer = Tokenizer.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: {tokenizer.vocab_size} tokens, but {CONFIG} says vocab_size {config.vocab_size}"
        )
    for key in ("pad_id", "bos_id", "eos_id", "mask_id", "cls_id", "sep_id"):
        if getattr(tokenizer, key) != getattr(config, key):
            found, wanted = getattr(tokenizer, key), getattr(config, key)
            raise CheckpointError(f"{path}: {key} is {found}, but {CONFIG} says {wanted}")
    return tokenizer


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def _fill(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into the model's parameters; names and shapes must match one to one."""
    parameters = dict(model.named_parameters())
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing:
        raise CheckpointError(f"{path}: missing tensor {missing[0]} ({len(missing)} in all)")
    if extra:
        raise CheckpointError(f"{path}: unknown tensor {extra[0]} ({len(extra)} in all)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                raise CheckpointError(f"{path}: {name} has shape {found}, the configuration wants {wanted}")
            parameter.copy_(tensors[name])


def file_sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
