"""The kernels in C against torch's operations, and against themselves in other company."""

import logging
import math
import random
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import kernels
from model.attention import rotate, scaled_dot_product_attention
from model.inference import kernels_of, optimise
from model.kernel_blocks import KernelDecoder, KernelEncoder
from model.kernels import Kernels
from model.masks import RowSpans, padding_mask, window_mask
from model.models import CausalLM, Translator, build_model, make_cache
from model.quantize import Int8Linear, KernelInt8Linear
from model.sampling import SamplingParams, SamplingRows, sample, top_p_mask
from model.transformer import Decoder, Encoder
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def native() -> Kernels:
    found = kernels.compiled()
    if found is None:
        pytest.skip("no C compiler")
    return found


_CPUINFO = Path("/proc/cpuinfo")
_HAS = _CPUINFO.read_text() if _CPUINFO.exists() and shutil.which("gcc") else ""
_FEWER = {"amx_int8": "-mno-amx-int8", "avx512_vnni": "-mno-amx-int8 -mno-avx512vnni"}


@pytest.fixture(scope="module", params=["", *(flags for feature, flags in _FEWER.items() if feature in _HAS)])
def eight_bits(native: Kernels, request: pytest.FixtureRequest) -> Kernels:
    """As this processor has it, and as one with fewer instructions would."""
    if not native.has_int8:
        pytest.skip("no 8-bit product for this processor")
    if not request.param:
        return native
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", f"gcc {request.param}")
        found = kernels.compiled.__wrapped__()
    assert found is not None
    assert found.has_int8
    return found


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The 8-bit product in plain arithmetic: steps of a 127th of the greatest of a row, of an output."""
    w_step, x_step = (each.abs().amax(-1, keepdim=True) / 127 for each in (weight, x))
    whole = (x / x_step).round().double() @ (weight / w_step).round().double().T
    return (whole * x_step * w_step.T + bias).float()


@pytest.mark.parametrize(
    ("n_out", "n_in"), [(64, 64), (24, 32), (129, 37), (1, 2), (70, 515), (256, 1030), (100, 192)]
)
def test_an_int8_product_is_what_it_says(eight_bits: Kernels, n_out: int, n_in: int) -> None:
    torch.manual_seed(n_out)
    weight, bias = torch.randn(n_out, n_in), torch.randn(n_out)
    layer = KernelInt8Linear(weight, bias, eight_bits)
    for n_rows in (*range(1, 14), 16, 17, 31, 33, 48, 95, 97, 127, 128, 129, 200):
        # No number may stand between two steps, where either is right: those of x are whole steps.
        x = torch.randint(-127, 128, (n_rows, n_in)).float()
        x[:, 0] = 127
        x *= torch.logspace(-2, 2, n_rows)[:, None].exp2()
        torch.testing.assert_close(layer(x), reference(x, weight, bias), rtol=1e-5, atol=1e-4)
    ones = torch.ones(2, 3, n_in)
    assert layer(ones).shape == (2, 3, n_out)
    torch.testing.assert_close(
        KernelInt8Linear(weight, None, eight_bits)(ones) + bias, layer(ones), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("n_in", [66, 128])
def test_no_rows_are_no_work(native: Kernels, n_in: int) -> None:
    if not native.has_int8:
        pytest.skip("no 8-bit product for this processor")
    layer = KernelInt8Linear(torch.randn(70, n_in), None, native)
    shapes: list[tuple[int, ...]] = []
    # In a thread of its own, which has no memory from earlier calls.
    thread = threading.Thread(target=lambda: shapes.append(tuple(layer(torch.empty(0, n_in)).shape)))
    thread.start()
    thread.join()
    assert shapes == [(0, 70)]


def test_other_instructions_change_no_bit(native: Kernels, eight_bits: Kernels) -> None:
    torch.manual_seed(7)
    weight, bias = torch.randn(130, 192), torch.randn(130)
    own, other = (KernelInt8Linear(weight, bias, each) for each in (native, eight_bits))
    for n_rows in (1, 5, 6, 16, 17, 33, 129, 200):
        x = torch.randn(n_rows, 192)
        assert torch.equal(own(x), other(x))


def test_the_greatest_products_fit(eight_bits: Kernels) -> None:
    """Where all numbers and weights are as large as they can be, pairs of products are, too."""
    torch.manual_seed(2)
    weight, x = (torch.randint(0, 2, (n, 250)) * 2.0 - 1.0 for n in (70, 33))
    weight[0], weight[1], x[0], x[1] = 1.0, -1.0, 1.0, -1.0
    torch.testing.assert_close(KernelInt8Linear(weight, None, eight_bits)(x), x @ weight.T)


def test_it_is_as_near_as_torchs_own(eight_bits: Kernels) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(300, 256), torch.randn(300), torch.randn(64, 256)
    exact = x @ weight.T + bias
    own = (KernelInt8Linear(weight, bias, eight_bits)(x) - exact).norm()
    assert own < 1.05 * (Int8Linear(weight, bias)(x) - exact).norm()


@pytest.mark.parametrize("n_rows", [1, 2, 5, 6, 7, 15, 16, 31, 32, 100, 127, 128])
@pytest.mark.parametrize("n_in", [66, 128])  # registers for matrices, where there are any, take whole 64
def test_an_int8_row_does_not_feel_its_neighbours(eight_bits: Kernels, n_in: int, n_rows: int) -> None:
    torch.manual_seed(3)
    layer = KernelInt8Linear(torch.randn(70, n_in), torch.randn(70), eight_bits)
    row = torch.randn(1, n_in)
    alone = layer(row)
    for others in (1e6 * torch.randn(n_rows, n_in), torch.full((n_rows, n_in), torch.nan)):
        assert torch.equal(layer(torch.cat((others, row)))[-1:], alone)
        assert torch.equal(layer(torch.cat((row, others)))[:1], alone)


def test_int8_rows_without_numbers_stay_so_and_zeros_are_zeros(eight_bits: Kernels) -> None:
    layer = KernelInt8Linear(torch.randn(4, 40), torch.ones(4), eight_bits)
    x = torch.randn(5, 40)
    x[1, 39], x[2], x[3, 0], x[4] = torch.nan, 0.0, torch.inf, 1e-40
    out = layer(x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert torch.equal(out[2], torch.ones(4))
    assert not out[3].isfinite().any()
    assert torch.equal(out[4], torch.ones(4))


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(4, 4, 32), (4, 2, 64), (8, 1, 128), (3, 3, 10), (2, 1, 48)]
)
@pytest.mark.parametrize("window", [None, 3])
def test_self_attention(
    native: Kernels, n_heads: int, n_kv_heads: int, head_dim: int, window: int | None
) -> None:
    torch.manual_seed(head_dim)
    n_rows, size = 5, 21
    k, v = torch.full((2, n_rows + 2, n_kv_heads, size, head_dim), torch.nan)  # what is not read is none
    last = torch.tensor([20, 0, 7, 3, 12])
    for row, position in enumerate(last):
        k[row, :, :position], v[row, :, :position] = torch.randn(2, n_kv_heads, int(position), head_dim)
    qkv = torch.randn(n_rows, n_heads + 2 * n_kv_heads, head_dim)
    angles = torch.rand(n_rows, 1, 1, head_dim // 2) * 6
    rotation = angles.cos(), angles.sin()
    spans = RowSpans(last) if window is None else RowSpans(last).window(window)
    given = qkv.clone()
    found = native.self_attention(given, k, v, 0, n_heads, spans.last, spans.first, rotation)

    q, new_k, new_v = torch.split(qkv[:, :, None], [n_heads, n_kv_heads, n_kv_heads], dim=1)
    q, new_k = rotate(q, rotation), rotate(new_k, rotation)
    rows = torch.arange(n_rows)
    torch.testing.assert_close(k[rows, :, last], new_k[:, :, 0])
    assert torch.equal(v[rows, :, last], new_v[:, :, 0])
    group, mask = n_heads // n_kv_heads, spans.as_mask(size)
    if window is not None:
        near = window_mask(last[:, None], size, window)
        assert torch.equal(mask, RowSpans(last).as_mask(size) & near)
    keys, values = (each[:n_rows].nan_to_num().repeat_interleave(group, 1) for each in (k, v))
    wanted, _ = scaled_dot_product_attention(q, keys, values, mask)
    torch.testing.assert_close(found, wanted.flatten(1), rtol=1e-5, atol=1e-5)
    for row in range(n_rows):  # alone, to the last bit
        first = None if spans.first is None else spans.first[row : row + 1]
        turned = rotation[0][row : row + 1], rotation[1][row : row + 1]
        alone = native.self_attention(
            qkv[row : row + 1].clone(), k, v, row, n_heads, last[row : row + 1], first, turned
        )
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("first_row", [0, 2])
def test_rows_read_what_others_hold(native: Kernels, first_row: int) -> None:
    """As if each held all that it reads, after rows followed others and moved to other places."""
    torch.manual_seed(11)
    cache, copied = (make_cache(tiny_config("causal_lm"), 8, 9, "cpu", torch.float32) for _ in range(2))
    cache.track_origins()
    rows = list(range(first_row, first_row + 4))
    for step in range(6):
        qkv, last = torch.randn(4, 12, 8), torch.full((4,), step)
        said = [
            native.self_attention(
                qkv.clone(), one.k[0], one.v[0], first_row, 4, last, None, None, one.origins
            )
            for one in (cache, copied)
        ]
        assert torch.equal(*said)
        a, b, c, d = rows
        for one in (cache, copied):
            match step:
                case 0:
                    one.follow([a, a, a], [b, c, d], 1)
                case 1 | 3:
                    one.follow([b], [c], step + 1)
                case 2:
                    one.follow([c, d], [a, b], step + 1)
                case 4:  # to the places of rows that ended
                    one.copy_rows([b, d], [6, 7], step + 1)
                    one.copy_rows([6, 7], [b, d], step + 1)
    assert cache.origins is not None
    assert len(set(cache.origins[first_row + 2, :6].tolist())) > 1
    view = cache.view(0, torch.zeros(1, 1, dtype=torch.long), 1)
    with pytest.raises(RuntimeError, match="kernels alone"):
        view[0].update(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8))


@pytest.mark.parametrize("n_together", [1, 3])
def test_stored_attention(native: Kernels, n_together: int) -> None:
    torch.manual_seed(1)
    k, v = torch.full((2, 8, 2, 9, 16), torch.nan)
    last = torch.tensor([8, 0, 3, 5])
    for row, position in enumerate(last):
        k[2 * row, :, : position + 1], v[2 * row, :, : position + 1] = torch.randn(
            2, 2, int(position) + 1, 16
        )
    k, v = k[::2], v[::2]  # as every second row of a cache
    q = torch.randn(4 * n_together, 6, 1, 16)
    found = native.stored_attention(q, k, v, last)
    mask = RowSpans(last).as_mask(9)
    keys, values, mask = (
        each.nan_to_num().repeat_interleave(n_together, 0)
        if each.is_floating_point()
        else each.repeat_interleave(n_together, 0)
        for each in (k, v, mask)
    )
    wanted, _ = scaled_dot_product_attention(
        q, keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1), mask
    )
    torch.testing.assert_close(found, wanted.flatten(1), rtol=1e-5, atol=1e-5)


def test_threads_share_the_work_and_change_nothing(eight_bits: Kernels) -> None:
    torch.manual_seed(4)
    model = build_model(tiny_config("causal_lm", d_model=256, d_ff=1024)).eval()
    optimise(model, "int8", eight_bits)
    assert isinstance(model, CausalLM)
    ids, last = torch.randint(9, 40, (256, 1)), torch.zeros(256, dtype=torch.long)

    def work() -> list[Tensor]:
        cache = make_cache(model.config, 256, 4, "cpu", torch.float32)
        hidden = model.decoder(ids, last[:, None], RowSpans(last), cache.view(0, last[:, None], 1))
        return [hidden, *eight_bits.best_tokens(model.head(hidden)[:, 0], 3)]

    alone = work()
    torch.set_num_threads(2)
    try:
        together = work()
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_rows_that_hold_no_number_say_so_alone(native: Kernels) -> None:
    torch.manual_seed(2)
    k, v = torch.randn(2, 3, 1, 4, 32)
    q = torch.randn(3, 1, 1, 32)
    q[1, 0, 0, 5] = torch.nan
    v[2, 0, 1, 7] = torch.inf
    found = native.stored_attention(q, k, v, torch.tensor([3, 3, 3]))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
    assert not found[2].isfinite().all()


def test_scores_as_far_apart_as_floats_go(native: Kernels) -> None:
    """The greatest takes all; nothing overflows."""
    k, v = torch.zeros(1, 1, 3, 32), torch.randn(1, 1, 3, 32)
    k[0, 0, :, 0] = torch.tensor([-1e30, 1e30, 1e29])
    q = torch.full((1, 1, 1, 32), 1.0)
    assert torch.equal(native.stored_attention(q, k, v, torch.tensor([2]))[0], v[0, 0, 1])


def test_the_likeliest_tokens(native: Kernels) -> None:
    torch.manual_seed(8)
    for n_rows, vocab_size, n_best in ((1, 16, 1), (5, 1000, 8), (3, 7, 7), (2, 70, 100), (7, 64 * 5 + 9, 9)):
        logits = 5 * torch.randn(n_rows, vocab_size)
        logits[:, 3] = -torch.inf
        ids, logprobs = native.best_tokens(logits, n_best)
        wanted = logits.log_softmax(-1).topk(min(n_best, vocab_size))
        assert torch.equal(ids, wanted.indices)
        torch.testing.assert_close(logprobs, wanted.values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logprobs[-1:], native.best_tokens(logits[-1:], n_best)[1], rtol=0, atol=0)


def test_the_likeliest_of_equals_of_nothing_and_of_what_is_no_number(native: Kernels) -> None:
    logits = torch.zeros(4, 200)
    logits[0, [150, 20, 160]] = 1.0
    logits[1] = -torch.inf
    logits[2, 180], logits[3, 0] = torch.nan, torch.nan
    ids, logprobs = native.best_tokens(logits, 4)
    assert ids[0].tolist() == [20, 150, 160, 0]
    assert logprobs[1].tolist() == [-torch.inf] * 4
    assert [len(set(own)) for own in ids.tolist()] == [4] * 4
    assert logprobs[2:].isnan().all()


@pytest.mark.parametrize(
    ("n_rows", "n_in", "n_out", "n_best"),
    [
        (1, 64, 16, 1),
        (4, 64, 1000, 8),
        (7, 96, 513, 9),
        (33, 64, 700, 700),
        (150, 128, 1600, 8),
        (5, 30, 20, 90),
    ],
)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_best_of_a_product_without_its_logits(
    eight_bits: Kernels, n_rows: int, n_in: int, n_out: int, n_best: int, n_threads: int
) -> None:
    torch.manual_seed(n_rows)
    linear = KernelInt8Linear(torch.randn(n_out, n_in), torch.randn(n_out), eight_bits)
    x = 2 * torch.randn(n_rows, n_in)
    last = n_rows - 1
    banned = torch.tensor([[-1, 3], [last, 0], [last, n_out - 1], [0, 5], [-1, n_out // 2], [0, 5]])
    logits = linear(x)
    for row, token in banned.tolist():
        logits[row if row >= 0 else slice(None), token] = -torch.inf
    wanted = eight_bits.best_tokens(logits, n_best)
    alone = linear.best(x[last:], n_best, torch.tensor([[-1, 3], [0, 0], [0, n_out - 1], [0, n_out // 2]]))
    torch.set_num_threads(n_threads)
    try:
        ids, logprobs = linear.best(x, n_best, banned)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(ids, wanted[0])
    assert torch.equal(logprobs, wanted[1])
    if n_rows > 1:  # whoever stands beside it
        assert torch.equal(ids[last:], alone[0])
        assert torch.equal(logprobs[last:], alone[1])


def test_the_best_of_a_product_of_nothing_and_of_what_is_no_number(eight_bits: Kernels) -> None:
    torch.manual_seed(0)
    linear = KernelInt8Linear(torch.randn(80, 64), None, eight_bits)
    x = torch.randn(3, 64)
    x[1, 7] = torch.nan
    banned = torch.tensor([[2, token] for token in range(80)] + [[-1, 0]])
    ids, logprobs = linear.best(x, 4, banned)
    assert logprobs[0].isfinite().all()
    assert logprobs[1].isnan().all()
    assert logprobs[2].tolist() == [-torch.inf] * 4
    assert [len(set(own)) for own in ids.tolist()] == [4] * 3
    assert [own.size(1) for own in linear.best(x, 200, banned)] == [80, 80]


@pytest.mark.parametrize("n_in", [64, 96, 30])
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n_common", [5, 300])
def test_rows_that_choose_among_a_list_each(
    eight_bits: Kernels, n_in: int, n_threads: int, n_common: int
) -> None:
    """And what is common: as of all logits where others are impossible, whoever stands beside a row."""
    torch.manual_seed(n_in)
    linear = KernelInt8Linear(torch.randn(700, n_in), torch.randn(700), eight_bits)
    first, *rest = torch.split(torch.randperm(700)[: n_common + 395], [n_common, 200, 3, 129, 0, 63])
    sizes = [200, 200, 3, 129, 129, 129, 0, 63, 63, 63]  # neighbours of one size have one list
    ids = {len(own): own.sort().values for own in rest}
    common, lists = (
        linear.select(first.sort().values),
        {size: linear.select(own) for size, own in ids.items()},
    )
    x = torch.randn(len(sizes), n_in)
    x[4, 2] = torch.nan
    bans = [
        (1, int(ids[200][0])),
        (5, int(ids[129][-1])),
        (-1, int(ids[63][7])),
        (9, int(first[0])),
        (-1, int(first[3])),
    ]
    banned = torch.tensor(bans)
    logits = linear(x)
    others = torch.ones_like(logits, dtype=torch.bool)
    for row, size in enumerate(sizes):
        others[row, first] = others[row, ids[size]] = False
    logits[others & ~logits.isnan()] = -torch.inf
    for row, token in bans:
        logits[row if row >= 0 else slice(None), token] = -torch.inf
    wanted, values = eight_bits.best_tokens(logits, 8)
    torch.set_num_threads(n_threads)
    try:
        found, logprobs = linear.best_listed(x, common, [lists[size] for size in sizes], 8, banned)
    finally:
        torch.set_num_threads(1)
    assert logprobs[4].isnan().all()
    for row in [0, 1, 2, 3, *range(5, 10)]:
        possible = values[row] > -torch.inf
        assert torch.equal(found[row, possible], wanted[row, possible])
        assert logprobs[row, ~possible].tolist() == [-torch.inf] * int((~possible).sum())
        torch.testing.assert_close(logprobs[row, possible], values[row, possible], rtol=0, atol=1e-5)
        mine = [(min(to, 0), token) for to, token in bans if to in (-1, row)]
        alone = linear.best_listed(x[row : row + 1], common, [lists[sizes[row]]], 8, torch.tensor(mine))
        assert torch.equal(alone[0][0], found[row])
        assert torch.equal(alone[1][0], logprobs[row])


def test_all_of_a_row_with_what_is_no_number_has_none(native: Kernels) -> None:
    """What is impossible in it, too: it stands first in a row, and a caller looks there."""
    logits = torch.full((1, 100), torch.nan)
    logits[0, :4] = -torch.inf
    assert native.best_tokens(logits, 3)[1].isnan().all()


def drawn(
    native: Kernels, logits: Tensor, params: list[SamplingParams], uniform: list[float], logprobs: bool = True
) -> tuple[Tensor, Tensor]:
    rows = SamplingRows.stack(params)
    numbers = torch.tensor(uniform, dtype=torch.float64)
    return native.draw_tokens(logits, rows.temperature, rows.top_k, rows.top_p, numbers, logprobs=logprobs)


@pytest.mark.parametrize("vocab_size", [7, 64, 420, 3000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_tokens_are_drawn_as_torch_draws_them(native: Kernels, vocab_size: int, spread: float) -> None:
    """Every set of filters, numbers that fall all over the distribution, tied logits and impossible ones."""
    torch.manual_seed(vocab_size)
    rng = random.Random(vocab_size)
    n_rows, n_rounds, different = 24, 12, 0
    for _ in range(n_rounds):
        logits = spread * torch.randn(n_rows, vocab_size)
        logits[::3] = (2 * logits[::3]).round() / 2
        logits[:, 3] = -torch.inf
        params = [
            SamplingParams(
                temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
                top_k=rng.choice([0, 0, 1, 2, 5, 50, 5000]),
                top_p=rng.choice([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
            )
            for _ in range(n_rows)
        ]
        uniform = [rng.random() for _ in range(n_rows)]
        ids, logprobs = drawn(native, logits, params, uniform)
        near = [
            sample(logits, SamplingRows.stack(params), torch.tensor(shifted, dtype=torch.float64).clamp(0, 1))
            for shifted in (uniform, *([u + d for u in uniform] for d in (-1e-5, 1e-5)))
        ]
        # Which of two equals stands at the border of top_p is nobody's promise; elsewhere nothing differs.
        for row in range(n_rows):
            agrees = int(ids[row]) in [int(each[row]) for each in near]
            assert agrees or (row % 3 == 0 and params[row].top_p < 1)
            different += not agrees
        wanted = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, wanted, rtol=1e-5, atol=1e-5)
        one = drawn(native, logits[5:6], params[5:6], uniform[5:6])
        assert torch.equal(one[0], ids[5:6])
        assert torch.equal(one[1], logprobs[5:6])
    assert different < 0.2 * n_rows * n_rounds


def test_of_equals_at_the_border_the_first_stay(native: Kernels) -> None:
    """Half of the mass of four equal ones is the first two of them; of three by number, all equals stay."""
    logits = torch.full((1, 70), -torch.inf)
    logits[0, [9, 20, 40, 69]] = 1.0
    for filters, kept in (
        ({"top_p": 0.5}, [9, 20]),
        ({"top_p": 0.51}, [9, 20, 40]),
        ({"top_k": 3}, [9, 20, 40, 69]),
        ({"top_k": 1, "top_p": 0.25}, [9]),
    ):
        params = SamplingParams(temperature=0.7, **filters)
        found = {int(drawn(native, logits, [params], [i / 40])[0]) for i in range(40)}
        assert sorted(found) == kept


def test_the_number_that_is_nearly_one_draws_what_is_possible(native: Kernels) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 1000)
    logits[0, 900:] = -torch.inf
    nearly = math.nextafter(1.0, 0.0)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9, top_k=40)):
        found = int(drawn(native, logits, [params], [nearly])[0])
        kept = top_p_mask(logits, torch.tensor([0.9])) if params.top_p < 1 else logits > -torch.inf
        assert kept[0, found]
        assert found > 700


def test_top_p_at_a_border_where_sums_differ_by_their_order(native: Kernels) -> None:
    """A plateau of equal logits, whose share of the mass is the border itself, give or take rounding."""
    logits = torch.full((1, 40_000), -3.3)
    logits[0, :32_000] = -0.3
    logits[0, 0] = 0.0
    share = float(logits.double().softmax(-1)[0, :32_000].sum())
    for nudge in (-1e-6, -5e-7, 0.0, 5e-7, 1e-6, 5e-6):
        params = SamplingParams(temperature=1.0, top_p=share * (1 + nudge))
        for number in (0.99, 0.999, 1 - 1e-9):
            assert int(drawn(native, logits, [params], [number])[0]) < 32_500


def test_what_is_too_small_for_a_float_keeps_the_greatest(native: Kernels) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 20.0, 3.0]])
    for params in (
        SamplingParams(temperature=1.0, top_p=1e-46),
        SamplingParams(temperature=1.0, top_p=1e-40),
        SamplingParams(temperature=1e-38),
        SamplingParams(temperature=1e-38, top_k=2, top_p=0.5),
    ):
        for each in (logits, -logits.abs()):
            ids, logprobs = drawn(native, each, [params], [0.9])
            assert int(ids) == int(each.argmax())
            assert logprobs.isfinite().all()


def test_nothing_is_drawn_from_what_is_no_number(native: Kernels) -> None:
    logits = torch.zeros(5, 200)
    logits[0, 150], logits[1], logits[2, 3] = torch.nan, -torch.inf, torch.inf
    for temperature in (0.0, 1.0):
        for logprobs in (True, False):
            params = [SamplingParams(temperature=temperature, top_p=0.5)] * 5
            found = drawn(native, logits, params, [0.5] * 5, logprobs)[1]
            assert found[:3].isnan().all()
            assert found[3:].isfinite().all()
    assert (found[3:] == 0).all()


KINDS: dict[str, dict[str, object]] = {
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary", "bias": False},
    "grouped": {"n_kv_heads": 2, "positions": "rotary"},
    "normed": {"n_kv_heads": 1, "positions": "rotary", "qk_norm": True, "norm": "rms"},
    "window": {"window": 3, "positions": "rotary"},
}


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["causal_lm", "translator"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_the_uncached_model(native: Kernels, architecture: str, kind: str) -> None:
    """A token a step in rows 1 .. 3 of a cache."""
    torch.manual_seed(5)
    model = build_model(tiny_config(architecture, **KINDS[kind])).eval()
    assert isinstance(model, CausalLM | Translator)
    texts = torch.randint(9, 40, (3, 9))
    sources = torch.randint(9, 40, (3, 7))
    wanted = model(sources, texts) if isinstance(model, Translator) else model(texts)
    encoded = model.encode(sources)[0] if isinstance(model, Translator) else None
    assert kernels_of(model) is None
    optimise(model, kernels=native)
    assert kernels_of(model) is native
    cache = make_cache(model.config, 5, 12, "cpu", torch.float32)
    memory = memory_spans = None
    if encoded is not None:
        assert isinstance(model, Translator)
        stored, memory_spans = (
            make_cache(model.config, 3, 8, "cpu", torch.float32),
            RowSpans(torch.full((3,), 6)),
        )
        stored.write(0, model.decoder.project_memory(encoded))
        memory = stored.read(0, 3, 7)
    for step in range(9):
        positions = torch.full((3, 1), step)
        view = cache.view(1, positions, step + 1)
        spans = RowSpans(positions[:, 0].contiguous())
        hidden = model.decoder(texts[:, step : step + 1], positions, spans, view, memory, memory_spans)
        logits: Tensor = model.head(hidden)[:, 0]
        torch.testing.assert_close(logits, wanted[:, step], rtol=1e-4, atol=1e-5)
    if encoded is not None:  # memory as it is projected, its heads side by side, goes torch's way
        assert isinstance(model, Translator)
        memory = model.decoder.project_memory(encoded)
        hidden = model.decoder(texts[:, 8:], positions, spans, view, memory, memory_spans)
        logits = model.head(hidden)[:, 0]
        torch.testing.assert_close(logits, wanted[:, 8], rtol=1e-4, atol=1e-5)


BLOCKS: dict[str, dict[str, object]] = {
    "as the paper has them": {"norm_first": False, "activation": "relu"},
    "rotary": {"positions": "rotary", "activation": "gelu"},
    "grouped": {"n_kv_heads": 2, "positions": "rotary", "activation": "gelu_tanh", "bias": False},
    "gated": {"norm": "rms", "gated": True, "activation": "silu", "bias": False},
    "coarse": {"activation": "gelu_sigmoid", "window": 3},
    "post-norm": {"activation": "silu", "norm": "rms", "norm_first": False},
}


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["causal_lm", "translator"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_in_one_call_say_what_they_say_one_by_one(
    eight_bits: Kernels, architecture: str, kind: str
) -> None:
    torch.manual_seed(9)
    model = build_model(tiny_config(architecture, **BLOCKS[kind])).eval()
    for name, parameter in model.named_parameters():  # biases and norms that do something
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5 if "norm" in name else 0.0, std=0.3)
    optimise(model, "int8", eight_bits)
    assert isinstance(model, CausalLM | Translator)
    assert isinstance(model.decoder, KernelDecoder)
    memory = memory_spans = None
    if isinstance(model, Translator):
        stored = make_cache(model.config, 4, 8, "cpu", torch.float32)
        for row, source in enumerate(torch.randint(9, 40, (2, 1, 7))):
            stored.write(2 * row, model.decoder.project_memory(model.encode(source)[0].expand(2, -1, -1)))
        memory, memory_spans = stored.read(0, 4, 7, 2), RowSpans(torch.tensor([6, 3]))
    texts, steps = (
        torch.randint(9, 40, (4, 6)),
        [torch.tensor([step, 0, step // 2, step]) for step in range(6)],
    )
    said: dict[type[Decoder], list[Tensor]] = {}
    ways: tuple[type[Decoder], ...] = KernelDecoder, Decoder
    for way in ways:
        decoder: Decoder = model.decoder
        decoder.__class__ = way
        cache = make_cache(model.config, 5, 6, "cpu", torch.float32)
        said[way] = [
            model.decoder(
                texts[:, step : step + 1],
                last[:, None],
                RowSpans(last),
                cache.view(1, last[:, None], 6),
                memory,
                memory_spans,
            )
            for step, last in enumerate(steps)
        ]
    for found, wanted in zip(said[KernelDecoder], said[Decoder], strict=True):
        # Sums in another order may tip a rounding to 8 bits, a step of a 127th, of few numbers.
        assert (found - wanted).abs().median() < 1e-5
        assert (found - wanted).norm() < 1e-2 * wanted.norm()
    assert not torch.allclose(said[Decoder][-1], said[Decoder][0], atol=0.1)


@torch.inference_mode()
@pytest.mark.parametrize("kind", BLOCKS)
def test_tokens_of_several_rows_in_one_call_are_as_if_alone(eight_bits: Kernels, kind: str) -> None:
    """To the last bit, what they say and what they leave in the cache."""
    torch.manual_seed(8)
    model = build_model(tiny_config("causal_lm", **BLOCKS[kind])).eval()
    assert isinstance(model, CausalLM)
    optimise(model, "int8", eight_bits)
    lengths = [4, 1, 7, 4]
    rows = [row for row, length in enumerate(lengths, 1) for _ in range(length)]
    places = torch.tensor([place for length in lengths for place in range(length)])
    ids = torch.randint(9, 40, (len(rows), 1))
    caches = [make_cache(model.config, 6, 8, "cpu", torch.float32) for _ in range(3)]
    spans = RowSpans(places, rows=torch.tensor(rows))
    together = model.decoder(ids, places[:, None], spans, caches[0].whole())
    one_by_one = torch.cat(
        [
            model.decoder(
                ids[[i]], place[None, None], RowSpans(place[None]), caches[1].view(row, place[None, None], 8)
            )
            for i, (row, place) in enumerate(zip(rows, places, strict=True))
        ]
    )
    assert torch.equal(together, one_by_one)
    for part in (slice(0, 6), slice(6, None)):  # a prompt in two parts, beside others
        spans = RowSpans(places[part], rows=torch.tensor(rows[part]))
        assert torch.equal(
            model.decoder(ids[part], places[part, None], spans, caches[2].whole()), together[part]
        )
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[2].v)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["masked_lm", "translator"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_texts_in_one_call_say_what_they_say_block_by_block(
    eight_bits: Kernels, architecture: str, kind: str
) -> None:
    torch.manual_seed(12)
    changes = {key: value for key, value in BLOCKS[kind].items() if key != "window"}
    model = build_model(tiny_config(architecture, **changes)).eval()
    assert not isinstance(model, CausalLM)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5 if "norm" in name else 0.0, std=0.3)
    optimise(model, "int8", eight_bits)
    encoder: Encoder = model.encoder
    assert isinstance(encoder, KernelEncoder)
    lengths = [9, 1, 4, 9]
    ids = torch.zeros(4, 9, dtype=torch.long)  # padded
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(9, 40, (length,))
    said: dict[type[Encoder], Tensor] = {}
    ways: tuple[type[Encoder], ...] = KernelEncoder, Encoder
    for way in ways:
        encoder.__class__ = way  # type: ignore[assignment]
        said[way] = encoder(ids, padding_mask(ids, 0))
    encoder.__class__ = KernelEncoder
    found, wanted = (torch.cat([said[way][i, :n] for i, n in enumerate(lengths)]) for way in ways)
    # One number that tips to another step in a first layer moves all of its text a little.
    assert (found - wanted).abs().median() < 1e-5
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    for row, length in enumerate(lengths):
        found = said[KernelEncoder][row, :length]
        alone = ids[row : row + 1, :length]
        for mask in (padding_mask(alone, 0), None):  # to the last bit
            assert torch.equal(encoder(alone, mask)[0], found)


@torch.inference_mode()
def test_long_texts_go_block_by_block(eight_bits: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(13)
    model = build_model(tiny_config("masked_lm", max_len=128)).eval()
    optimise(model, "int8", eight_bits)
    assert not isinstance(model, CausalLM)
    calls: list[object] = []
    monkeypatch.setattr(eight_bits, "run_blocks", lambda *arguments: calls.append(arguments))
    ids = torch.randint(9, 40, (2, 97))
    model.encoder(ids, None)
    assert not calls
    model.encoder(ids[:, :96], None)
    assert len(calls) == 1


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@torch.inference_mode()
def test_only_what_is_read_of_texts_is_computed(
    positions: str, eight_bits: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(14)
    model = build_model(tiny_config("masked_lm", positions=positions)).eval()
    optimise(model, "int8", eight_bits)
    assert not isinstance(model, CausalLM)
    run, n_rows = eight_bits.run_blocks, []

    def counting(*arguments: Any) -> None:
        n_rows.append(arguments[2].n_rows)
        run(*arguments)

    monkeypatch.setattr(eight_bits, "run_blocks", counting)
    ids, mask = torch.randint(9, 40, (3, 12)), torch.ones(3, 1, 1, 12, dtype=torch.bool)
    mask[0, ..., 3], mask[1], mask[2, ..., 7:] = False, False, False  # a hole, nothing, an end
    found = model.encoder(ids, mask)
    assert n_rows == [11 + 7]
    encoder, seen = model.encoder, mask.view(3, 12)
    encoder.__class__ = Encoder
    wanted = encoder(ids[[0, 2]], mask[[0, 2]])[seen[[0, 2]]]
    assert (found[seen] - wanted).norm() < 1e-2 * wanted.norm()
    assert found.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["masked_lm", "translator"])
def test_short_texts_do_not_feel_a_long_one_beside_them(
    eight_bits: Kernels, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.kernel_blocks.LONGEST", 5)
    torch.manual_seed(15)
    model = build_model(tiny_config(architecture)).eval()
    assert not isinstance(model, CausalLM)
    optimise(model, "int8", eight_bits)
    assert isinstance(model.encoder, KernelEncoder)
    lengths = [9, 1, 5, 4, 8]
    ids = torch.zeros(5, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(9, 40, (length,))
    segments = None if architecture == "translator" else (ids % 2)
    together = model.encoder(ids, padding_mask(ids, 0), segments)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, :length]
        alone = model.encoder(own, padding_mask(own, 0), None if segments is None else own % 2)
        if length <= 5:
            assert torch.equal(together[row, :length], alone[0])
        else:
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=2e-2)


def test_blocks_that_the_kernel_does_not_know_stay_as_they_are(eight_bits: Kernels) -> None:
    for changes in ({"qk_norm": True}, {"d_ff": 48}):
        model = build_model(tiny_config("causal_lm", **changes)).eval()
        optimise(model, "int8", eight_bits)
        assert isinstance(model, CausalLM)
        assert isinstance(model.decoder, KernelDecoder) == ("d_ff" in changes)
    plain = build_model(tiny_config("causal_lm")).eval()
    optimise(plain, kernels=eight_bits)
    assert not isinstance(plain.decoder, KernelDecoder)


@torch.inference_mode()
def test_a_row_of_a_step_does_not_feel_its_neighbours(eight_bits: Kernels) -> None:
    """In 8 bits, too, to the last bit: alone, among others, and beside one that holds no numbers."""
    torch.manual_seed(10)
    model = build_model(tiny_config("causal_lm", positions="rotary")).eval()
    optimise(model, "int8", eight_bits)
    assert isinstance(model, CausalLM)
    cache = make_cache(model.config, 7, 4, "cpu", torch.float32)

    def step(first: int, ids: list[int], place: int) -> Tensor:
        places = torch.full((len(ids),), place)
        view = cache.view(first, places[:, None], place + 1)
        hidden: Tensor = model.decoder(torch.tensor(ids)[:, None], places[:, None], RowSpans(places), view)
        return hidden

    for place, token in enumerate([11, 12, 13]):
        alone = step(0, [token], place)
        crowd = step(1, [20 + place, token, 30, 31, 32, 33], place)
        assert torch.equal(crowd[1], alone[0])
        cache.k[:, 5, :, 0] = torch.nan
    assert crowd[4].isnan().all()
    assert crowd[[0, 1, 2, 3, 5]].isfinite().all()


@torch.inference_mode()
def test_spans_mean_the_same_to_torchs_way() -> None:
    torch.manual_seed(6)
    model = build_model(tiny_config("causal_lm", window=3)).eval()
    assert isinstance(model, CausalLM)
    texts, cache = torch.randint(9, 40, (2, 6)), make_cache(model.config, 2, 6, "cpu", torch.float32)
    wanted = model(texts)
    for step in range(6):
        positions = torch.full((2, 1), step)
        spans = RowSpans(positions[:, 0])
        hidden = model.decoder(
            texts[:, step : step + 1], positions, spans, cache.view(0, positions, step + 1)
        )
        logits: Tensor = model.head(hidden)[:, 0]
        torch.testing.assert_close(logits, wanted[:, step], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_other_number_formats_go_torchs_way(native: Kernels) -> None:
    model = build_model(tiny_config("causal_lm")).to(torch.bfloat16)
    optimise(model, kernels=native)
    assert kernels_of(model) is None


SAYS = 'for a; do target=$out; out=$a; [ "$target" = -o ] && break; done\n'
COMPILERS: dict[str, tuple[str, str]] = {
    "fails in silence": ("exit 3", "ended with 3"),
    "says why": ("echo kernels.c: In function >&2; echo kernels.c:1: error: so >&2; exit 1", "error: so"),
    "says it in other letters": (r"printf '\377 no\n' >&2; exit 1", "\ufffd no"),
    "takes too long": ("echo wait >&2; exec sleep 60", "more than 1 seconds"),
    "makes nothing": ("exit 0", "No such file"),
    "makes something else": (SAYS + 'echo something >"$out"', "too short"),
}


@pytest.mark.parametrize(("script", "told"), COMPILERS.values(), ids=COMPILERS)
def test_a_compiler_that_fails_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, script: str, told: str
) -> None:
    compiler = tmp_path / "my cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}' -g")
    monkeypatch.setattr(kernels, "_COMPILE_SECONDS", 1.0)
    with caplog.at_level(logging.INFO, "model.kernels"):
        assert kernels.compiled.__wrapped__() is None
    (record,) = caplog.records
    assert "was not compiled" in record.message
    assert told in record.message
    assert "\n" not in record.message


@pytest.mark.parametrize("compiler", ["no-such-compiler", "cc '"])
def test_neither_is_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert kernels.compiled.__wrapped__() is None
    assert "was not compiled" in caplog.text


def test_neither_is_a_machine_without_a_folder_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert kernels.compiled.__wrapped__() is None
    assert "no usable temporary directory" in caplog.text


def test_without_a_compiler_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", " ")
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO, "model.kernels"):
        assert kernels.compiled.__wrapped__() is None
    assert "no C compiler" in caplog.text
