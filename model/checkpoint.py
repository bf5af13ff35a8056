"""A model as a folder: config.json, model.safetensors, tokenizer.json. Never a pickle.

A classifier may also be an addition to a masked model (`model.adapter`): then the base's folder, named in
config.json, holds the rest, tokenizer included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.adapter import Adapter
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
    _save_parts(folder, tensors, model.config.to_dict())
    _replace(folder / TOKENIZER, lambda part: tokenizer.backend.save(str(part)))


def save_adapter(
    folder: Path | str, adapter: Adapter, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write an addition to a base as a folder that `load` reads: no tokenizer, none of the base's weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    _save_parts(folder, own, adapter.to_dict())


def _save_parts(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.chmod(0o644)  # safetensors makes it private; a service may run as another user
    part.replace(path)


def load(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Read a folder written by `save` or `save_adapter`, ready for inference.

    Raises `CheckpointError` when a file is missing, truncated, or does not fit the others.
    """
    folder = Path(folder)
    adapter = load_adapter(folder)
    for name in (CONFIG, WEIGHTS, *([] if adapter else [TOKENIZER])):
        _demand(folder / name)
    config = load_config(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    tokenizer_folder = folder
    if adapter:
        tokenizer_folder = folder / adapter.base
        tensors = _compose(folder, adapter, tensors)
    tokenizer = _load_tokenizer(tokenizer_folder, config)
    model = build_model(config)
    _fill(model, tensors, folder / WEIGHTS)
    model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Checkpoint(model, tokenizer, config, folder.resolve().name, file_sha256(folder / WEIGHTS))


def _demand(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")


def _compose(folder: Path, adapter: Adapter, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an addition with its base's, which must be the very weights it was trained on."""
    path = folder / adapter.base / WEIGHTS
    _demand(path)
    found = file_sha256(path)
    if found != adapter.base_sha256:
        raise CheckpointError(
            f"{folder / CONFIG}: made for a base of sha256 {adapter.base_sha256[:12]}, "
            f"but {path} has {found[:12]}; train it again on that base"
        )
    try:
        return adapter.compose(_read_tensors(path), own)
    except ConfigError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from None


def load_config(folder: Path) -> TransformerConfig:
    """The configuration of a folder, an addition's with its base's; raises `CheckpointError`."""
    adapter = load_adapter(folder)
    try:
        if adapter:
            return adapter.config(TransformerConfig.from_dict(_read_config(folder / adapter.base)))
        return TransformerConfig.from_dict(_read_config(folder))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def load_adapter(folder: Path) -> Adapter | None:
    """What a folder says of its base; None where it stands alone. Raises `CheckpointError`."""
    values = _read_config(folder)
    try:
        return Adapter.from_dict(values) if "base" in values else None
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    _demand(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


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
