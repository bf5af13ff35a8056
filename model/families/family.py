"""What a family is: a table of names, and for each of its classes a reading of its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from model.adopted import LanguagePlace
from model.config import TransformerConfig
from model.families.given import Given
from model.families.older import Maker
from model.weights import Take

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
# Names that older checkpoints have for the parameters of a norm.
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Special tokens as two schools name them.
WORDS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ANGLES = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
ANGLES_WITH_MASK = ANGLES | {"cls": "<s>", "sep": "</s>", "mask": "<mask>"}

_MARKS = ("transposed", "reversed", "flattened", "spare")

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class UnknownTensorError(ValueError):
    """A tensor that a family's table does not know."""


Table = Mapping[str, Take | None]  # None: there, and not needed


def table(text: str) -> dict[str, Take | None]:
    """A table of lines "theirs ours", with {} for the number of a layer and .* for .weight and .bias.

    Several names of ours take equal parts; `@transposed` turns the tensor first, `@reversed` its rows,
    `@flattened` makes it one row; `@spare` lets it lie where the model has no such part; "-" always.
    """
    takes: dict[str, Take | None] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        theirs, *rest = line.split()
        ours = tuple(word for word in rest if not word.startswith("@"))
        marks = {mark: f"@{mark}" in rest for mark in _MARKS}
        for ending in (".weight", ".bias") if theirs.endswith(".*") else ("",):
            targets = tuple(name.removesuffix(".*") + ending for name in ours)
            only_maps = marks | {"transposed": marks["transposed"] and ending == ".weight"}
            takes[theirs.removesuffix(".*") + ending] = None if ours == ("-",) else Take(targets, **only_maps)
    return takes


@dataclass(frozen=True)
class Class:
    """One class of model: how its configuration reads, and what its tensors are called."""

    read: Callable[[Given], TransformerConfig]
    table: Table

    def takes(self, tensors: Iterable[str], prefix: str) -> dict[str, Take]:
        """What becomes of each tensor; those that are not needed are left out.

        Raises `UnknownTensorError`.
        """
        found = {name: self._take(name, prefix) for name in tensors}
        return {name: take for name, take in found.items() if take is not None}

    def _take(self, name: str, prefix: str) -> Take | None:
        modern = name
        for old, new in _OLD_NORMS.items():
            modern = modern.replace(old, new)
        layers = _LAYER.findall(modern)
        pattern = _LAYER.sub("{}", modern)
        for known in (pattern, prefix + pattern):
            if known in self.table:
                take = self.table[known]
                return take and replace(take, targets=tuple(t.format(*layers) for t in take.targets))
        raise UnknownTensorError(name)


@dataclass(frozen=True)
class Text:
    """How a family treats text, where its tokenizer's files do not say.

    `older` makes a backend where there is no tokenizer.json. `tokens` are the special ones by their roles.
    `language` matches the tokens of languages, with the code as its group; see `model.adopted.Manner`.
    `refused` are classes of tokenizers that put other things around a text.
    """

    older: Maker
    tokens: Mapping[str, str]
    language: str = ""
    language_place: LanguagePlace = "none"
    forces_language: bool = False
    refused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Family:
    """The classes of a kind of model, the usual one first.

    `prefix` is what names in a table begin with and a checkpoint of the bare model leaves out.
    """

    classes: Mapping[str, Class]
    prefix: str
    text: Text
