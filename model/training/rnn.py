"""What the Transformer replaced: a recurrent encoder-decoder with attention (Bahdanau et al. 2015).

A baseline to compare with, never served. It offers training what `Translator` offers, so that one task
trains both. Letters as in `model/attention.py`; E the width of embeddings, R that of a recurrent state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from model.block import init_weights
from model.masks import padding_mask


@dataclass(frozen=True)
class RNNConfig:
    """Sizes and token ids; `d_attention` is the width in which states and positions are compared."""

    vocab_size: int
    d_embedding: int = 256
    d_state: int = 512
    d_attention: int = 256
    dropout: float = 0.0
    pad_id: int = 0
    eos_id: int = 2
    languages: dict[str, int] = field(default_factory=dict)
    architecture: str = "rnn"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Words(nn.Module):
    """Token embeddings times √E, as the Transformer beside it has them."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_embedding)
        self.scale = math.sqrt(config.d_embedding)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)."""
        out: Tensor = self.dropout(self.tokens(token_ids) * self.scale)
        return out


class AdditiveAttention(nn.Module):
    """e = vᵀ tanh(W s + U h), softmax over the source, the weighted sum of h (section 3.1, A.1.2)."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.d_state, config.d_attention)
        self.key = nn.Linear(2 * config.d_state, config.d_attention, bias=False)
        self.score = nn.Linear(config.d_attention, 1, bias=False)

    def forward(self, state: Tensor, keys: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """state (B, R), keys (B, S, A) = U h, memory (B, S, 2R), mask (B, S) -> context (B, 2R)."""
        scores = self.score(torch.tanh(keys + self.query(state)[:, None])).squeeze(-1)  # (B, S)
        weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1)
        context: Tensor = weights.to(memory.dtype)[:, None] @ memory
        return context.squeeze(1)


class RNNTranslator(nn.Module):
    """A bidirectional GRU reads, a GRU with attention writes; one embedding for source, target and output."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = config
        width, state = config.d_embedding, config.d_state
        self.embeddings = Words(config)
        self.reader = nn.GRU(width, state, batch_first=True, bidirectional=True)
        self.begin = nn.Linear(state, state)
        self.attention = AdditiveAttention(config)
        self.writer = nn.GRUCell(width + 2 * state, state)
        self.readout = nn.Linear(state + width + 2 * state, width)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(init_weights)
        # Orthogonal maps from state to state, as the paper has them (B.1): gradients neither grow nor vanish.
        for name, parameter in self.named_parameters():
            for gate in parameter.detach().chunk(3) if ".weight_hh" in name else ():
                nn.init.orthogonal_(gate)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """src (B, S) -> states of both directions (B, S, 2R) and their mask (B, 1, 1, S)."""
        mask = padding_mask(src, self.config.pad_id)
        lengths = mask.sum(dim=(1, 2, 3)).cpu()
        packed = pack_padded_sequence(self.embeddings(src), lengths, batch_first=True, enforce_sorted=False)
        memory, _ = pad_packed_sequence(self.reader(packed)[0], batch_first=True, total_length=src.size(1))
        return memory, mask

    def start(self, memory: Tensor) -> Tensor:
        """The first state (B, R), from what the backward reader knows at the first position (A.2.2)."""
        return torch.tanh(self.begin(memory[:, 0, self.config.d_state :]))

    def step(
        self, words: Tensor, state: Tensor, keys: Tensor, memory: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last words (B, E) and the state (B, R) -> the next state, and the context (B, 2R)."""
        context = self.attention(state, keys, memory, mask)
        following: Tensor = self.writer(torch.cat((words, context.to(words.dtype)), -1), state)
        return following, context

    def decode(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """tgt (B, T), teacher-forced -> what the tied projection reads (B, T, E)."""
        words, mask = self.embeddings(tgt), memory_mask[:, 0, 0]
        keys, state = self.attention.key(memory), self.start(memory)
        states, contexts = [], []
        for position in range(tgt.size(1)):
            state, context = self.step(words[:, position], state, keys, memory, mask)
            states.append(state)
            contexts.append(context)
        return self.read_out(torch.stack(states, 1), words, torch.stack(contexts, 1))

    def read_out(self, states: Tensor, words: Tensor, contexts: Tensor) -> Tensor:
        """State, last word and context together (A.2.2; tanh for its maxout) -> (..., E)."""
        features = torch.cat((states, words.to(states.dtype), contexts.to(states.dtype)), -1)
        out: Tensor = self.dropout(torch.tanh(self.readout(features)))
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """(..., E) -> logits (..., V), by the embedding's own weights."""
        return F.linear(hidden, self.embeddings.tokens.weight)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """src (B, S), tgt (B, T) -> logits (B, T, V)."""
        return self.head(self.decode(tgt, *self.encode(src)))


@torch.no_grad()
def greedy(
    model: RNNTranslator,
    sources: Sequence[Sequence[int]],
    prompts: Sequence[int],
    max_new_tokens: int,
    suppress: Sequence[int] = (),
) -> list[list[int]]:
    """The most likely token, step by step -> the new tokens of each source, without the end token."""
    width = max(map(len, sources))
    src = torch.full((len(sources), width), model.config.pad_id)
    for row, source in zip(src, sources, strict=True):
        row[: len(source)] = torch.tensor(list(source))
    memory, mask = model.encode(src)
    keys, state = model.attention.key(memory), model.start(memory)
    tokens, ended = torch.tensor(list(prompts)), torch.zeros(len(sources), dtype=torch.bool)
    written = []
    for _ in range(max_new_tokens):
        words = model.embeddings(tokens)
        state, context = model.step(words, state, keys, memory, mask[:, 0, 0])
        logits = model.head(model.read_out(state, words, context)).float()
        logits[:, list(suppress)] = -torch.inf
        tokens = logits.argmax(-1)
        ended |= tokens == model.config.eos_id
        if bool(ended.all()):
            break
        written.append(torch.where(ended, model.config.eos_id, tokens))
    columns = torch.stack(written, 1).tolist() if written else [[] for _ in sources]
    return [[t for t in row if t != model.config.eos_id] for row in columns]
