"""A model as a folder: config.json, model.safetensors, tokenizer.json. Never a pickle.

In our own layout, or in that of a published model that `model.families` knows. A classifier may also be an
addition to a masked model (`model.adapter`): then the base's folder, named in config.json, holds the rest,
tokenizer included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import weights
from model.adapter import Adapter
from model.adopted import MANNER_FILE, AdoptedTokenizer
from model.config import ConfigError, TransformerConfig
from model.families.family import UnknownTensorError
from model.families.registry import find_family, read_config, read_takes
from model.families.text import read_json, read_tokenizer
from model.models import Model, build_model
from model.shortlist import Shortlist
from model.tokenizer import TOKENIZER_FILE, Tokenizer
from model.weights import Stored, Take, WeightsError

T = TypeVar("T")

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, TOKENIZER = weights.WEIGHTS, TOKENIZER_FILE


class CheckpointError(Exception):
    """A folder that cannot be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder. `sha256` is the weights file's, or that of the shards' digests.

    `shortlist` is what lies beside a translator's weights, if anything does.
    """

    model: Model
    tokenizer: Tokenizer
    config: TransformerConfig
    name: str
    sha256: str
    shortlist: Shortlist | None = None


def save(folder: Path | str, model: Model, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a folder that `load` reads, weights in `dtype`; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    _save_parts(folder, tensors, model.config.to_dict())
    for name, content in tokenizer.files().items():
        weights.replace_file(folder / name, partial(_write_text, content))


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
    weights.replace_file(folder / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    weights.replace_file(folder / CONFIG, partial(_write_text, text))


def _write_text(content: str, path: Path) -> None:
    path.write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class Folder:
    """A folder, looked at but not loaded. Raises `CheckpointError` where something is missing or unfit."""

    path: Path

    @cached_property
    def values(self) -> dict[str, Any]:
        """What config.json says."""
        return _read_object(self.path / CONFIG)

    @property
    def is_own(self) -> bool:
        """In our own layout, not a published model's."""
        return "model_type" not in self.values

    @cached_property
    def adapter(self) -> Adapter | None:
        """What it says of its base; None where it stands alone."""
        try:
            return Adapter.from_dict(self.values) if "base" in self.values else None
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG}: {error}") from None

    @cached_property
    def base(self) -> Folder | None:
        """The folder that it adds to."""
        return Folder(self.path / self.adapter.base) if self.adapter else None

    @cached_property
    def files(self) -> list[Path]:
        """The files of the weights."""
        return _refusing(weights.weight_files, self.path)

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """The tensors in them."""
        return _refusing(weights.read_headers, self.files)

    @cached_property
    def config(self) -> TransformerConfig:
        """The configuration, an addition's with its base's."""
        try:
            if self.adapter and self.base:
                return self.adapter.config(self.base.config)
            if self.is_own:
                return TransformerConfig.from_dict(self.values)
            find_family(self.values)  # before the weights, which a stranger may not have
            return read_config(self.values, read_json(self.path / GENERATION), self.stored)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG}: {error}") from None
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    @cached_property
    def takes(self) -> dict[str, Take]:
        """What becomes of each tensor."""
        if self.is_own:
            return {name: Take((name,)) for name in self.stored}
        try:
            return read_takes(self.values, self.stored)
        except UnknownTensorError as error:
            raise CheckpointError(f"{self.files[0]}: unknown tensor {error}") from None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which must fit the configuration."""
        if self.base:
            return self.base.tokenizer()
        try:
            if not self.is_own:
                return read_tokenizer(self.path, self.config, find_family(self.values).text)
            if (self.path / MANNER_FILE).is_file():
                return AdoptedTokenizer.read(self.path)
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from None
        return _own_tokenizer(self.path / TOKENIZER, self.config)

    def shortlist(self) -> Shortlist | None:
        """What a translator's tokens may become, where that is known."""
        if not (self.is_own and self.config.languages):
            return None
        try:
            return Shortlist.load(self.path, self.config)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def check(self) -> int:
        """Do the weights fit? Nothing is read of them. Returns the number of parameters."""
        model = weights.empty_model(lambda: build_model(self.config))
        if not self.adapter:
            _refusing(weights.plan, model, self.stored, self.takes, self.files[0])
        return sum(parameter.numel() for parameter in model.parameters())

    def model(self, device: torch.device | str, dtype: torch.dtype) -> Model:
        """The model, filled, ready for inference."""
        model: Model = weights.empty_model(lambda: build_model(self.config))
        if self.adapter and self.base:
            _refusing(weights.fill_from, model, self._composed(self.adapter, self.base), self.files[0])
        else:
            takes = _refusing(weights.plan, model, self.stored, self.takes, self.files[0])
            weights.fill(model, self.stored, takes, device, dtype)
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def _composed(self, adapter: Adapter, base: Folder) -> dict[str, Tensor]:
        """The tensors of an addition with its base's, which must be the very weights it was trained on."""
        found = weights.files_sha256(base.files)
        if found != adapter.base_sha256:
            raise CheckpointError(
                f"{self.path / CONFIG}: made for a base of sha256 {adapter.base_sha256[:12]}, "
                f"but {base.files[0]} has {found[:12]}; train it again on that base"
            )
        below = dict(base.model("cpu", torch.float32).named_parameters())
        own = weights.read_all(self.stored)
        try:
            return adapter.compose(below, own)
        except ConfigError as error:
            raise CheckpointError(f"{self.files[0]}: {error}") from None


def load(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Read a folder written by `save` or `save_adapter`, or one of a published model, ready for inference.

    Raises `CheckpointError` when a file is missing, truncated, or does not fit the others.
    """
    found = Folder(Path(folder))
    config, tokenizer = found.config, found.tokenizer()
    model = found.model(device, dtype)
    name, sha256 = found.path.resolve().name, weights.files_sha256(found.files)
    return Checkpoint(model, tokenizer, config, name, sha256, found.shortlist())


def load_config(folder: Path) -> TransformerConfig:
    """The configuration of a folder; raises `CheckpointError`."""
    return Folder(folder).config


def load_adapter(folder: Path) -> Adapter | None:
    """What a folder says of its base; None where it stands alone. Raises `CheckpointError`."""
    return Folder(folder).adapter


def file_sha256(path: Path) -> str:
    """The hex digest of a file."""
    return weights.files_sha256([path])


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _own_tokenizer(path: Path, config: TransformerConfig) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
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


def _refusing(read: Callable[..., T], *args: Any) -> T:
    try:
        return read(*args)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
