"""Decoders that write on from a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from model.config import ConfigError, TransformerConfig
from model.families import older
from model.families.family import ACTIVATIONS, ANGLES, Class, Family, Text, table
from model.families.given import Given

_GPT2 = table("""
    transformer.wte.weight                  embeddings.tokens.weight
    transformer.wpe.weight                  embeddings.positions.embedding.weight
    transformer.h.{}.ln_1.*                 decoder.blocks.{}.add_attention.norm.*
    transformer.h.{}.attn.c_attn.*          decoder.blocks.{}.attention.q_proj.*  decoder.blocks.{}.attention.k_proj.*  decoder.blocks.{}.attention.v_proj.*  @transposed
    transformer.h.{}.attn.c_proj.*          decoder.blocks.{}.attention.out_proj.*  @transposed
    transformer.h.{}.attn.bias              -
    transformer.h.{}.attn.masked_bias       -
    transformer.h.{}.ln_2.*                 decoder.blocks.{}.add_feed_forward.norm.*
    transformer.h.{}.mlp.c_fc.*             decoder.blocks.{}.feed_forward.up.*  @transposed
    transformer.h.{}.mlp.c_proj.*           decoder.blocks.{}.feed_forward.down.*  @transposed
    transformer.ln_f.*                      decoder.norm.*
    lm_head.weight                          head.tokens.weight
""")  # noqa: E501

_LLAMA = table("""
    model.embed_tokens.weight                     embeddings.tokens.weight
    model.layers.{}.input_layernorm.weight        decoder.blocks.{}.add_attention.norm.weight
    model.layers.{}.self_attn.q_proj.*            decoder.blocks.{}.attention.q_proj.*
    model.layers.{}.self_attn.k_proj.*            decoder.blocks.{}.attention.k_proj.*
    model.layers.{}.self_attn.v_proj.*            decoder.blocks.{}.attention.v_proj.*
    model.layers.{}.self_attn.o_proj.*            decoder.blocks.{}.attention.out_proj.*
    model.layers.{}.self_attn.q_norm.weight       decoder.blocks.{}.attention.q_norm.weight
    model.layers.{}.self_attn.k_norm.weight       decoder.blocks.{}.attention.k_norm.weight
    model.layers.{}.self_attn.rotary_emb.inv_freq -
    model.layers.{}.post_attention_layernorm.weight  decoder.blocks.{}.add_feed_forward.norm.weight
    model.layers.{}.mlp.gate_proj.*               decoder.blocks.{}.feed_forward.gate.*
    model.layers.{}.mlp.up_proj.*                 decoder.blocks.{}.feed_forward.up.*
    model.layers.{}.mlp.down_proj.*               decoder.blocks.{}.feed_forward.down.*
    model.norm.weight                             decoder.norm.weight
    lm_head.weight                                head.tokens.weight
