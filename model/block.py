"""One layer of the paper's figure 1: attention and feed-forward, each with Add & Norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import KV, Attention, Rotation
from model.cache import LayerCache
from model.config import TransformerConfig
from model.masks import Mask


def gelu_sigmoid(x: Tensor) -> Tensor:
    """The coarse approximation x σ(1.702 x) (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_sigmoid": gelu_sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def make_norm(config: TransformerConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dimension."""
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class FeedForward(nn.Module):
    """The position-wise feed-forward network, section 3.3: two linear maps with an activation between."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        bias = config.bias if config.ffn_bias is None else config.ffn_bias
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return out


class GatedFeedForward(FeedForward):
    """A gated variant (Shazeer 2020): the activation of one map scales the other."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=self.up.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.down(self.dropout(self.activation(self.gate(x)) * self.up(x)))
        return out


class PreNorm(nn.Module):
    """x + sublayer(norm(x)): the norm stands before the sub-layer (Xiong et al. 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = x + self.dropout(sublayer(self.norm(x)))
        return out


class PostNorm(PreNorm):
    """norm(x + sublayer(x)): Add & Norm as the first paper has it (section 3.1)."""

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = self.norm(x + self.dropout(sublayer(x)))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention where there is a memory, feed-forward; a residual around each."""

    def __init__(self, config: TransformerConfig, *, cross: bool = False) -> None:
        super().__init__()
        residual = PreNorm if config.norm_first else PostNorm
        self.attention = Attention(config)
        self.add_attention = residual(config)
        if cross:
            self.cross_attention = Attention(config)
            self.add_cross = residual(config)
        self.feed_forward = (GatedFeedForward if config.gated else FeedForward)(config)
        self.add_feed_forward = residual(config)

    def forward(
        self,
        x: Tensor,
        mask: Mask | None,
        cache: LayerCache | None = None,
        memory: KV | None = None,
        memory_mask: Mask | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); memory is the cross-attention's (k, v), projected once a request."""

        def attend(y: Tensor) -> Tensor:
            if cache:
                return self.attention.attend_cached(y, cache, mask, rotation)
            q, kv = self.attention.project_qkv(y, rotation)
            return self.attention.attend(q, kv, mask)

        x = self.add_attention(x, attend)
        if memory is not None:
            x = self.add_cross(x, lambda y: self.cross_attention(y, memory, memory_mask))
        out: Tensor = self.add_feed_forward(x, self.feed_forward)
        return out


class WeightsTap:
    """While entered, collects the weights of every `Attention` in a module, in the order they run.

    It swaps each module's `attend` for the readable reference and puts it back on exit, so that the
    path that does not ask for weights carries no test for them. Not for concurrent use on one module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [(name, m) for name, m in module.named_modules() if isinstance(m, Attention)]
        self.weights: dict[str, list[Tensor]] = {name: [] for name, _ in self._layers}

    def __enter__(self) -> WeightsTap:
        for name, layer in self._layers:
            layer.attend = self._tapped(name, layer)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for _, layer in self._layers:
            del layer.attend

    def _tapped(self, name: str, layer: Attention) -> Callable[..., Tensor]:
        def attend(q: Tensor, kv: KV, mask: Tensor | None) -> Tensor:
            out, weights = layer.weights(q, kv, mask)
            self.weights[name].append(weights.detach())
            return out

        return attend


def init_weights(module: nn.Module) -> None:
    """Normal weights of deviation 1/√fan_in for maps, D^-1/2 for embeddings; zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def scale_residual_projections(blocks: nn.ModuleList) -> None:
    """Shrink what each sub-layer adds by 1/√(2L), as GPT-2 does, so that depth does not grow the sum."""
    with torch.no_grad():
        for block in blocks:
            for name, weight in block.named_parameters():
                if name.endswith(("out_proj.weight", "down.weight")):
                    weight.mul_((2 * len(blocks)) ** -0.5)
