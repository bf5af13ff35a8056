"""Heads turn hidden states into logits. Losses live in training, softmax at the edge."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.block import ACTIVATIONS, init_weights, make_norm
from model.config import TransformerConfig
from model.transformer import Embeddings


class LMHead(nn.Module):
    """Projection to the vocabulary, as a rule with the embedding's own weights (Press and Wolf 2017)."""

    def __init__(self, config: TransformerConfig, embeddings: Embeddings, *, bias: bool) -> None:
        super().__init__()
        self.tokens = embeddings.tokens if config.tied else nn.Embedding(config.vocab_size, config.d_model)
        if not config.tied:
            init_weights(self.tokens)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.tokens.weight, self.bias)


class MLMHead(nn.Module):
    """BERT's masked-token head: a map, an activation, a norm, the projection with a bias of its own."""

    def __init__(self, config: TransformerConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.norm = make_norm(config)
        self.activation = ACTIVATIONS[config.head_activation]
        self.project = LMHead(config, embeddings, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D): what the projection reads."""
        out: Tensor = self.norm(self.activation(self.transform(hidden)))
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits: Tensor = self.project(self.features(hidden)) + self.bias
        return logits


class ClassificationHead(nn.Module):
    """Pools the first position ([CLS]) through a map and tanh, as BERT does, and maps it to classes."""

    def __init__(self, config: TransformerConfig, n_classes: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.pool_activation]
        self.pool = nn.Linear(config.d_model, config.d_model)
        self.classify = nn.Linear(config.d_model, n_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, n_classes)."""
        logits: Tensor = self.classify(self.activation(self.pool(hidden[:, 0])))
        return logits


class NSPHead(ClassificationHead):
    """Next-sentence prediction (Devlin et al. 2018, section 3.1): class 1 says that B follows A."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, 2)
