"""This project's weights in the formats of its peers, so that all compute the same function.

Read from a folder's file, whose names are stable, not from a loaded model.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import WEIGHTS, load_config
from model.config import TransformerConfig
from model.export import BART_CROSS, BART_LAYER
from model.shortlist import Shortlist
from model.transformer import sinusoidal_table

Tensors = dict[str, Tensor]


# What a peer takes as it comes: sizes, ids, and the parts that are checked or chosen where they are used.
_FREE = {
    *(
        "vocab_size",
        "d_model",
        "n_heads",
        "d_ff",
        "n_encoder_layers",
        "n_decoder_layers",
        "max_len",
        "dropout",
    ),
    *("pad_id", "bos_id", "eos_id", "mask_id", "cls_id", "sep_id", "languages"),
    *("norm_first", "activation", "rotary_base"),
    *("repetition_penalty", "round_trip"),  # of the service's search, which is not what is compared
    "length_penalty",  # which a benchmark says itself
}


class CannotConvert(Exception):
    """A model that a peer cannot express; the message says what of it."""


def read_folder(folder: Path) -> tuple[TransformerConfig, Tensors]:
    """A folder's configuration and its weights in float32."""
    return load_config(folder), {name: t.float() for name, t in load_file(folder / WEIGHTS).items()}


def _check(config: TransformerConfig, **wanted: object) -> None:
    """Every part but the sizes is the default one, or the one that is wanted here."""
    for part in fields(TransformerConfig):
        if part.name in _FREE or (part.default is MISSING and part.name not in wanted):
            continue
        default = part.default if part.default_factory is MISSING else part.default_factory()
        value, allowed = getattr(config, part.name), wanted.get(part.name, default)
        if value != allowed:
            raise CannotConvert(f"{part.name} is {value!r}, the peer's model wants {allowed!r}")


def start_id(config: TransformerConfig) -> int:
    """The first token of every target in the benchmarks: into Korean where the model knows languages."""
    start = config.languages["ko"] if config.languages else config.bos_id
    if start is None:
        raise CannotConvert("no token begins a target")
    return start


# transformers


def transformers_model(folder: Path) -> Any:
    """A folder as GPT-NeoX, or as Marian or Pegasus; float32, ready for `generate`."""
    config, tensors = read_folder(folder)
    if config.architecture == "causal_lm":
        return _neox(config, tensors)
    return _marian_or_pegasus(config, tensors, start_id(config))


