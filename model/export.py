"""`python -m model.export FOLDER OUT`: one of our models in a layout that the transformers library loads.

No class there is made for our models, but for the parts that ours are built from there is one that computes
the same: GPT-NeoX for a decoder, ESM for an encoder, Pegasus or Marian for a translator. What a class cannot
express is refused by name.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.adopted import AdoptedTokenizer
from model.checkpoint import CONFIG, WEIGHTS, CheckpointError, Folder
from model.config import TransformerConfig
from model.tokenizer import BOS, CLS, EOS, MASK, PAD, SEP, TOKENIZER_FILE, Tokenizer
from model.transformer import sinusoidal_table

Tensors = dict[str, Tensor]

# Parts that every class takes as they come; each of the others must be as a class has it.
_FREE = {
    *("architecture", "vocab_size", "d_model", "n_heads", "d_ff", "n_encoder_layers", "n_decoder_layers"),
    *("max_len", "dropout", "norm_eps", "languages", "labels", "nsp_head", "pool_activation"),
    "length_penalty",
    "round_trip",
    *("example_weight", "example_reach", "example_offset", "example_temperature"),
    "repetition_penalty",
    *("pad_id", "bos_id", "eos_id", "mask_id", "cls_id", "sep_id"),
}
# The layers of the Bart family, Marian and Pegasus among them.
BART_LAYER = (
    ("attention.q_proj", "self_attn.q_proj"),
    ("attention.k_proj", "self_attn.k_proj"),
    ("attention.v_proj", "self_attn.v_proj"),
    ("attention.out_proj", "self_attn.out_proj"),
    ("add_attention.norm", "self_attn_layer_norm"),
    ("feed_forward.up", "fc1"),
    ("feed_forward.down", "fc2"),
    ("add_feed_forward.norm", "final_layer_norm"),
)
BART_CROSS = (
    ("cross_attention.q_proj", "encoder_attn.q_proj"),
    ("cross_attention.k_proj", "encoder_attn.k_proj"),
    ("cross_attention.v_proj", "encoder_attn.v_proj"),
    ("cross_attention.out_proj", "encoder_attn.out_proj"),
    ("add_cross.norm", "encoder_attn_layer_norm"),
)
_NEOX = (
    ("attention.out_proj", "attention.dense"),
    ("add_attention.norm", "input_layernorm"),
    ("add_feed_forward.norm", "post_attention_layernorm"),
    ("feed_forward.up", "mlp.dense_h_to_4h"),
    ("feed_forward.down", "mlp.dense_4h_to_h"),
)
_ESM = (
    ("attention.q_proj", "attention.self.query"),
    ("attention.k_proj", "attention.self.key"),
    ("attention.v_proj", "attention.self.value"),
    ("attention.out_proj", "attention.output.dense"),
    ("add_attention.norm", "attention.LayerNorm"),
    ("feed_forward.up", "intermediate.dense"),
    ("feed_forward.down", "output.dense"),
    ("add_feed_forward.norm", "LayerNorm"),
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


class ExportError(Exception):
    """A model that no class of the library computes; the message says what of it."""


def export(source: Path, target: Path) -> str:
    """Write a folder in the other layout; returns the name of the class that loads it.

    Raises `CheckpointError` or `ExportError`.
    """
    folder = Folder(source)
    if not folder.is_own or folder.adapter:
        raise ExportError(f"{source}: only whole models in this project's own layout are exported")
    tokenizer = folder.tokenizer()
    if isinstance(tokenizer, AdoptedTokenizer):
        raise ExportError(f"{source}: came from that library, and its tokenizer is not ours to rewrite")
    config = folder.config
    if config.architecture not in _MAKERS:
        raise ExportError(f"architecture: a {config.architecture} has no counterpart that is exported")
    tensors = {name: p.detach() for name, p in folder.model("cpu", torch.float32).named_parameters()}
    values, renamed = _MAKERS[config.architecture](config, tensors)
    target.mkdir(parents=True)
    shared = {"vocab_size": config.vocab_size, "pad_token_id": config.pad_id, "dtype": "float32"}
    _write(target / CONFIG, shared | values)
    save_file({k: t.contiguous() for k, t in renamed.items()}, target / WEIGHTS, metadata={"format": "pt"})
    _write(target / TOKENIZER_FILE, _tokenizer(tokenizer, config))
    _write(target / "tokenizer_config.json", _tokenizer_config(config))
    return str(values["architectures"][0])


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(config: TransformerConfig, name: str, **wanted: object) -> None:
    """Every part but the free ones is the usual one, or as wanted here. Raises `ExportError`."""
    for part in fields(TransformerConfig):
        if part.name in _FREE or part.default is part.default_factory is MISSING:
            continue
        usual = part.default if part.default_factory is MISSING else part.default_factory()
        value, allowed = getattr(config, part.name), wanted.get(part.name, usual)
        if value != allowed and value not in (allowed if isinstance(allowed, set) else ()):
            raise ExportError(f"{part.name} is {value!r}, but {name} can do only {allowed!r}")


def _moved(tensors: Tensors, ours: str, theirs: str) -> Tensors:
    return {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")}


def _layers(tensors: Tensors, names: tuple[tuple[str, str], ...], ours: str, theirs: str, n: int) -> Tensors:
    """The parts of n layers, whose numbers follow the names."""
    moved: Tensors = {}
    for i in range(n):
        for own, other in names:
            moved |= _moved(tensors, f"{ours}.{i}.{own}", f"{theirs}.{i}.{other}")
    return moved


def _decoder(config: TransformerConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """GPT-NeoX: rotary over whole heads, norms before the sub-layers, one residual after the other.

    Input and output embedding are two matrices there, because ours scales one of them.
    """
    _check(
        config, "GPT-NeoX", positions="rotary", activation=set(_ACTIVATIONS), rotary_base=config.rotary_base
    )
    n, embedding = config.n_decoder_layers, tensors["embeddings.tokens.weight"]
    renamed = {
        "gpt_neox.embed_in.weight": embedding * math.sqrt(config.d_model),
        "embed_out.weight": embedding,
        **_moved(tensors, "decoder.norm", "gpt_neox.final_layer_norm"),
        **_layers(tensors, _NEOX, "decoder.blocks", "gpt_neox.layers", n),
    }
    for i in range(n):
        for kind in ("weight", "bias"):
            parts = [tensors[f"decoder.blocks.{i}.attention.{name}_proj.{kind}"] for name in "qkv"]
            heads = [part.reshape(config.n_heads, config.head_dim, *part.shape[1:]) for part in parts]
            fused = torch.stack(heads, dim=1).flatten(0, 2)  # head by head: query, key, value
            renamed[f"gpt_neox.layers.{i}.attention.query_key_value.{kind}"] = fused
    values = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": config.d_model,
        "num_hidden_layers": n,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": _ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_len,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": config.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": 1.0,
        },
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }
    return values, renamed


def _encoder(config: TransformerConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """ESM: rotary, norms before the sub-layers, a masked-token head with two matrices of embeddings.

    It has no segments, so what ours adds for the first of them is added to the tokens, and no
    next-sentence head, so that one is left behind.
    """
    _check(config, "ESM", positions="rotary", n_segments={0, config.n_segments})
    embedding, n = tensors["embeddings.tokens.weight"], config.n_encoder_layers
    inputs = embedding * math.sqrt(config.d_model)
    if config.n_segments:
        inputs = inputs + tensors["embeddings.segments.weight"][0]
    renamed = {
        "esm.embeddings.word_embeddings.weight": inputs,
        "lm_head.decoder.weight": embedding,
        "lm_head.bias": tensors["mlm_head.bias"],
        "esm.rotary_embeddings.inv_freq": config.rotary_base
        ** -(torch.arange(0, config.head_dim, 2) / config.head_dim),
        "esm.contact_head.regression.weight": torch.zeros(1, n * config.n_heads),  # of proteins
        "esm.contact_head.regression.bias": torch.zeros(1),
        **_moved(tensors, "mlm_head.transform", "lm_head.dense"),
        **_moved(tensors, "mlm_head.norm", "lm_head.layer_norm"),
        **_moved(tensors, "encoder.norm", "esm.encoder.emb_layer_norm_after"),
        **_layers(tensors, _ESM, "encoder.blocks", "esm.encoder.layer", n),
    }
    values = {
        "model_type": "esm",
        "architectures": ["EsmForMaskedLM"],
        "hidden_size": config.d_model,
        "num_hidden_layers": n,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_len,
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "rotary",
        "rope_theta": config.rotary_base,
        "emb_layer_norm_before": False,
        "token_dropout": False,
        "tie_word_embeddings": False,
        "mask_token_id": config.mask_id,
    }
    return values, renamed


def _translator(config: TransformerConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Pegasus, with norms before the sub-layers, or Marian, with norms after them.

    Both read their waves from the file, so that ours may keep their order.
    """
    name = "Pegasus" if config.norm_first else "Marian"
    _check(config, name, norm_first={True, False}, activation=set(_ACTIVATIONS))
    if len(config.languages) < 1:
        raise ExportError("languages: there is none for a translation to begin with")
    embedding, table = tensors["embeddings.tokens.weight"], sinusoidal_table(config.max_len, config.d_model)
    renamed = {"model.shared.weight": embedding, "final_logits_bias": torch.zeros(1, config.vocab_size)}
    for side, n in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        names = BART_LAYER + (BART_CROSS if side == "decoder" else ())
        renamed |= _layers(tensors, names, f"{side}.blocks", f"model.{side}.layers", n)
        renamed[f"model.{side}.embed_positions.weight"] = table.clone()
        if config.norm_first:
            renamed |= _moved(tensors, f"{side}.norm", f"model.{side}.layer_norm")
    values = {
        "model_type": name.lower(),
        "architectures": ["PegasusForConditionalGeneration" if config.norm_first else "MarianMTModel"],
        "d_model": config.d_model,
        "encoder_layers": config.n_encoder_layers,
        "decoder_layers": config.n_decoder_layers,
        "encoder_attention_heads": config.n_heads,
        "decoder_attention_heads": config.n_heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.d_ff,
        "max_position_embeddings": config.max_len,
        "activation_function": _ACTIVATIONS[config.activation],
        "scale_embedding": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "eos_token_id": config.eos_id,
        "bos_token_id": config.bos_id,
        "forced_eos_token_id": None,
        # The language of the target begins it: give another as decoder_start_token_id to `generate`.
        "decoder_start_token_id": list(config.languages.values())[-1],
    }
    return values, renamed


