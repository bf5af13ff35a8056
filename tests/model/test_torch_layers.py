"""An independent check: our weights in torch's own layers give our outputs."""

import pytest
import torch
from torch import Tensor, nn

from model.attention import Attention
from model.block import Block
from model.config import TransformerConfig
from model.masks import causal_mask, length_mask
from tests.tiny import tiny_config

VARIANTS = [
    pytest.param(norm_first, activation, id=f"{'pre' if norm_first else 'post'}-{activation}")
    for norm_first in (True, False)
    for activation in ("relu", "gelu")
]
LENGTHS = torch.tensor([6, 3, 5])


def make_block(norm_first: bool, activation: str, *, cross: bool) -> tuple[Block, TransformerConfig]:
    torch.manual_seed(4)
    config = tiny_config("translator", norm_first=norm_first, activation=activation)
    block = Block(config, cross=cross)
    for parameter in block.parameters():  # biases and norms too, or half of the copy is untested
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return block, config


def torch_arguments(config: TransformerConfig) -> dict[str, object]:
    return {
        "d_model": config.d_model,
        "nhead": config.n_heads,
        "dim_feedforward": config.d_ff,
        "dropout": 0.0,
        "activation": config.activation,
        "layer_norm_eps": config.norm_eps,
        "norm_first": config.norm_first,
        "batch_first": True,
    }


def attention_state(name: str, attention: Attention) -> dict[str, Tensor]:
    maps = (attention.q_proj, attention.k_proj, attention.v_proj)
    return {
        f"{name}.in_proj_weight": torch.cat([m.weight for m in maps]),
        f"{name}.in_proj_bias": torch.cat([m.bias for m in maps]),
        f"{name}.out_proj.weight": attention.out_proj.weight,
        f"{name}.out_proj.bias": attention.out_proj.bias,
    }


def copied(block: Block, norms: list[nn.Module]) -> dict[str, Tensor]:
    state = attention_state("self_attn", block.attention)
    for ours, theirs in ((block.feed_forward.up, "linear1"), (block.feed_forward.down, "linear2")):
        state |= {f"{theirs}.{key}": value for key, value in ours.state_dict().items()}
    for number, norm in enumerate(norms, 1):
        state |= {f"norm{number}.{key}": value for key, value in norm.state_dict().items()}
    return state


@pytest.mark.parametrize(("norm_first", "activation"), VARIANTS)
def test_encoder_layer(norm_first: bool, activation: str) -> None:
    block, config = make_block(norm_first, activation, cross=False)
    theirs = nn.TransformerEncoderLayer(**torch_arguments(config))  # type: ignore[arg-type]
    theirs.load_state_dict(copied(block, [block.add_attention.norm, block.add_feed_forward.norm]))
    x, mask = torch.randn(3, 6, config.d_model), length_mask(LENGTHS, 6)
    expected = theirs(x, src_key_padding_mask=~mask[:, 0, 0])
    torch.testing.assert_close(block(x, mask), expected)


@pytest.mark.parametrize(("norm_first", "activation"), VARIANTS)
def test_decoder_layer(norm_first: bool, activation: str) -> None:
    block, config = make_block(norm_first, activation, cross=True)
    theirs = nn.TransformerDecoderLayer(**torch_arguments(config))  # type: ignore[arg-type]
    norms = [block.add_attention.norm, block.add_cross.norm, block.add_feed_forward.norm]
    state = copied(block, norms) | attention_state("multihead_attn", block.cross_attention)
    theirs.load_state_dict(state)
    x, memory = torch.randn(3, 4, config.d_model), torch.randn(3, 6, config.d_model)
    mask, memory_mask = causal_mask(4), length_mask(LENGTHS, 6)
    kv = block.cross_attention.project_kv(memory)
    ours = block(x, mask, memory=kv, memory_mask=memory_mask)
    expected = theirs(x, memory, tgt_mask=~mask[0, 0], memory_key_padding_mask=~memory_mask[:, 0, 0])
    torch.testing.assert_close(ours, expected)


def test_sinusoidal_table_is_the_papers() -> None:
    from model.transformer import sinusoidal_table

    table = sinusoidal_table(5, 6)
    for position in range(5):
        for i in range(3):
            angle = torch.tensor(position / 10000 ** (2 * i / 6))
            torch.testing.assert_close(table[position, 2 * i], angle.sin())
            torch.testing.assert_close(table[position, 2 * i + 1], angle.cos())
