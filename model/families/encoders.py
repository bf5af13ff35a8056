"""Encoders that fill masks, tell whether a sentence follows, or name a text's class."""

from __future__ import annotations

from typing import Any

from model.config import ConfigError, TransformerConfig
from model.families import older
from model.families.family import ACTIVATIONS, ANGLES_WITH_MASK, WORDS, Class, Family, Text, table
from model.families.given import Given

# BERT and RoBERTa name their encoder alike, but for the first word.
_ENCODER = """
    {name}.embeddings.word_embeddings.weight           embeddings.tokens.weight
    {name}.embeddings.position_embeddings.weight       embeddings.positions.embedding.weight
    {name}.embeddings.token_type_embeddings.weight     embeddings.segments.weight
    {name}.embeddings.position_ids                     -
    {name}.embeddings.token_type_ids                   -
    {name}.embeddings.LayerNorm.*                      embeddings.norm.*
    {name}.encoder.layer.{}.attention.self.query.*     encoder.blocks.{}.attention.q_proj.*
    {name}.encoder.layer.{}.attention.self.key.*       encoder.blocks.{}.attention.k_proj.*
    {name}.encoder.layer.{}.attention.self.value.*     encoder.blocks.{}.attention.v_proj.*
    {name}.encoder.layer.{}.attention.output.dense.*   encoder.blocks.{}.attention.out_proj.*
    {name}.encoder.layer.{}.attention.output.LayerNorm.*  encoder.blocks.{}.add_attention.norm.*
    {name}.encoder.layer.{}.intermediate.dense.*       encoder.blocks.{}.feed_forward.up.*
    {name}.encoder.layer.{}.output.dense.*             encoder.blocks.{}.feed_forward.down.*
    {name}.encoder.layer.{}.output.LayerNorm.*         encoder.blocks.{}.add_feed_forward.norm.*
"""

_BERT = table(_ENCODER.replace("{name}", "bert"))
_BERT_HEADS = _BERT | table("""
    bert.pooler.dense.*                     nsp_head.pool.*  @spare
    cls.seq_relationship.*                  nsp_head.classify.*  @reversed @spare
    cls.predictions.transform.dense.*       mlm_head.transform.*
    cls.predictions.transform.LayerNorm.*   mlm_head.norm.*
    cls.predictions.bias                    mlm_head.bias
    cls.predictions.decoder.bias            mlm_head.bias
    cls.predictions.decoder.weight          mlm_head.project.tokens.weight
""")
_BERT_CLASSES = _BERT | table("""
    bert.pooler.dense.*                     head.pool.*
    classifier.*                            head.classify.*
""")

_ROBERTA = table(_ENCODER.replace("{name}", "roberta"))
_ROBERTA_HEAD = _ROBERTA | table("""
    roberta.pooler.dense.*                  -
    lm_head.dense.*                         mlm_head.transform.*
    lm_head.layer_norm.*                    mlm_head.norm.*
    lm_head.bias                            mlm_head.bias
    lm_head.decoder.bias                    mlm_head.bias
    lm_head.decoder.weight                  mlm_head.project.tokens.weight
""")
_ROBERTA_CLASSES = _ROBERTA | table("""
    roberta.pooler.dense.*                  -
    classifier.dense.*                      head.pool.*
    classifier.out_proj.*                   head.classify.*
""")

_DISTILBERT = table("""
    distilbert.embeddings.word_embeddings.weight           embeddings.tokens.weight
    distilbert.embeddings.position_embeddings.weight       embeddings.positions.embedding.weight
    distilbert.embeddings.LayerNorm.*                      embeddings.norm.*
    distilbert.transformer.layer.{}.attention.q_lin.*      encoder.blocks.{}.attention.q_proj.*
    distilbert.transformer.layer.{}.attention.k_lin.*      encoder.blocks.{}.attention.k_proj.*
    distilbert.transformer.layer.{}.attention.v_lin.*      encoder.blocks.{}.attention.v_proj.*
    distilbert.transformer.layer.{}.attention.out_lin.*    encoder.blocks.{}.attention.out_proj.*
    distilbert.transformer.layer.{}.sa_layer_norm.*        encoder.blocks.{}.add_attention.norm.*
    distilbert.transformer.layer.{}.ffn.lin1.*             encoder.blocks.{}.feed_forward.up.*
    distilbert.transformer.layer.{}.ffn.lin2.*             encoder.blocks.{}.feed_forward.down.*
    distilbert.transformer.layer.{}.output_layer_norm.*    encoder.blocks.{}.add_feed_forward.norm.*
""")
_DISTILBERT_HEAD = _DISTILBERT | table("""
    vocab_transform.*                                      mlm_head.transform.*
    vocab_layer_norm.*                                     mlm_head.norm.*
    vocab_projector.bias                                   mlm_head.bias
    vocab_projector.weight                                 mlm_head.project.tokens.weight
""")
_DISTILBERT_CLASSES = _DISTILBERT | table("""
    pre_classifier.*                                       head.pool.*
    classifier.*                                           head.classify.*
""")


