"""Properties of the three models."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.block import WeightsTap
from model.masks import document_mask
from model.models import CausalLM, MaskedLM, Translator, build_model
from tests.tiny import tiny_config

KINDS: list[dict[str, object]] = [
    {"positions": "sinusoidal"},
    {"positions": "learned", "norm_first": False},
    {"positions": "rotary", "norm": "rms", "gated": True, "n_kv_heads": 2},
]
each_kind = pytest.mark.parametrize("changes", KINDS, ids=["sinusoidal", "learned", "rotary"])


def make(architecture: str, **changes: object) -> Any:
    torch.manual_seed(6)
    return build_model(tiny_config(architecture, **changes)).eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(6, 40, shape, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
@each_kind
def test_a_later_token_never_changes_an_earlier_logit(changes: dict[str, object]) -> None:
    ids, other = random_ids(1, 10), random_ids(1, 10)
    other[:, :6] = ids[:, :6]
    other[:, 6] = (ids[:, 6] + 1) % 34 + 6
    causal, translator = make("causal_lm", **changes), make("translator", **changes)
    src = random_ids(1, 7)
    for model in (causal, lambda tgt: translator(src, tgt)):
        first, second = model(ids), model(other)
        torch.testing.assert_close(first[:, :6], second[:, :6], rtol=0, atol=0)
        assert not torch.allclose(first[:, 6:], second[:, 6:])


@torch.no_grad()
@each_kind
def test_a_row_gives_the_same_alone_and_padded_in_a_batch(changes: dict[str, object]) -> None:
    translator, masked = make("translator", **changes), make("masked_lm", **changes)
    src, tgt = random_ids(2, 9), random_ids(2, 8)
    src[0, 5:], tgt[0, 4:] = 0, 0
    segments = (torch.arange(9) > 2).long().expand(2, 9)
    torch.testing.assert_close(translator(src, tgt)[0, :4], translator(src[:1, :5], tgt[:1, :4])[0])
    batch, alone = masked(src, segments), masked(src[:1, :5], segments[:1, :5])
    torch.testing.assert_close(batch[0][0, :5], alone[0][0])
    torch.testing.assert_close(batch[1][:1], alone[1])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    model = make("causal_lm", positions="rotary")
    first, second = random_ids(1, 5), random_ids(1, 9)[:, 5:]
    documents = torch.tensor([[0] * 5 + [1] * 4])
    packed = model(torch.cat((first, second), dim=1), document_mask(documents))
    torch.testing.assert_close(packed[:, :5], model(first))
    torch.testing.assert_close(packed[:, 5:], model(second))  # rotary positions know distances alone


@torch.no_grad()
def test_masked_model_projects_only_the_slots_asked_for() -> None:
    model, ids, slots = make("masked_lm"), random_ids(2, 9), torch.tensor([[1, 4], [0, 8]])
    everything, follows = model(ids)
    some, again = model(ids, slots=slots)
    torch.testing.assert_close(some, everything[torch.arange(2)[:, None], slots])
    assert torch.equal(follows, again)
    assert follows.shape == (2, 2)


@torch.no_grad()
def test_segments_matter() -> None:
    model, ids = make("masked_lm"), random_ids(1, 6)
    zeros, ones = torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    assert not torch.allclose(model(ids, zeros)[0], model(ids, ones)[0])


def _translator_loss(model: Translator) -> Tensor:
    src, tgt = random_ids(4, 8), random_ids(4, 9)
    return F.cross_entropy(model(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten())


def _masked_loss(model: MaskedLM) -> Tensor:
    ids = random_ids(4, 8)
    assert model.config.mask_id is not None
    hidden = ids.clone()
    hidden[:, ::3] = model.config.mask_id
    logits, follows = model(hidden)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten()) + F.cross_entropy(
        follows, torch.tensor([0, 1, 1, 0])
    )


def _causal_loss(model: CausalLM) -> Tensor:
    ids = random_ids(4, 9)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [("translator", _translator_loss), ("masked_lm", _masked_loss), ("causal_lm", _causal_loss)],
)
@each_kind
def test_a_tiny_model_overfits_one_batch(architecture: str, loss: Any, changes: dict[str, object]) -> None:
    model = make(architecture, **changes)
    # The first token follows from nothing but the source (or guesses, without one): some loss may remain.
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert loss(model).item() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["translator", "masked_lm", "causal_lm"])
def test_weights_tap(architecture: str) -> None:
    model = make(architecture, n_kv_heads=2)
    src, tgt = random_ids(2, 6), random_ids(2, 5)
    src[0, 4:] = 0
    arguments = (src, tgt) if architecture == "translator" else (src,)
    plain = model(*arguments)
    with WeightsTap(model) as tap:
        tapped = model(*arguments)
    torch.testing.assert_close(plain, tapped)
    sizes = {
        "encoder.blocks.0.attention": (2, 4, 6, 6),
        "decoder.blocks.0.attention": (2, 4, 5, 5) if architecture == "translator" else (2, 4, 6, 6),
        "decoder.blocks.1.cross_attention": (2, 4, 5, 6),
    }
    assert len(tap.weights) == {"translator": 6}.get(architecture, 2)
    for name, (weights,) in tap.weights.items():
        assert weights.shape == sizes.get(name, weights.shape)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        if "cross" in name or "encoder" in name:
            assert weights[0, :, :, 4:].abs().sum() == 0  # padding gets nothing
    seen = {name: len(weights) for name, weights in tap.weights.items()}
    again = model(*arguments)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)
    assert {name: len(weights) for name, weights in tap.weights.items()} == seen


def test_weights_tap_lets_go_after_an_error() -> None:
    model = make("causal_lm")
    with pytest.raises(IndexError), WeightsTap(model):
        model(torch.tensor([[1000]]))
    assert all("attend" not in vars(module) for module in model.modules())


def test_the_output_projection_is_the_embedding() -> None:
    for architecture in ("translator", "masked_lm", "causal_lm"):
        model = make(architecture)
        big = [name for name, p in model.named_parameters() if p.shape == (40, 32)]
        assert big == ["embeddings.tokens.weight"]


@torch.no_grad()
def test_dropout_is_off_in_inference_and_on_in_training() -> None:
    model, ids = make("causal_lm", dropout=0.3), random_ids(1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