""")


def _gpt2(given: Given) -> TransformerConfig:
    given.demand(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d_model = given.whole("n_embd")
    return TransformerConfig(
        architecture="causal_lm",
        vocab_size=given.whole("vocab_size"),
        d_model=d_model,
        n_heads=given.whole("n_head"),
        d_ff=given.whole("n_inner", 4 * d_model),
        n_decoder_layers=given.whole("n_layer"),
        max_len=given.whole("n_positions", given.get("n_ctx", 1024)),
        dropout=0.0,
        norm_eps=given.number("layer_norm_epsilon", 1e-5),
        activation=given.choice("activation_function", ACTIVATIONS, "gelu_new"),
        positions="learned",
        scale_embeddings=False,
        tied=given.flag("tie_word_embeddings", True),
        **end_ids(given),
    )


def _llama(given: Given) -> TransformerConfig:
    given.demand(partial_rotary_factor=1.0)
    n_heads = given.whole("num_attention_heads")
    attention_bias = given.flag("attention_bias", False)
    values: dict[str, Any] = {
        "architecture": "causal_lm",
        "vocab_size": given.whole("vocab_size"),
        "d_model": given.whole("hidden_size"),
        "n_heads": n_heads,
        "n_kv_heads": given.whole("num_key_value_heads", n_heads),
        "d_head": given.whole("head_dim", given.whole("hidden_size") // n_heads),
        "d_ff": given.whole("intermediate_size"),
        "n_decoder_layers": given.whole("num_hidden_layers"),
        "max_len": given.whole("max_position_embeddings", 2048),
        "dropout": 0.0,
        "norm": "rms",
        "norm_eps": given.number("rms_norm_eps", 1e-6),
        "activation": given.choice("hidden_act", ACTIVATIONS, "silu"),
        "gated": True,
        "positions": "rotary",
        "bias": False,
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "ffn_bias": given.flag("mlp_bias", False),
        "scale_embeddings": False,
        "tied": given.flag("tie_word_embeddings", False),
    }
    return TransformerConfig.from_dict(values | rotary(given) | end_ids(given))


def _changed(config: TransformerConfig, **changes: object) -> TransformerConfig:
    return TransformerConfig.from_dict(config.to_dict() | changes)


def _mistral(given: Given) -> TransformerConfig:
    config = _llama(given)
    return _changed(config, window=_narrow(given, config))


def _qwen2(given: Given) -> TransformerConfig:
    return _changed(_llama(given), qkv_bias=True, out_bias=False, **_layered_window(given))


def _qwen3(given: Given) -> TransformerConfig:
    return _changed(
        _llama(given), d_head=given.whole("head_dim", 128), qk_norm=True, **_layered_window(given)
    )


def _narrow(given: Given, config: TransformerConfig) -> int | None:
    """A window; None where it is as wide as the context."""
    window = given.whole("sliding_window", config.max_len)
    return window if window < config.max_len else None


def _layered_window(given: Given) -> dict[str, Any]:
    """A window that some of the layers have, from one of them on."""
    n_layers = given.whole("num_hidden_layers")
    if not given.flag("use_sliding_window", False):
        given.demand(layer_types=["full_attention"] * n_layers)
        return {}
    n_full = given.whole("max_window_layers", n_layers)
    kinds = given.get("layer_types")
    if isinstance(kinds, list):
        n_full = kinds.count("full_attention")
    n_full = min(n_full, n_layers)
    given.demand(layer_types=["full_attention"] * n_full + ["sliding_attention"] * (n_layers - n_full))
    if n_full == n_layers or given.whole("sliding_window") >= given.whole("max_position_embeddings"):
        return {}
    return {"window": given.whole("sliding_window"), "n_full_layers": n_full}


def end_ids(given: Given) -> dict[str, Any]:
    """The ids that every model has; what fills rows is never read where there is no such token."""
    eos = given.ids("eos_token_id")
    if not eos:
        raise ConfigError("missing key: eos_token_id")
    pad = given.id("pad_token_id")
    return {
        "pad_id": 0 if pad is None or pad < 0 else pad,
        "bos_id": given.id("bos_token_id"),
        "eos_id": eos[0],
        "more_eos_ids": eos[1:],
        "mask_id": None,
        "cls_id": None,
        "sep_id": None,
    }


def rotary(given: Given) -> dict[str, Any]:
    """Base and scaling, as they stand in one object or in two places, by the age of the file."""
    scaling = given.inner("rope_parameters" if "rope_parameters" in given else "rope_scaling")
    base = scaling.number("rope_theta", given.number("rope_theta", 10_000.0))
    kind = scaling.text("rope_type", scaling.get("type", "default"))
    scaling.demand(partial_rotary_factor=1.0)
    readers: dict[str, Callable[[Given, Given], dict[str, float]]] = {
        "default": lambda *_: {},
        "linear": _linear,
        "llama3": _llama3,
        "yarn": _yarn,
    }
    if kind not in readers:
        raise ConfigError(f"rope_type: {kind!r} is not supported; there are {', '.join(readers)}")
    return {
        "rotary_base": base,
        "rotary_scaling": "none" if kind == "default" else kind,
        "rotary_factors": readers[kind](scaling, given),
    }


def _linear(scaling: Given, _: Given) -> dict[str, float]:
    return {"factor": scaling.number("factor")}


def _llama3(scaling: Given, given: Given) -> dict[str, float]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {name: scaling.number(name) for name in names} | _original(scaling, given)


def _yarn(scaling: Given, given: Given) -> dict[str, float]:
    scaling.demand(truncate=True)
    original = _original(scaling, given)
    default = given.number("max_position_embeddings", 2048) / original["original_max_len"]
    factor = scaling.number("factor", default)

    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    usual = amplitude(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        usual = amplitude(scaling.number("mscale")) / amplitude(scaling.number("mscale_all_dim"))
    return {
        "factor": factor,
        "beta_fast": scaling.number("beta_fast", 32.0),
        "beta_slow": scaling.number("beta_slow", 1.0),
        "attention_factor": scaling.number("attention_factor", usual),
    } | original


def _original(scaling: Given, given: Given) -> dict[str, float]:
    longest = given.number("max_position_embeddings", 2048)
    return {"original_max_len": scaling.number("original_max_position_embeddings", longest)}


_END_OF_TEXT = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
_PIECES = Text(older.sentencepiece_decoder, ANGLES)
_RUNS = Text(older.bytes_of_runs, {"eos": "<|endoftext|>", "pad": "<|endoftext|>"})

DECODERS = {
    "gpt2": Family(
        {"GPT2LMHeadModel": Class(_gpt2, _GPT2)}, "transformer.", Text(older.bytes_of_words, _END_OF_TEXT)
    ),
    "llama": Family({"LlamaForCausalLM": Class(_llama, _LLAMA)}, "model.", _PIECES),
    "mistral": Family({"MistralForCausalLM": Class(_mistral, _LLAMA)}, "model.", _PIECES),
    "qwen2": Family({"Qwen2ForCausalLM": Class(_qwen2, _LLAMA)}, "model.", _RUNS),
    "qwen3": Family({"Qwen3ForCausalLM": Class(_qwen3, _LLAMA)}, "model.", _RUNS),
}
