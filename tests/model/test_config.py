"""A configuration is checked once, and the message names the key."""

import dataclasses

import pytest

from model.config import ConfigError, TransformerConfig
from tests.tiny import tiny_config


def test_round_trip() -> None:
    config = tiny_config("translator", n_kv_heads=2, languages={"en": 6, "ko": 7}, positions="rotary")
    assert TransformerConfig.from_dict(config.to_dict()) == config
    assert config.head_dim == 8
    assert config.kv_heads == 2


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config("causal_lm").d_model = 64  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "seq2seq"),
        ("activation", "tanh"),
        ("norm", "batch"),
        ("positions", "none"),
        ("vocab_size", 0),
        ("vocab_size", 40.0),
        ("d_model", 30),
        ("d_model", "32"),
        ("n_heads", True),
        ("kv_heads", -2),
        ("kv_heads", 0),
        ("max_len", 0),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("length_penalty", float("inf")),
        ("length_penalty", "1"),
        ("norm_eps", 0.0),
        ("rotary_base", -1.0),
        ("bias", 1),
        ("n_segments", -1),
        ("n_encoder_layers", 0),
        ("n_encoder_layers", -1),
        ("n_decoder_layers", 0),
        ("eos_id", 40),
        ("pad_id", -1),
        ("languages.ko", 40),
        ("d_head", 0),
        ("window", 0),
        ("n_full_layers", -1),
        ("position_offset", -1),
        ("qkv_bias", "no"),
        ("tied", None),
        ("pool_activation", "gelu"),
        ("rotary_scaling", "dynamic"),
        ("rotary_factors", {"factor": 2.0}),
        ("start_id", 40),
        ("more_eos_ids", 3),
    ],
)
def test_a_bad_value_is_named(key: str, value: object) -> None:
    changes = {"n_kv_heads": value} if key == "kv_heads" else {key: value}
    if key.startswith("languages."):
        changes = {"languages": {key.removeprefix("languages."): value}}
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        TransformerConfig.from_dict(tiny_config("translator").to_dict() | changes)


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="n_heads: 4 is not a multiple of n_kv_heads 3"):
        tiny_config("causal_lm", n_kv_heads=3)
    with pytest.raises(ConfigError, match="positions: rotary needs an even width"):
        tiny_config("causal_lm", d_model=12, positions="rotary")


def test_the_factors_of_a_scaling() -> None:
    with pytest.raises(ConfigError, match=r"rotary_factors: not those of scaling 'linear': beta_fast"):
        tiny_config("causal_lm", rotary_scaling="linear", rotary_factors={"factor": 2.0, "beta_fast": 1.0})
    for bad in (0.0, "2", float("inf")):
        with pytest.raises(ConfigError, match=r"rotary_factors\.factor: .* is not a positive number"):
            tiny_config("causal_lm", rotary_scaling="linear", rotary_factors={"factor": bad})


def test_parts_that_are_as_their_neighbours() -> None:
    config = tiny_config("causal_lm", d_head=6, more_eos_ids=[9], bos_id=None)
    assert (config.head_dim, config.eos_ids, config.bos_id) == (6, (2, 9), None)
    assert tiny_config("causal_lm").head_dim == 8


def test_layers_that_do_not_suit() -> None:
    with pytest.raises(ConfigError, match="n_decoder_layers: 2 does not suit a masked_lm"):
        tiny_config("masked_lm", n_decoder_layers=2)


def test_unknown_and_missing_keys() -> None:
    values = tiny_config("causal_lm").to_dict()
    with pytest.raises(ConfigError, match="unknown key: d_modle, n_layer"):
        TransformerConfig.from_dict(values | {"n_layer": 3, "d_modle": 2})
    del values["vocab_size"]
    with pytest.raises(ConfigError, match="vocab_size"):
        TransformerConfig.from_dict(values)
    for name, value in (("languages", {"en": "4"}), ("more_eos_ids", ["a", 1])):
        with pytest.raises(ConfigError):
            TransformerConfig.from_dict(tiny_config("translator").to_dict() | {name: value})
