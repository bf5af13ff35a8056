"""The readable reference equals the fused kernel that runs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import Attention, Rotation, rotate, scaled_dot_product_attention
from model.masks import (
    MaskParts,
    causal_mask,
    document_mask,
    length_mask,
    padding_mask,
    position_mask,
    window_mask,
)
from model.transformer import Rotary
from tests.tiny import tiny_config

B, H, T, S, K = 3, 4, 5, 7, 8


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.6


MASKS = {
    "none": None,
    "full": random_mask(B, H, T, S),
    "keys": random_mask(B, 1, 1, S),
    "queries": random_mask(1, 1, T, S),
    "nothing": torch.zeros(B, 1, T, S, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", MASKS)
def test_reference_equals_fused_kernel(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, T, K), torch.randn(B, H, S, K), torch.randn(B, H, S, K)
    mask = MASKS[kind]
    out, weights = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    sums = weights.sum(-1)
    reaches = torch.ones(B, H, T) if mask is None else mask.any(-1).expand(B, H, T).float()
    torch.testing.assert_close(sums, reaches)


def test_a_query_that_may_attend_to_nothing_gives_zeros() -> None:
    q, k, v = torch.randn(1, 1, 2, K), torch.randn(1, 1, 3, K), torch.randn(1, 1, 3, K)
    mask = torch.tensor([[False, False, False], [True, False, False]])
    for out in (
        scaled_dot_product_attention(q, k, v, mask)[0],
        F.scaled_dot_product_attention(q, k, v, mask),
    ):
        assert torch.equal(out[0, 0, 0], torch.zeros(K))
        torch.testing.assert_close(out[0, 0, 1], v[0, 0, 0])


def test_equation_by_hand() -> None:
    q, k = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.0], [math.log(3) / 2]]]])
    v = torch.tensor([[[[1.0], [5.0]]]])
    out, weights = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.25, 0.75]))
    assert out.item() == pytest.approx(4.0)


@pytest.mark.parametrize("n_kv_heads", [None, 1, 2, 4])
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_weights_path_equals_forward(n_kv_heads: int | None, rotary: bool) -> None:
    torch.manual_seed(1)
    config = tiny_config("causal_lm", n_kv_heads=n_kv_heads)
    attention = Attention(config)
    x, mask = torch.randn(B, T, config.d_model), random_mask(B, 1, T, T)
    rotation: Rotation | None = Rotary(config)(torch.arange(T).expand(B, T)) if rotary else None
    kv = attention.project_kv(x, rotation)
    assert kv[0].shape == (B, config.kv_heads, T, config.head_dim)
    out, weights = attention.weights(attention.project_q(x, rotation), kv, mask)
    torch.testing.assert_close(out, attention(x, kv, mask, rotation))
    assert weights.shape == (B, config.n_heads, T, T)


def test_grouped_heads_equal_repeated_heads() -> None:
    torch.manual_seed(2)
    grouped, full = Attention(tiny_config("causal_lm", n_kv_heads=2)), Attention(tiny_config("causal_lm"))
    state = {name: p.clone() for name, p in grouped.state_dict().items()}
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(B, T, 32)
    torch.testing.assert_close(
        grouped(x, grouped.project_kv(x), causal_mask(T)), full(x, full.project_kv(x), causal_mask(T))
    )


@pytest.mark.parametrize("n_kv_heads", [None, 2])
@pytest.mark.parametrize("in_parts", [False, True])
def test_rows_that_share_keys_read_what_each_would_of_its_own(n_kv_heads: int | None, in_parts: bool) -> None:
    torch.manual_seed(4)
    attention = Attention(tiny_config("causal_lm", n_kv_heads=n_kv_heads))
    n_heads = n_kv_heads or 4
    q, k, v = torch.randn(6, 4, 1, 8), torch.randn(2, n_heads, 5, 8), torch.randn(2, n_heads, 5, 8)
    added = torch.zeros(2, 1, 1, 5)
    added[1, ..., 3:] = -torch.inf
    own = attention.attend(
        q, (k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)), added.repeat_interleave(3, 0)
    )
    mask: Tensor | MaskParts = MaskParts(((0, 1, 5, None), (1, 2, 3, None))) if in_parts else added
    torch.testing.assert_close(attention.attend(q, (k, v), mask), own)


def test_rotation_depends_on_distance_alone() -> None:
    torch.manual_seed(3)
    rotary = Rotary(tiny_config("causal_lm", positions="rotary"))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query: int, key: int) -> float:
        turned = (rotate(x, rotary(torch.tensor([[p]]))) for x, p in ((q, query), (k, key)))
        left, right = turned
        return float((left * right).sum())

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-3)


def test_rotation_keeps_its_precision_when_a_model_is_cast() -> None:
    config = tiny_config("causal_lm", positions="rotary")
    positions = torch.tensor([[511]])
    expected = Rotary(config)(positions)
    torch.testing.assert_close(Rotary(config).to(torch.bfloat16)(positions), expected, rtol=0, atol=0)


def test_masks() -> None:
    ids = torch.tensor([[5, 6, 0], [7, 0, 0]])
    assert padding_mask(ids, 0).int().tolist() == [[[[1, 1, 0]]], [[[1, 0, 0]]]]
    assert torch.equal(length_mask(torch.tensor([2, 1]), 3), padding_mask(ids, 0))
    assert causal_mask(3)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert position_mask(torch.tensor([[2], [0]]), 3).int().tolist() == [[[[1, 1, 1]]], [[[1, 0, 0]]]]
    # Of what stands up to a query a window leaves the last two; what comes after is another mask's affair.
    assert window_mask(torch.tensor([[2, 0]]), 4, 2).int().tolist() == [[[[0, 1, 1, 1], [1, 1, 1, 1]]]]
    documents = torch.tensor([[1, 1, 2]])
    assert document_mask(documents)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
