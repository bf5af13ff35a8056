"""A classifier as a small addition to a masked model: a head, and low-rank deltas for some of its maps.

The delta of a map is scale · up @ down, two thin matrices (LoRA, Hu et al. 2021, section 4.1). A folder that
holds an addition names its base in `config.json`; loading adds the deltas in, so that inference knows
nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from model.config import ConfigError, TransformerConfig

UP, DOWN = ".up", ".down"  # what follows a map's name: (out, rank) and (rank, in)
_KEPT = ("embeddings.", "encoder.")  # a base's heads have no part in a classifier


@dataclass(frozen=True)
class Adapter:
    """What `config.json` says of an addition. Raises `ConfigError` on values that make no sense.

    `base` is the base's folder, as seen from the addition's own; `base_sha256` the digest of its weights.
    """

    base: str
    base_sha256: str
    scale: float
    labels: list[str]

    def __post_init__(self) -> None:
        if not self.base or PurePath(self.base).is_absolute():
            raise ConfigError(f"base: {self.base!r} is not a relative path")
        if len(self.base_sha256) != 64 or not set(self.base_sha256) <= set("0123456789abcdef"):
            raise ConfigError(f"base_sha256: {self.base_sha256!r} is not a digest")
        if not 0.0 < self.scale < math.inf:
            raise ConfigError(f"scale: {self.scale} is not a positive number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Adapter:
        """The inverse of `to_dict`; every key must be there, and no other."""
        wanted = {"architecture": str, "base": str, "base_sha256": str, "scale": (int, float), "labels": list}
        if values.keys() != wanted.keys():
            odd = ", ".join(sorted(values.keys() ^ wanted.keys()))
            raise ConfigError(f"an addition to a base has the keys {', '.join(wanted)}; not so: {odd}")
        for key, kind in wanted.items():
            if not isinstance(values[key], kind) or isinstance(values[key], bool):  # type: ignore[arg-type]
                raise ConfigError(f"{key}: {values[key]!r} is of the wrong type")
        if values["architecture"] != "classifier":
            raise ConfigError(f"architecture: an addition to a base is no {values['architecture']}")
        return cls(**{key: value for key, value in values.items() if key != "architecture"})

    def to_dict(self) -> dict[str, Any]:
        return {"architecture": "classifier", **asdict(self)}

    def config(self, base: TransformerConfig) -> TransformerConfig:
        """The configuration of the whole. Raises `ConfigError` when the base is no masked model."""
        if base.architecture != "masked_lm":
            raise ConfigError(f"base: {self.base} holds a {base.architecture}, not a masked_lm")
        return replace(base, architecture="classifier", labels=self.labels)

    def compose(self, base: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A base's tensors and the addition's own -> the tensors of the whole, float32 where added up.

        Raises `ConfigError` on a delta without its other half, or of no map of the base.
        """
        whole = {name: tensor for name, tensor in base.items() if name.startswith(_KEPT)}
        deltas = {name.removesuffix(end) for end in (UP, DOWN) for name in own if name.endswith(end)}
        whole |= {name: tensor for name, tensor in own.items() if not name.endswith((UP, DOWN))}
        for name in sorted(deltas):
            halves = own.get(name + UP), own.get(name + DOWN)
            if halves[0] is None or halves[1] is None or name not in whole:
                raise ConfigError(f"the delta of {name} has no other half, or no map in the base")
            whole[name] = whole[name].float() + delta(halves[0], halves[1], self.scale, name, whole[name])
        return whole


def delta(up: Tensor, down: Tensor, scale: float, name: str, weight: Tensor) -> Tensor:
    """scale · up @ down (out, in). Raises `ConfigError` when it does not fit the weight."""
    fits = up.ndim == down.ndim == 2 and up.size(1) == down.size(0)
    if not fits or weight.shape != torch.Size((up.size(0), down.size(1))):
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise ConfigError(f"the delta of {name}, {shapes}, does not fit {tuple(weight.shape)}")
    return scale * (up.float() @ down.float())
