"""The shape of a model, frozen: what `config.json` holds."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Architecture = Literal["translator", "masked_lm", "causal_lm", "classifier"]
Norm = Literal["layer", "rms"]
Activation = Literal["relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"]
PoolActivation = Literal["tanh", "relu"]
Positions = Literal["sinusoidal", "sinusoidal_split", "sinusoidal_tensor2tensor", "learned", "rotary"]
RotaryScaling = Literal["none", "linear", "llama3", "yarn"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": get_args(Architecture),
    "norm": get_args(Norm),
    "activation": get_args(Activation),
    "positions": get_args(Positions),
    "head_activation": get_args(Activation),
    "pool_activation": get_args(PoolActivation),
    "rotary_scaling": get_args(RotaryScaling),
}
# The factors that each scaling of rotary positions reads, all of them (see `model.transformer.Rotary`).
ROTARY_FACTORS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_len"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "original_max_len", "attention_factor"}),
}
# What a value of JSON must be for a field annotated so; the rest is checked against `_CHOICES`.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": (bool,),
    "bool | None": (bool, type(None)),
    "dict[str, int]": (dict,),
    "dict[str, float]": (dict,),
    "list[int]": (list,),
    "list[str]": (list,),
}


class ConfigError(ValueError):
    """A configuration that no model can be built from; the message names the key."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and parts of one model.

    Token ids live here too, so that a folder describes itself. A part that is None is as its neighbour
    says: `d_head` as d_model over n_heads, the biases of single maps as `bias`, the ids of tokens that a
    vocabulary may lack as not there. Raises `ConfigError` on values that do not fit together.
    """

    architecture: Architecture
    vocab_size: int
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_ff: int = 1024
    n_encoder_layers: int = 0
    n_decoder_layers: int = 0
    max_len: int = 512
    dropout: float = 0.1
    norm: Norm = "layer"
    norm_first: bool = True
    norm_eps: float = 1e-5
    activation: Activation = "gelu"
    gated: bool = False
    positions: Positions = "sinusoidal"
    position_offset: int = 0  # the row of position 0 in a table of positions
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling = "none"
    rotary_factors: dict[str, float] = field(default_factory=dict)
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    ffn_bias: bool | None = None
    qk_norm: bool = False
    window: int | None = None  # positions that a decoder's layer looks back at, itself included
    n_full_layers: int = 0  # the first layers, which look back at everything in spite of a window
    n_segments: int = 0
    scale_embeddings: bool = True
    embedding_norm: bool = False
    own_positions: bool = False  # encoder and decoder each have positions and embedding norm of their own
    tied: bool = True
    head_bias: bool = False
    head_activation: Activation = "gelu"
    pool_activation: PoolActivation = "tanh"
    mlm_head: bool = True
    nsp_head: bool = True
    pad_id: int = 0
    bos_id: int | None = 1
    eos_id: int = 2
    more_eos_ids: list[int] = field(default_factory=list)
    mask_id: int | None = 3
    cls_id: int | None = 4
    sep_id: int | None = 5
    start_id: int | None = None  # what a translation begins with; None: with its language
    languages: dict[str, int] = field(default_factory=dict)
    length_penalty: float = 1.0  # of a translation's beam search, where none is asked for
    # What the way back counts in ordering a translation's hypotheses (model/round_trip.py), where nothing is
    # asked for.
    round_trip: float = 0.0
    # What the nearest examples of translations count in choosing a token (model/nearest.py): the most, where
    # nothing else is asked for; the distance at which that has fallen to nothing; what an example that is in
    # nothing like the sentence is farther away; how sharply near ones win.
    example_weight: float = 0.0
    example_reach: float = 1.0
    example_offset: float = 1.0
    example_temperature: float = 0.1
    # Of a generation that always takes the likeliest token, where no penalty is asked for: without it
    # small models go round in circles.
    repetition_penalty: float = 1.0
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ConfigError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}")
        for key in ("vocab_size", "d_model", "n_heads", "kv_heads", "d_ff", "max_len"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: {getattr(self, key)} is less than 1")
        for key in ("n_segments", "n_encoder_layers", "n_decoder_layers", "position_offset", "n_full_layers"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: {getattr(self, key)} is less than 0")
        for key in ("norm_eps", "rotary_base", "example_reach", "example_temperature"):
            if not 0.0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{key}: {getattr(self, key)} is not a positive number")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(f"d_model: {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"n_heads: {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if (
            self.positions != "learned"
            and (self.head_dim if self.positions == "rotary" else self.d_model) % 2
        ):
            raise ConfigError(f"positions: {self.positions} needs an even width")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout: {self.dropout} is not in [0, 1)")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty: {self.length_penalty} is not a number")
        if not 0.0 <= self.round_trip < math.inf:
            raise ConfigError(f"round_trip: {self.round_trip} is not a number of at least 0")
        if not 0.0 <= self.example_offset < math.inf:
            raise ConfigError(f"example_offset: {self.example_offset} is not a number of at least 0")
        if not 0.0 <= self.example_weight < 1.0:
            raise ConfigError(f"example_weight: {self.example_weight} is not in [0, 1)")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty: {self.repetition_penalty} is not a positive number")
        self._check_layers()
        self._check_labels()
        self._check_rotary()
        self._check_ids()
        for key in ("window", "d_head"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"{key}: {getattr(self, key)} is less than 1")

    def _check_rotary(self) -> None:
        wanted, found = ROTARY_FACTORS[self.rotary_scaling], self.rotary_factors.keys()
        if found != wanted:
            odd = ", ".join(sorted(found ^ wanted))
            raise ConfigError(f"rotary_factors: not those of scaling {self.rotary_scaling!r}: {odd}")
        factors: dict[str, Any] = self.rotary_factors  # from JSON: the type is yet to be seen
        for key, value in factors.items():
            if not isinstance(value, int | float) or not 0.0 < value < math.inf:
                raise ConfigError(f"rotary_factors.{key}: {value!r} is not a positive number")

    def _check_ids(self) -> None:
        names = ("pad_id", "bos_id", "eos_id", "mask_id", "cls_id", "sep_id", "start_id")
        ids = {key: getattr(self, key) for key in names}
        ids |= {f"more_eos_ids[{i}]": token_id for i, token_id in enumerate(self.more_eos_ids)}
        ids |= {f"languages.{language}": token_id for language, token_id in self.languages.items()}
        for key, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ConfigError(f"{key}: {token_id} is outside the vocabulary of {self.vocab_size}")

    def _check_layers(self) -> None:
        wants_encoder = self.architecture in ("translator", "masked_lm", "classifier")
        wants_decoder = self.architecture in ("translator", "causal_lm")
        if wants_encoder != (self.n_encoder_layers > 0):
            raise ConfigError(
                f"n_encoder_layers: {self.n_encoder_layers} does not suit a {self.architecture}"
            )
        if wants_decoder != (self.n_decoder_layers > 0):
            raise ConfigError(
                f"n_decoder_layers: {self.n_decoder_layers} does not suit a {self.architecture}"
            )

    def _check_labels(self) -> None:
        if self.architecture != "classifier":
            if self.labels:
                raise ConfigError(f"labels: a {self.architecture} has none")
            return
        if len(self.labels) < 2 or not all(map(_is_name, self.labels)):
            raise ConfigError(f"labels: {self.labels!r} is not a list of two or more names")
        if len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"labels: {self.labels!r} has a name twice")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return (self.eos_id, *self.more_eos_ids)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`. Raises `ConfigError` on unknown or missing keys and wrong types."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown key: {', '.join(unknown)}")
        for known in fields(cls):
            if known.name in values and not _fits(values[known.name], str(known.type)):
                raise ConfigError(f"{known.name}: {values[known.name]!r} is not {known.type}")
        needed = (f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigError(f"missing key: {', '.join(missing)} (a published model has a model_type)")
        try:
            return cls(**values)
        except TypeError as error:  # of what stands within a value
            raise ConfigError(str(error)) from None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _fits(value: Any, annotation: str) -> bool:
    wanted = _TYPES.get(annotation, (object,))
    # To Python a bool is an int; to a configuration it is a mistake.
    return isinstance(value, wanted) and (not isinstance(value, bool) or bool in wanted or object in wanted)
