"""Translators: an encoder, and a decoder that attends to it."""

from __future__ import annotations

from typing import Any

from model.config import ConfigError, TransformerConfig
from model.families import older
from model.families.decoders import end_ids
from model.families.family import ACTIVATIONS, ANGLES, ANGLES_WITH_MASK, Class, Family, Text, table
from model.families.given import Given

# They all name their layers alike.
_LAYERS = table("""
    model.shared.weight                                embeddings.tokens.weight
    model.encoder.embed_tokens.weight                  embeddings.tokens.weight
    model.decoder.embed_tokens.weight                  embeddings.tokens.weight
    lm_head.weight                                     head.tokens.weight
    model.encoder.layers.{}.self_attn.q_proj.*         encoder.blocks.{}.attention.q_proj.*
    model.encoder.layers.{}.self_attn.k_proj.*         encoder.blocks.{}.attention.k_proj.*
    model.encoder.layers.{}.self_attn.v_proj.*         encoder.blocks.{}.attention.v_proj.*
    model.encoder.layers.{}.self_attn.out_proj.*       encoder.blocks.{}.attention.out_proj.*
    model.encoder.layers.{}.self_attn_layer_norm.*     encoder.blocks.{}.add_attention.norm.*
    model.encoder.layers.{}.fc1.*                      encoder.blocks.{}.feed_forward.up.*
    model.encoder.layers.{}.fc2.*                      encoder.blocks.{}.feed_forward.down.*
    model.encoder.layers.{}.final_layer_norm.*         encoder.blocks.{}.add_feed_forward.norm.*
    model.decoder.layers.{}.self_attn.q_proj.*         decoder.blocks.{}.attention.q_proj.*
    model.decoder.layers.{}.self_attn.k_proj.*         decoder.blocks.{}.attention.k_proj.*
    model.decoder.layers.{}.self_attn.v_proj.*         decoder.blocks.{}.attention.v_proj.*
    model.decoder.layers.{}.self_attn.out_proj.*       decoder.blocks.{}.attention.out_proj.*
    model.decoder.layers.{}.self_attn_layer_norm.*     decoder.blocks.{}.add_attention.norm.*
    model.decoder.layers.{}.encoder_attn.q_proj.*      decoder.blocks.{}.cross_attention.q_proj.*
    model.decoder.layers.{}.encoder_attn.k_proj.*      decoder.blocks.{}.cross_attention.k_proj.*
    model.decoder.layers.{}.encoder_attn.v_proj.*      decoder.blocks.{}.cross_attention.v_proj.*
    model.decoder.layers.{}.encoder_attn.out_proj.*    decoder.blocks.{}.cross_attention.out_proj.*
    model.decoder.layers.{}.encoder_attn_layer_norm.*  decoder.blocks.{}.add_cross.norm.*
    model.decoder.layers.{}.fc1.*                      decoder.blocks.{}.feed_forward.up.*
    model.decoder.layers.{}.fc2.*                      decoder.blocks.{}.feed_forward.down.*
    model.decoder.layers.{}.final_layer_norm.*         decoder.blocks.{}.add_feed_forward.norm.*
""")
_LAST_NORMS = table("""
    model.encoder.layer_norm.*                         encoder.norm.*
    model.decoder.layer_norm.*                         decoder.norm.*
""")
_MARIAN = _LAYERS | table("""
    model.encoder.embed_positions.weight               -
    model.decoder.embed_positions.weight               -
    final_logits_bias                                  head.bias  @flattened
""")
_M2M100 = (
    _LAYERS
    | _LAST_NORMS
    | table("""
    model.encoder.embed_positions.weights              -
    model.decoder.embed_positions.weights              -
""")
)
_MBART = (
    _LAYERS
    | _LAST_NORMS
    | table("""
    model.encoder.embed_positions.weight               embeddings.positions.embedding.weight
    model.decoder.embed_positions.weight               decoder.embeddings.positions.embedding.weight
    model.encoder.layernorm_embedding.*                embeddings.norm.*
    model.decoder.layernorm_embedding.*                decoder.embeddings.norm.*
    final_logits_bias                                  head.bias  @flattened
""")
)


def _translator(given: Given, **changes: Any) -> TransformerConfig:
    start = given.id("decoder_start_token_id")
    if start is None:
        raise ConfigError("missing key: decoder_start_token_id")
    if len(given.ids("eos_token_id")) > 1:
        raise ConfigError("eos_token_id: a translator with several ends is not supported")
    n_heads, d_ff = given.whole("encoder_attention_heads"), given.whole("encoder_ffn_dim")
    vocab_size = given.whole("vocab_size")
    given.demand(
        decoder_attention_heads=n_heads,
        decoder_ffn_dim=d_ff,
        decoder_vocab_size=vocab_size,
        share_encoder_decoder_embeddings=True,
    )
    values = {
        "architecture": "translator",
        "vocab_size": vocab_size,
        "d_model": given.whole("d_model"),
        "n_heads": n_heads,
        "d_ff": d_ff,
        "n_encoder_layers": given.whole("encoder_layers"),
        "n_decoder_layers": given.whole("decoder_layers"),
        "max_len": given.whole("max_position_embeddings", 1024),
        "dropout": 0.0,
        "activation": given.choice("activation_function", ACTIVATIONS, "gelu"),
        "scale_embeddings": given.flag("scale_embedding", False),
        "tied": given.flag("tie_word_embeddings", True),
        "start_id": start,
    }
    return TransformerConfig.from_dict(values | end_ids(given) | changes)


def _marian(given: Given) -> TransformerConfig:
    given.demand(normalize_before=False, normalize_embedding=False, add_final_layer_norm=False)
    given.demand(static_position_embeddings=True, add_bias_logits=False)
    return _translator(given, norm_first=False, positions="sinusoidal_split", head_bias=True)


def _m2m100(given: Given) -> TransformerConfig:
    return _translator(given, positions="sinusoidal_tensor2tensor", position_offset=2)


def _mbart(given: Given) -> TransformerConfig:
    return _translator(
        given, positions="learned", position_offset=2, own_positions=True, embedding_norm=True, head_bias=True
    )


TRANSLATORS = {
    "marian": Family(
        {"MarianMTModel": Class(_marian, _MARIAN)},
        "model.",
        Text(older.sentencepiece_of_source, ANGLES, r">>(.+)<<", "target"),
    ),
    "m2m_100": Family(
        {"M2M100ForConditionalGeneration": Class(_m2m100, _M2M100)},
        "model.",
        Text(
            older.sentencepiece_beside_words,
            ANGLES_WITH_MASK,
            r"__([a-z]{2,3})__|([a-z]{3}_[A-Z][a-z]{3})",
            "source",
            forces_language=True,
        ),
    ),
    "mbart": Family(
        {"MBartForConditionalGeneration": Class(_mbart, _MBART)},
        "model.",
        Text(
            older.sentencepiece_of_fifty,
            ANGLES_WITH_MASK,
            "([a-z]{2}_[A-Z]{2})",
            "source",
            forces_language=True,
            refused=frozenset({"MBartTokenizer", "MBartTokenizerFast"}),  # of the first: languages come last
        ),
    ),
}