def _neox(config: TransformerConfig, tensors: Tensors) -> Any:
    """Rotary in halves over whole heads, pre-norm: GPT-NeoX, its residuals one after the other.

    The input embedding, with its scale, and the output embedding are two matrices there.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    _check(config, architecture="causal_lm", positions="rotary")
    if not config.norm_first:
        raise CannotConvert("GPT-NeoX has its norms before the sub-layers")
    peer = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_decoder_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=config.d_ff,
            hidden_act=config.activation,
            max_position_embeddings=config.max_len,
            layer_norm_eps=config.norm_eps,
            use_parallel_residual=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rotary_base,
                "partial_rotary_factor": 1.0,
            },
            bos_token_id=config.bos_id,
            eos_token_id=config.eos_id,
            pad_token_id=config.pad_id,
            tie_word_embeddings=False,
        )
    )
    embedding = tensors["embeddings.tokens.weight"]
    state = {
        "gpt_neox.embed_in.weight": embedding * math.sqrt(config.d_model),
        "lm_head.weight": embedding,
        **_renamed(tensors, "decoder.norm", "gpt_neox.final_layer_norm"),
    }
    for i in range(config.n_decoder_layers):
        ours, theirs = f"decoder.blocks.{i}", f"gpt_neox.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}.attention.{name}_proj.{kind}"] for name in "qkv"]
            # Head by head: query, key, value.
            heads = [part.reshape(config.n_heads, config.head_dim, *part.shape[1:]) for part in parts]
            state[f"{theirs}.attention.query_key_value.{kind}"] = torch.stack(heads, dim=1).flatten(0, 2)
        for name, peer_name in (
            ("attention.out_proj", "attention.dense"),
            ("add_attention.norm", "input_layernorm"),
            ("add_feed_forward.norm", "post_attention_layernorm"),
            ("feed_forward.up", "mlp.dense_h_to_4h"),
            ("feed_forward.down", "mlp.dense_4h_to_h"),
        ):
            state |= _renamed(tensors, f"{ours}.{name}", f"{theirs}.{peer_name}")
    peer.load_state_dict(state, strict=True)
    return peer.eval()


def _marian_or_pegasus(config: TransformerConfig, tensors: Tensors, start: int) -> Any:
    """Marian is the post-norm and Pegasus the pre-norm layout of the same names.

    Both add a table of positions, which is filled in this project's order of sines and cosines.
    """
    from transformers import MarianConfig, MarianMTModel, PegasusConfig, PegasusForConditionalGeneration

    _check(config, architecture="translator")
    values = {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "encoder_layers": config.n_encoder_layers,
        "decoder_layers": config.n_decoder_layers,
        "encoder_attention_heads": config.n_heads,
        "decoder_attention_heads": config.n_heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.d_ff,
        "max_position_embeddings": config.max_len,
        "activation_function": config.activation,
        "scale_embedding": True,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "bos_token_id": config.bos_id,
        "forced_eos_token_id": None,
        "decoder_start_token_id": start,
    }
    if config.norm_first:
        peer: Any = PegasusForConditionalGeneration(PegasusConfig(**values))
    else:
        peer = MarianMTModel(MarianConfig(**values, decoder_vocab_size=config.vocab_size))
    table = sinusoidal_table(config.max_len, config.d_model)
    embedding = tensors["embeddings.tokens.weight"]
    state = {
        name: embedding for name in peer.state_dict() if name.endswith(("shared.weight", "lm_head.weight"))
    }
    state["final_logits_bias"] = torch.zeros(1, config.vocab_size)
    for side, n_layers in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        state[f"model.{side}.embed_tokens.weight"] = embedding
        state[f"model.{side}.embed_positions.weight"] = table
        if config.norm_first:
            state |= _renamed(tensors, f"{side}.norm", f"model.{side}.layer_norm")
        for i in range(n_layers):
            for name, peer_name in BART_LAYER + (BART_CROSS if side == "decoder" else ()):
                state |= _renamed(
                    tensors, f"{side}.blocks.{i}.{name}", f"model.{side}.layers.{i}.{peer_name}"
                )
    peer.load_state_dict(state, strict=True)
    return peer.eval()


def _renamed(tensors: Tensors, ours: str, theirs: str) -> Tensors:
    return {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")}


# CTranslate2: tokens are the decimal numerals of the ids


def ctranslate2_folder(folder: Path, out: Path) -> Path:
    """Write a folder for CTranslate2, in float32: it quantises when it loads."""
    config, tensors = read_folder(folder)
    if config.architecture == "causal_lm":
        spec = _decoder_spec(config, tensors)
    else:
        spec = _translator_spec(config, tensors, start_id(config))
    spec.config.unk_token = str(config.pad_id)
    spec.config.bos_token, spec.config.eos_token = str(config.bos_id), str(config.eos_id)
    spec.config.layer_norm_epsilon = config.norm_eps
    out.mkdir(parents=True)
    shortlist = Shortlist.load(folder, config) if config.languages else None
    if shortlist is not None and "ko" in shortlist.tables:
        spec.register_vocabulary_mapping(str(vocabulary_map(shortlist, out / "map.txt")))
    spec.validate()
    spec.optimize()
    spec.save(str(out))
    return out


def vocabulary_map(shortlist: Shortlist, path: Path) -> Path:
    """A shortlist into Korean as CTranslate2 reads it: what is common, then what each token may become."""
    table = shortlist.tables["ko"]
    with path.open("w", encoding="utf-8") as file:
        print("", " ".join(map(str, table.common)), sep="\t", file=file)
        for token, (start, stop) in enumerate(pairwise(table.starts)):
            may_become = sorted({token, *table.likely[start:stop].tolist()})  # as ours: names are copied
            print(token, " ".join(map(str, may_become)), sep="\t", file=file)
    return path


def _activation(config: TransformerConfig) -> Any:
    from ctranslate2.specs import common_spec

    names = {"relu": "RELU", "gelu": "GELU", "silu": "SWISH"}
    return common_spec.Activation[names[config.activation]]


def _decoder_spec(config: TransformerConfig, tensors: Tensors) -> Any:
    from ctranslate2.specs import transformer_spec

    _check(config, architecture="causal_lm", positions="rotary")
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_decoder_layers,
        config.n_heads,
        pre_norm=config.norm_first,
        activation=_activation(config),
        rotary_dim=config.head_dim,
        rotary_interleave=False,
        rotary_base=config.rotary_base,
    )
    _fill_stack(spec.decoder, tensors, "decoder", config)
    spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
    return spec


def _translator_spec(config: TransformerConfig, tensors: Tensors, start: int) -> Any:
    from ctranslate2.specs import transformer_spec

    rotary = config.positions == "rotary"
    _check(config, architecture="translator", positions="rotary" if rotary else "sinusoidal")
    n_layers = {"encoder": config.n_encoder_layers, "decoder": config.n_decoder_layers}
    makers = {
        "encoder": transformer_spec.TransformerEncoderSpec,
        "decoder": transformer_spec.TransformerDecoderSpec,
    }
    turning = {"rotary_dim": config.head_dim, "rotary_interleave": False, "rotary_base": config.rotary_base}
    stacks = {
        side: make(
            n_layers[side],
            config.n_heads,
            pre_norm=config.norm_first,
            activation=_activation(config),
            **(turning if rotary else {}),
        )
        for side, make in makers.items()
    }
    spec = transformer_spec.TransformerSpec(**stacks)
    table = sinusoidal_table(config.max_len, config.d_model).numpy()
    for side, stack in stacks.items():
        if not rotary:
            stack.position_encodings.encodings = table
        _fill_stack(stack, tensors, side, config)
    vocabulary = [str(i) for i in range(config.vocab_size)]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    spec.config.decoder_start_token = str(start)
    return spec


def _fill_stack(stack: Any, tensors: Tensors, side: str, config: TransformerConfig) -> None:
    embedding = tensors["embeddings.tokens.weight"].numpy()
    embeddings = stack.embeddings[0] if side == "encoder" else stack.embeddings
    embeddings.weight = embedding
    stack.scale_embeddings = True  # times √D
    if side == "decoder":
        stack.projection.weight = embedding
    if config.norm_first:
        _norm(stack.layer_norm, tensors, f"{side}.norm")
    for i, layer in enumerate(stack.layer):
        block = f"{side}.blocks.{i}"
        _linears(layer.self_attention.linear[0], tensors, *(f"{block}.attention.{n}_proj" for n in "qkv"))
        _linears(layer.self_attention.linear[1], tensors, f"{block}.attention.out_proj")
        _norm(layer.self_attention.layer_norm, tensors, f"{block}.add_attention.norm")
        if f"{block}.cross_attention.q_proj.weight" in tensors:
            cross = f"{block}.cross_attention"
            _linears(layer.attention.linear[0], tensors, f"{cross}.q_proj")
            _linears(layer.attention.linear[1], tensors, f"{cross}.k_proj", f"{cross}.v_proj")
            _linears(layer.attention.linear[2], tensors, f"{cross}.out_proj")
            _norm(layer.attention.layer_norm, tensors, f"{block}.add_cross.norm")
        _linears(layer.ffn.linear_0, tensors, f"{block}.feed_forward.up")
        _linears(layer.ffn.linear_1, tensors, f"{block}.feed_forward.down")
        _norm(layer.ffn.layer_norm, tensors, f"{block}.add_feed_forward.norm")


def _linears(spec: Any, tensors: Tensors, *names: str) -> None:
    """One linear layer, or several with the same input as one."""
    spec.weight = torch.cat([tensors[f"{name}.weight"] for name in names]).numpy()
    spec.bias = torch.cat([tensors[f"{name}.bias"] for name in names]).numpy()


def _norm(spec: Any, tensors: Tensors, name: str) -> None:
    spec.gamma, spec.beta = tensors[f"{name}.weight"].numpy(), tensors[f"{name}.bias"].numpy()
