"""Embeddings, encoder and decoder: the two towers of the paper's figure 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention import KV, Rotation
from model.block import Block, init_weights, make_norm, scale_residual_projections
from model.cache import LayerCache
from model.config import TransformerConfig


def sinusoidal_table(max_len: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(...), section 3.5 -> (max_len, D)."""
    positions = torch.arange(max_len, dtype=torch.float32)[:, None]
    rates = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10_000.0) / d_model))
    table = torch.empty(max_len, d_model)
    table[:, 0::2] = torch.sin(positions * rates)
    table[:, 1::2] = torch.cos(positions * rates)
    return table


class SinusoidalPositions(nn.Module):
    """Adds the fixed waves of section 3.5."""

    table: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.register_buffer("table", sinusoidal_table(config.max_len, config.d_model), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table[positions].to(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector per position (Gehring et al. 2017; BERT, GPT)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.max_len, config.d_model)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = x + self.embedding(positions)
        return out


class NoPositions(nn.Module):
    """Adds nothing: rotary positions act inside the attention."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class Rotary(nn.Module):
    """The angles by which queries and keys turn (RoFormer, Su et al. 2021, section 3.2.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.base, self.head_dim = config.rotary_base, config.head_dim

    def forward(self, positions: Tensor) -> Rotation:
        """positions (B, T) -> cosines and sines, each (B, 1, T, K / 2), in float32."""
        # No buffer: in a model cast to bfloat16 its rounding would turn far positions by whole radians.
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim
        angles = positions[:, None, :, None].float() * self.base**-exponents
        return angles.cos(), angles.sin()


_POSITIONS: dict[str, type[nn.Module]] = {"learned": LearnedPositions, "rotary": NoPositions}


class Embeddings(nn.Module):
    """Token embeddings times √D (section 3.4), plus positions, plus segments where the model has them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.scale = math.sqrt(config.d_model)
        added = _POSITIONS.get(config.positions)
        self.positions = added() if added is NoPositions else (added or SinusoidalPositions)(config)
        self.segments = nn.Embedding(config.n_segments, config.d_model) if config.n_segments else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_ids: Tensor, positions: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """token_ids, positions and segment_ids (B, T) -> (B, T, D)."""
        x = self.positions(self.tokens(token_ids) * self.scale, positions)
        if self.segments is not None and segment_ids is not None:
            x = x + self.segments(segment_ids)
        out: Tensor = self.dropout(x)
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
        rotation = self._rotation(positions)
        for block in self.blocks:
            x = block(x, mask, rotation=rotation)
        memory: Tensor = self.norm(x)
        return memory


class Decoder(_Stack):
    """Each position attends to itself and what came before, and to the memory where there is one."""

    def __init__(self, config: TransformerConfig, embeddings: Embeddings, *, cross: bool) -> None:
        super().__init__(config, embeddings, config.n_decoder_layers, cross=cross)

    def project_memory(self, memory: Tensor) -> list[KV]:
        """memory (B, S, D) -> per layer the (k, v) of its cross-attention: once per request."""
        return [block.cross_attention.project_kv(memory) for block in self.blocks]  # type: ignore[union-attr, operator]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Sequence[LayerCache] | None = None,
        memory: Sequence[KV] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """token_ids and positions (B, T), mask over what the cache holds -> hidden states (B, T, D)."""
        x = self.embeddings(token_ids, positions)
        rotation = self._rotation(positions)
        nothing = [None] * len(self.blocks)
        for block, layer_cache, layer_memory in zip(
            self.blocks, cache or nothing, memory or nothing, strict=True
        ):
            x = block(x, mask, layer_cache, layer_memory, memory_mask, rotation)
        hidden: Tensor = self.norm(x)
        return hidden
