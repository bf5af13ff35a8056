"""Embeddings, encoder and decoder: the two towers of the paper's figure 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.attention import KV, Rotation
from model.block import Block, init_weights, make_norm, scale_residual_projections
from model.cache import LayerCache
from model.config import TransformerConfig
from model.masks import Mask, RowSpans, window_mask


def _waves(n_positions: int, d_model: int, exponent: float) -> tuple[Tensor, Tensor]:
    """Sines and cosines of pos / 10000^(i / exponent), each (n_positions, D / 2), on the CPU."""
    positions = torch.arange(n_positions, dtype=torch.float32, device="cpu")[:, None]
    steps = torch.arange(d_model // 2, dtype=torch.float32, device="cpu")
    angles = positions * torch.exp(steps * (-math.log(10_000.0) / exponent))
    return torch.sin(angles), torch.cos(angles)


def sinusoidal_table(n_positions: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(...), section 3.5 -> (n_positions, D)."""
    return torch.stack(_waves(n_positions, d_model, d_model / 2), dim=-1).flatten(1)


def split_table(n_positions: int, d_model: int) -> Tensor:
    """The same waves, first all sines, then all cosines -> (n_positions, D)."""
    return torch.cat(_waves(n_positions, d_model, d_model / 2), dim=-1)


def tensor2tensor_table(n_positions: int, d_model: int) -> Tensor:
    """Sines, then cosines, with rates that reach 1/10000 (Vaswani et al. 2018, the library) -> (n, D)."""
    return torch.cat(_waves(n_positions, d_model, d_model / 2 - 1), dim=-1)


_TABLES: dict[str, Callable[[int, int], Tensor]] = {
    "sinusoidal": sinusoidal_table,
    "sinusoidal_split": split_table,
    "sinusoidal_tensor2tensor": tensor2tensor_table,
}


