"""The models: composition only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.block import init_weights
from model.cache import KVCache
from model.config import TransformerConfig
from model.heads import ClassificationHead, LMHead, MLMHead, NSPHead
from model.masks import causal_mask, padding_mask
from model.transformer import Decoder, Embeddings, Encoder


class Translator(nn.Module):
    """Encoder and decoder with cross-attention (Vaswani et al. 2017); tokens share one embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.embeddings.apply(init_weights)
        self.encoder = Encoder(config, self.embeddings)
        own = Embeddings(config, self.embeddings.tokens) if config.own_positions else self.embeddings
        self.decoder = Decoder(config, own, cross=True)
        self.head = LMHead(config, self.embeddings, bias=config.head_bias)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """src (B, S) -> memory (B, S, D) and its mask (B, 1, 1, S)."""
        mask = padding_mask(src, self.config.pad_id)
        return self.encoder(src, mask), mask

    def decode(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """tgt (B, T), teacher-forced -> hidden states (B, T, D)."""
        positions = torch.arange(tgt.size(1), device=tgt.device).expand_as(tgt)
        kv = self.decoder.project_memory(memory)
        mask = causal_mask(tgt.size(1), tgt.device)
        hidden: Tensor = self.decoder(tgt, positions, mask, memory=kv, memory_mask=memory_mask)
        return hidden

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """src (B, S), tgt (B, T) -> logits (B, T, V)."""
        logits: Tensor = self.head(self.decode(tgt, *self.encode(src)))
        return logits


class MaskedLM(nn.Module):
    """BERT: an encoder with a masked-token head and a next-sentence head (Devlin et al. 2018).

    A configuration may leave out one of the heads; then there is no such attribute, and `forward`, which
    runs both, is not for this model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.embeddings.apply(init_weights)
        self.encoder = Encoder(config, self.embeddings)
        if config.mlm_head:
            self.mlm_head = MLMHead(config, self.embeddings)
            self.mlm_head.transform.apply(init_weights)
        if config.nsp_head:
            self.nsp_head = NSPHead(config)
            self.nsp_head.apply(init_weights)

    def encode(self, token_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """token_ids and segment_ids (B, S) -> hidden states (B, S, D)."""
        hidden: Tensor = self.encoder(token_ids, padding_mask(token_ids, self.config.pad_id), segment_ids)
        return hidden

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, S) -> masked-token logits (B, S, V) and next-sentence logits (B, 2).

        With `slots` (B, M), the positions that matter, only those are projected: (B, M, V).
        """
        hidden = self.encode(token_ids, segment_ids)
        nsp = self.nsp_head(hidden)
        if slots is not None:
            hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.size(-1)))
        return self.mlm_head(hidden), nsp


class CausalLM(nn.Module):
    """GPT: the decoder alone, without encoder-decoder attention (Radford et al. 2018)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.embeddings.apply(init_weights)
        self.decoder = Decoder(config, self.embeddings, cross=False)
        self.head = LMHead(config, self.embeddings, bias=config.head_bias)

    def hidden(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """token_ids (B, T) -> hidden states (B, T, D), causal unless a mask (B, 1, T, T) is given."""
        positions = torch.arange(token_ids.size(1), device=token_ids.device).expand_as(token_ids)
        mask = causal_mask(token_ids.size(1), token_ids.device) if mask is None else mask
        out: Tensor = self.decoder(token_ids, positions, mask)
        return out

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """token_ids (B, T) -> logits (B, T, V)."""
        logits: Tensor = self.head(self.hidden(token_ids, mask))
        return logits


class Classifier(nn.Module):
    """An encoder with a class for the whole text at its first position (Devlin et al. 2018, section 3.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.embeddings.apply(init_weights)
        self.encoder = Encoder(config, self.embeddings)
        self.head = ClassificationHead(config, len(config.labels))
        self.head.apply(init_weights)

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """token_ids and segment_ids (B, S) -> logits (B, labels)."""
        mask = padding_mask(token_ids, self.config.pad_id)
        logits: Tensor = self.head(self.encoder(token_ids, mask, segment_ids))
        return logits


Model = Translator | MaskedLM | CausalLM | Classifier
_MODELS: dict[str, type[Translator] | type[MaskedLM] | type[CausalLM] | type[Classifier]] = {
    "translator": Translator,
    "masked_lm": MaskedLM,
    "causal_lm": CausalLM,
    "classifier": Classifier,
}


def build_model(config: TransformerConfig) -> Model:
    """The model that a configuration describes, with fresh weights."""
    return _MODELS[config.architecture](config)


def make_cache(
    config: TransformerConfig, n_slots: int, max_len: int, device: torch.device | str, dtype: torch.dtype
) -> KVCache:
    """A cache that fits a model's decoder (its self-attention, or its projected memory)."""
    return KVCache(
        config.n_decoder_layers,
        n_slots,
        config.kv_heads,
        max_len,
        config.head_dim,
        device=device,
        dtype=dtype,
    )
