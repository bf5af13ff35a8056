"""Training's plain products attend as the fused kernel does, forwards and backwards."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.products import attention

MASKS = {
    "none": None,
    "padding": (torch.arange(7) < torch.tensor([7, 5, 1])[:, None])[:, None, None],  # (B, 1, 1, S)
    "causal": torch.ones(7, 7, dtype=torch.bool).tril(),
    "rows": torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.7,
}


def gradients(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, (q, k, v), torch.ones_like(out).cumsum(-1)))


@pytest.mark.parametrize("name", MASKS)
def test_plain_products_are_the_fused_kernel(name: str) -> None:
    torch.manual_seed(5)
    q, k, v = (torch.randn(3, 2, 7, 4, requires_grad=True) for _ in range(3))
    mask = MASKS[name]
    if name == "rows":
        assert mask is not None
        mask = mask | torch.eye(7, dtype=torch.bool)  # torch's kernel gives zeros where nothing may be seen
    ours, theirs = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(gradients(q, k, v, ours), gradients(q, k, v, theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_query_that_may_see_nothing_stays_finite() -> None:
    q, k, v = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, torch.zeros(2, 2, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert all(bool(g.isfinite().all()) for g in [out, *gradients(q, k, v, out)])