class SinusoidalPositions(nn.Module):
    """Adds the fixed waves of section 3.5."""

    table: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        table = _TABLES[config.positions](config.max_len + config.position_offset, config.d_model)
        self.register_buffer("table", table[config.position_offset :], persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table[positions].to(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector per position (Gehring et al. 2017; BERT, GPT)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.offset = config.position_offset
        self.embedding = nn.Embedding(config.max_len + self.offset, config.d_model)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = x + self.embedding(positions + self.offset)
        return out


class NoPositions(nn.Module):
    """Adds nothing: rotary positions act inside the attention."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


def _linear_scaling(frequencies: Tensor, _: TransformerConfig, factor: float) -> Tensor:
    """Position interpolation (Chen et al. 2023): every position counts for 1 / factor."""
    return frequencies / factor


def _llama3_scaling(
    frequencies: Tensor,
    _: TransformerConfig,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_len: float,
) -> Tensor:
    """Slow waves are stretched, fast ones stay, those between go over (Llama 3.1)."""
    turns = frequencies * original_max_len / (2 * math.pi)  # of each wave over the original length
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * keep + frequencies / factor * (1 - keep)


def _yarn_scaling(
    frequencies: Tensor,
    config: TransformerConfig,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_len: float,
    attention_factor: float,  # read by `Rotary`
) -> Tensor:
    """Waves stretched from the one that turns beta_slow times on, fast ones kept (Peng et al. 2023, 3.2)."""

    def dimension(turns: float) -> float:
        wave = original_max_len / (turns * 2 * math.pi)
        return config.head_dim * math.log(wave) / (2 * math.log(config.rotary_base))

    low = max(math.floor(dimension(beta_fast)), 0)
    high = min(math.ceil(dimension(beta_slow)), config.head_dim - 1)
    steps = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    stretched = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / factor * stretched + frequencies * (1 - stretched)


_SCALINGS: dict[str, Callable[..., Tensor]] = {
    "none": lambda frequencies, _: frequencies,
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "yarn": _yarn_scaling,
}


class Rotary(nn.Module):
    """The angles by which queries and keys turn (RoFormer, Su et al. 2021, section 3.2.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, device="cpu") / config.head_dim
        scale = _SCALINGS[config.rotary_scaling]
        # No buffer: in a model cast to bfloat16 its rounding would turn far positions by whole radians.
        self.frequencies = scale(config.rotary_base**-exponents, config, **config.rotary_factors)
        self.amplitude = config.rotary_factors.get("attention_factor", 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(self.frequencies)
        self.frequencies = self.frequencies if moved.is_meta else self.frequencies.to(moved.device)
        return self

    def forward(self, positions: Tensor) -> Rotation:
        """positions (B, T) -> cosines and sines, each (B, 1, T, K / 2), in float32."""
        angles = positions[:, None, :, None].float() * self.frequencies
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude


_POSITIONS: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "learned": LearnedPositions,
    "rotary": lambda _: NoPositions(),
}


class Embeddings(nn.Module):
    """Token embeddings, by the paper times √D (section 3.4), plus positions, plus any segments."""

    def __init__(self, config: TransformerConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model) if tokens is None else tokens
        self.scale = math.sqrt(config.d_model) if config.scale_embeddings else 1.0
        self.positions = _POSITIONS.get(config.positions, SinusoidalPositions)(config)
        self.segments = nn.Embedding(config.n_segments, config.d_model) if config.n_segments else None
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_ids: Tensor, positions: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """token_ids, positions and segment_ids (B, T), without segments all in the first -> (B, T, D)."""
        x = self.positions(self.tokens(token_ids) * self.scale, positions)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(token_ids) if segment_ids is None else segment_ids)
        out: Tensor = self.dropout(self.norm(x))
        return out


class _Stack(nn.Module):
    """Blocks between an embedding and a last norm."""

    def __init__(
        self, config: TransformerConfig, embeddings: Embeddings, n_layers: int, *, cross: bool
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.blocks = nn.ModuleList(Block(config, cross=cross) for _ in range(n_layers))
        # After pre-norm blocks nothing has normalised the sum; post-norm blocks end in a norm already.
        self.norm = make_norm(config) if config.norm_first else nn.Identity()
        self.blocks.apply(init_weights)
        scale_residual_projections(self.blocks)

    def _rotation(self, positions: Tensor) -> Rotation | None:
        return None if self.rotary is None else self.rotary(positions)


class Encoder(_Stack):
    """Every position attends to every real position."""

    def __init__(self, config: TransformerConfig, embeddings: Embeddings) -> None:
        super().__init__(config, embeddings, config.n_encoder_layers, cross=False)

    def forward(self, token_ids: Tensor, mask: Tensor | None, segment_ids: Tensor | None = None) -> Tensor:
        """token_ids (B, S), mask (B, 1, 1, S) -> memory (B, S, D)."""
        positions = torch.arange(token_ids.size(1), device=token_ids.device).expand_as(token_ids)
        x = self.embeddings(token_ids, positions, segment_ids)
        memory: Tensor = self.norm(self._through_blocks(x, mask, self._rotation(positions)))
        return memory

    def _through_blocks(self, x: Tensor, mask: Tensor | None, rotation: Rotation | None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask, rotation=rotation)
        return x


class Decoder(_Stack):
    """Each position attends to itself and what came before, and to the memory where there is one."""

    def __init__(self, config: TransformerConfig, embeddings: Embeddings, *, cross: bool) -> None:
        super().__init__(config, embeddings, config.n_decoder_layers, cross=cross)
        self.window = config.window
        self.n_full_layers = config.n_full_layers if config.window else config.n_decoder_layers

    def project_memory(self, memory: Tensor) -> list[KV]:
        """memory (B, S, D) -> per layer the (k, v) of its cross-attention: once per request."""
        return [block.cross_attention.project_kv(memory) for block in self.blocks]  # type: ignore[union-attr, operator]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        mask: Mask | None,
        cache: Sequence[LayerCache] | None = None,
        memory: Sequence[KV] | None = None,
        memory_mask: Mask | None = None,
    ) -> Tensor:
        """token_ids and positions (B, T), mask over what the cache holds -> hidden states (B, T, D)."""
        x = self.embeddings(token_ids, positions)
        rotation, masks = self._rotation(positions), self._masks(mask, positions)
        hidden: Tensor = self.norm(self._through_blocks(x, masks, cache, memory, memory_mask, rotation))
        return hidden

    def _through_blocks(
        self,
        x: Tensor,
        masks: Sequence[Mask | None],
        cache: Sequence[LayerCache] | None,
        memory: Sequence[KV] | None,
        memory_mask: Mask | None,
        rotation: Rotation | None,
    ) -> Tensor:
        nothing = [None] * len(self.blocks)
        for block, layer_mask, layer_cache, layer_memory in zip(
            self.blocks, masks, cache or nothing, memory or nothing, strict=True
        ):
            x = block(x, layer_mask, layer_cache, layer_memory, memory_mask, rotation)
        return x

    def _masks(self, mask: Mask | None, positions: Tensor) -> list[Mask | None]:
        """A mask per layer: as given, narrowed to the window where a layer has one."""
        full = [mask] * self.n_full_layers
        if self.window is None:
            return full
        near: Mask
        if isinstance(mask, RowSpans):
            near = mask.window(self.window)
        elif isinstance(mask, Tensor):
            near = mask & window_mask(positions, mask.size(-1), self.window)
        else:
            raise ValueError(  # noqa: TRY004  # the value is wrong for this model, not in itself
                "a decoder with a window needs a mask, whose last size is that of the keys"
            )
        return [*full, *[near] * (len(self.blocks) - self.n_full_layers)]