def _encoder(given: Given, architecture: str, **changes: Any) -> TransformerConfig:
    given.demand(position_embedding_type="absolute")
    activation = given.choice("hidden_act", ACTIVATIONS, "gelu")
    values = {
        "d_model": given.whole("hidden_size"),
        "n_heads": given.whole("num_attention_heads"),
        "d_ff": given.whole("intermediate_size"),
        "n_encoder_layers": given.whole("num_hidden_layers"),
        "max_len": given.whole("max_position_embeddings"),
        "norm_eps": given.number("layer_norm_eps", 1e-12),
        "n_segments": given.whole("type_vocab_size", 2),
        "activation": activation,
        "head_activation": activation,
    }
    return _post_norm(given, architecture, **(values | changes))


def _post_norm(given: Given, architecture: str, **values: Any) -> TransformerConfig:
    """What all of them have in common."""
    pad = given.id("pad_token_id")
    common = {
        "architecture": architecture,
        "vocab_size": given.whole("vocab_size"),
        "dropout": 0.0,
        "norm_first": False,
        "positions": "learned",
        "scale_embeddings": False,
        "embedding_norm": True,
        "tied": given.flag("tie_word_embeddings", True),
        "pad_id": 0 if pad is None else pad,
        "bos_id": None,
        "eos_id": next(iter(given.ids("eos_token_id")), 0),  # no encoder ends a text
        "mask_id": None,
        "cls_id": None,
        "sep_id": None,
    }
    return TransformerConfig.from_dict(common | values)


def _labels(given: Given) -> dict[str, Any]:
    """The classes, as `id2label` names them; other kinds of classification are refused."""
    given.demand(problem_type="single_label_classification")
    named = given.inner("id2label").items() or ((str(i), f"LABEL_{i}") for i in range(2))
    by_id = {int(i): str(label) for i, label in named if str(i).isdecimal()}
    if sorted(by_id) != list(range(len(by_id))) or len(by_id) < 2:
        raise ConfigError(f"id2label: {by_id!r} does not number two or more classes from 0")
    return {"labels": [by_id[i] for i in range(len(by_id))], "mlm_head": False, "nsp_head": False}


def _bert(given: Given) -> TransformerConfig:
    heads = {
        "mlm_head": given.holds("cls.predictions.transform.dense.weight"),
        "nsp_head": given.holds("cls.seq_relationship.weight", "pooler.dense.weight"),
    }
    if not any(heads.values()):
        raise ConfigError("the weights hold neither a masked-token head nor a next-sentence head")
    return _encoder(given, "masked_lm", **heads)


def _bert_classes(given: Given) -> TransformerConfig:
    return _encoder(given, "classifier", **_labels(given))


def _roberta_changes(given: Given) -> dict[str, Any]:
    """Positions count from the one after that of padding."""
    offset = (given.id("pad_token_id") or 0) + 1
    return {
        "position_offset": offset,
        "max_len": given.whole("max_position_embeddings") - offset,
        "norm_eps": given.number("layer_norm_eps", 1e-5),
        "n_segments": given.whole("type_vocab_size", 1),
        "head_activation": "gelu",
    }


def _roberta(given: Given) -> TransformerConfig:
    return _encoder(given, "masked_lm", nsp_head=False, **_roberta_changes(given))


def _roberta_classes(given: Given) -> TransformerConfig:
    return _encoder(given, "classifier", **_labels(given), **_roberta_changes(given))


def _distilbert(given: Given, architecture: str = "masked_lm", **changes: Any) -> TransformerConfig:
    activation = given.choice("activation", ACTIVATIONS, "gelu")
    values = {
        "d_model": given.whole("dim"),
        "n_heads": given.whole("n_heads"),
        "d_ff": given.whole("hidden_dim"),
        "n_encoder_layers": given.whole("n_layers"),
        "max_len": given.whole("max_position_embeddings"),
        "norm_eps": 1e-12,
        "activation": activation,
        "head_activation": activation,
        "nsp_head": False,
    }
    return _post_norm(given, architecture, **(values | changes))


def _distilbert_classes(given: Given) -> TransformerConfig:
    return _distilbert(given, "classifier", **_labels(given), pool_activation="relu")


ENCODERS = {
    "bert": Family(
        {
            "BertForMaskedLM": Class(_bert, _BERT_HEADS),
            "BertForPreTraining": Class(_bert, _BERT_HEADS),
            "BertForNextSentencePrediction": Class(_bert, _BERT_HEADS),
            "BertForSequenceClassification": Class(_bert_classes, _BERT_CLASSES),
        },
        prefix="bert.",
        text=Text(older.wordpiece, WORDS),
    ),
    "roberta": Family(
        {
            "RobertaForMaskedLM": Class(_roberta, _ROBERTA_HEAD),
            "RobertaForSequenceClassification": Class(_roberta_classes, _ROBERTA_CLASSES),
        },
        prefix="roberta.",
        text=Text(older.bytes_with_marks, ANGLES_WITH_MASK),
    ),
    "xlm-roberta": Family(
        {
            "XLMRobertaForMaskedLM": Class(_roberta, _ROBERTA_HEAD),
            "XLMRobertaForSequenceClassification": Class(_roberta_classes, _ROBERTA_CLASSES),
        },
        prefix="roberta.",
        text=Text(older.sentencepiece_encoder, ANGLES_WITH_MASK),
    ),
    "distilbert": Family(
        {
            "DistilBertForMaskedLM": Class(_distilbert, _DISTILBERT_HEAD),
            "DistilBertForSequenceClassification": Class(_distilbert_classes, _DISTILBERT_CLASSES),
        },
        prefix="distilbert.",
        text=Text(older.wordpiece, WORDS),
    ),
}