_MAKERS: dict[str, Callable[[TransformerConfig, Tensors], tuple[dict[str, Any], Tensors]]] = {
    "causal_lm": _decoder,
    "masked_lm": _encoder,
    "translator": _translator,
}


def _tokenizer(tokenizer: Tokenizer, config: TransformerConfig) -> dict[str, Any]:
    """tokenizer.json that puts around a text what the model wants, but for a translator's first two."""
    values: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    for token in values["added_tokens"]:
        token["lstrip"] = token["content"] == MASK  # the space before a mask is the word's
    single = {
        "causal_lm": [BOS, "A"],
        "masked_lm": [CLS, "A", SEP],
        "translator": ["A", EOS],
    }[config.architecture]
    pair = [*single, "B", *([SEP] if config.architecture == "masked_lm" else [])]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": list(_template(single)),
        "pair": list(_template(pair)),
        "special_tokens": {
            name: {"id": name, "ids": [token_id], "tokens": [name]}
            for name, token_id in ((n, tokenizer.backend.token_to_id(n)) for n in (BOS, EOS, CLS, SEP))
        },
    }
    return values


def _template(parts: list[str]) -> Iterator[dict[str, Any]]:
    for part in parts:
        kind = "Sequence" if part in ("A", "B") else "SpecialToken"
        yield {kind: {"id": part, "type_id": 0}}


def _tokenizer_config(config: TransformerConfig) -> dict[str, Any]:
    names = {"pad": PAD, "bos": BOS, "eos": EOS, "mask": MASK, "cls": CLS, "sep": SEP}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{role}_token": name for role, name in names.items()},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m model.export", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model in our own layout")
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    chosen = parser.parse_args(arguments)
    if chosen.out.exists():
        sys.exit(f"{chosen.out}: is there already")
    try:
        name = export(chosen.folder, chosen.out)
    except (CheckpointError, ExportError) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{chosen.out}: loads as {name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
