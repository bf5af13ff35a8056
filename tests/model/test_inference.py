"""Rewritten models against the plain ones: equal in float32, close in eight bits, rows on their own."""

import pytest
import torch
from torch import nn

from model.attention import Attention
from model.inference import optimise
from model.models import CausalLM, MaskedLM, Translator, build_model
from model.quantize import Int8Linear, share_int8
from tests.tiny import tiny_config

VARIANTS = [
    {},
    {"n_kv_heads": 2, "positions": "rotary"},
    {"n_kv_heads": 1, "positions": "rotary", "qk_norm": True, "gated": True, "activation": "silu"},
    {"bias": False, "norm": "rms", "norm_first": False},
]


def outputs(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    src, tgt = torch.randint(9, 40, (3, 11)), torch.randint(9, 40, (3, 6))
    src[1, 5:] = 0
    if isinstance(model, Translator):
        return model(src, tgt)  # type: ignore[no-any-return]
    return model(src)[0] if isinstance(model, MaskedLM) else model(tgt)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["translator", "masked_lm", "causal_lm"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_fused_models_say_the_same(architecture: str, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(architecture, **changes)).eval()
    for parameter in model.parameters():  # biases too, or half of the joining is untested
        nn.init.normal_(parameter, mean=0.05, std=0.3)
    plain = outputs(model)
    optimise(model)
    torch.testing.assert_close(outputs(model), plain, rtol=1e-4, atol=1e-4)
    attentions = [type(module) for module in model.modules() if isinstance(module, Attention)]
    assert attentions
    assert Attention not in attentions


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["translator", "masked_lm", "causal_lm"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_eight_bits_are_close(architecture: str, changes: dict[str, object]) -> None:
    torch.manual_seed(1)
    model = build_model(tiny_config(architecture, **changes)).eval()
    plain = outputs(model)
    optimise(model, "int8")
    assert not any(isinstance(m, nn.Linear) for name, m in model.named_modules() if "blocks" in name)
    found = outputs(model)
    relative = (found - plain).norm() / plain.norm()
    assert 0 < relative < 0.05


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, steps: float = 127.5
) -> torch.Tensor:
    """The eight-bit product in plain arithmetic: steps of a 127th for weights, `steps` for activations."""
    w_scale = weight.abs().amax(1, keepdim=True) / 127
    w = (weight / w_scale).round() * w_scale
    scale = x.abs().amax(-1, keepdim=True)
    unit = (x / scale * steps).round() / steps
    return unit * scale @ w.T + bias


def test_an_int8_product_is_what_it_says() -> None:
    torch.manual_seed(2)
    weight, bias = torch.randn(24, 32), torch.randn(24)
    layer, x = Int8Linear(weight, bias), torch.randn(5, 7, 32) * torch.logspace(-3, 3, 7)[:, None]
    steps = 63.5 if layer._reduce_range else 127.5  # seven bits where eight would overflow
    found, wanted = layer(x), reference(x, weight, bias, steps)
    assert found.shape == (5, 7, 24)
    # A half may round either way: a step of one activation, at most.
    step = (x.abs().amax(-1) / steps)[..., None] * weight.abs().amax()
    assert ((found - wanted).abs() <= 2 * step + 1e-4).all()
    assert (found - wanted).abs().mean() < (found - (x @ weight.T + bias)).abs().mean()
    torch.testing.assert_close(Int8Linear(weight, None)(x) + bias, found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n_rows", [1, 2, 7, 33, 130])
def test_an_int8_row_does_not_feel_its_neighbours(n_rows: int) -> None:
    torch.manual_seed(3)
    layer, row = Int8Linear(torch.randn(70, 64), torch.randn(70)), torch.randn(1, 64)
    alone = layer(row)
    for others in (
        torch.randn(n_rows, 64),
        1e6 * torch.randn(n_rows, 64),
        torch.full((n_rows, 64), torch.nan),
    ):
        assert torch.equal(layer(torch.cat((others, row)))[-1:], alone)
        assert torch.equal(layer(torch.cat((row, others)))[:1], alone)


def test_int8_rows_without_numbers_stay_so_and_zeros_are_zeros() -> None:
    layer = Int8Linear(torch.randn(4, 8), torch.ones(4))
    x = torch.randn(4, 8)
    x[1, 3], x[2], x[3, 0] = torch.nan, 0.0, torch.inf
    out = layer(x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert torch.equal(out[2], torch.ones(4))
    assert not out[3].isfinite().any()
    with pytest.raises(ValueError, match="at least 2"):
        Int8Linear(torch.randn(3, 1), None)


def test_a_causal_model_still_projects_its_vocabulary() -> None:
    model = build_model(tiny_config("causal_lm"))
    assert isinstance(model, CausalLM)
    embedded = model.embeddings.tokens.weight.clone()
    optimise(model, "int8")
    assert torch.equal(model.embeddings.tokens.weight, embedded)  # looked up in full precision
    assert type(model.head).__name__ == "Int8Linear"


def test_equal_int8_weights_are_held_once() -> None:
    torch.manual_seed(4)
    one, other = build_model(tiny_config("masked_lm")), build_model(tiny_config("masked_lm"))
    twin = build_model(tiny_config("masked_lm"))
    twin.load_state_dict(one.state_dict())
    for model in (one, other, twin):
        optimise(model, "int8")
    said = outputs(twin)
    for model, shared in ((twin, True), (other, False)):
        share_int8(model, one)
        pairs = zip(model.modules(), one.modules(), strict=True)
        packed = [a is b for a, b in pairs if isinstance(b, Int8Linear)]
        assert len(packed) > 8
        assert set(packed) == {shared}
    assert torch.equal(outputs(twin), said)
