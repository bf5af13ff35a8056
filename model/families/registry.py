"""Which family a config.json belongs to, and what the core makes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from model.config import ConfigError, TransformerConfig
from model.families.decoders import DECODERS
from model.families.encoders import ENCODERS
from model.families.family import Class, Family
from model.families.given import Given
from model.families.translators import TRANSLATORS
from model.weights import Take

FAMILIES: dict[str, Family] = {**DECODERS, **ENCODERS, **TRANSLATORS}
# Ids that belong to decoding, of which an older file has no copy of its own.
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def find_family(values: Mapping[str, Any]) -> Family:
    """By the kind of model that a config.json names. Raises `ConfigError`."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"model_type: {kind!r} is not supported; there are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def read_config(
    values: Mapping[str, Any], generation: Mapping[str, Any], tensors: Collection[str]
) -> TransformerConfig:
    """Our configuration for a config.json and a generation_config.json. Raises `ConfigError`."""
    family = find_family(values)
    given = Given(
        {**values, **{key: value for key, value in generation.items() if key in _GENERATION}}, tensors
    )
    if "quantization_config" in given:
        raise ConfigError("quantization_config: quantised checkpoints are not supported")
    given.demand(is_decoder=False, add_cross_attention=False, pruned_heads={})
    return find_class(values, family).read(given)


def read_takes(values: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Take]:
    """What becomes of each tensor. Raises `ConfigError`, or `UnknownTensorError` with its name."""
    family = find_family(values)
    return find_class(values, family).takes(tensors, family.prefix)


def find_class(values: Mapping[str, Any], family: Family) -> Class:
    """The class that a checkpoint is of; the family's first where it names none."""
    names = values.get("architectures") or list(family.classes)[:1]
    for name in names:
        if name in family.classes:
            return family.classes[name]
    raise ConfigError(f"architectures: {names!r} is not supported; there are {', '.join(family.classes)}")
