"""Cached decoding equals uncached decoding, token for token and logit for logit."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.cache import KVCache, zeros
from model.masks import length_mask, position_mask
from model.models import CausalLM, Translator, build_model, make_cache
from tests.tiny import tiny_config

KINDS: dict[str, dict[str, object]] = {
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned"},
    "rotary": {"positions": "rotary"},
    "post-norm": {"norm_first": False, "activation": "relu"},
    "rms": {"norm": "rms", "activation": "silu", "bias": False},
    "gated": {"gated": True, "activation": "silu"},
    "grouped": {"n_kv_heads": 2, "positions": "rotary"},
    "one kv head": {"n_kv_heads": 1},
}
PROMPTS = [[1, 7, 9, 11, 30], [1, 8], [1, 12, 13, 14, 15, 16, 17]]
SOURCES = [[6, 20, 21, 22, 2], [6, 23, 2], [6, 24, 25, 26, 27, 28, 29, 2]]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


class Cached:
    """Rows of different lengths through one cache, as a server would run them."""

    def __init__(self, model: CausalLM | Translator, sources: Sequence[Sequence[int]] | None = None) -> None:
        self.model, self.n = model, len(sources) if sources else 0
        self.cache = make_cache(model.config, 6, 32, "cpu", torch.float32)
        self.memory: KVCache | None = None
        self.memory_mask: Tensor | None = None
        if sources and isinstance(model, Translator):
            src, lengths = padded(sources)
            self.memory = make_cache(model.config, 6, src.size(1) + 3, "cpu", torch.float32)
            self.memory.write(0, model.decoder.project_memory(model.encode(src)[0]))
            self.memory_mask = length_mask(lengths, src.size(1) + 3)

    def run(self, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        view = self.cache.view(0, positions, length)
        n = len(token_ids)
        memory = self.memory.read(0, n, self.memory.max_len) if self.memory else None
        mask = position_mask(positions, length)
        hidden = self.model.decoder(token_ids, positions, mask, view, memory, self.memory_mask)
        logits: Tensor = self.model.head(hidden)
        return logits

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits after each prompt (B, V)."""
        token_ids, lengths = padded(prompts)
        positions = torch.arange(token_ids.size(1)).expand_as(token_ids)
        logits = self.run(token_ids, positions, token_ids.size(1))
        return logits[torch.arange(len(prompts)), lengths - 1]

    def step(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Feed the last token of each row; logits (B, V)."""
        positions = torch.tensor([[len(row) - 1] for row in rows])
        length = max(map(len, rows))
        return self.run(torch.tensor([[row[-1]] for row in rows]), positions, length)[:, 0]


def uncached(model: CausalLM | Translator, rows: Sequence[Sequence[int]], sources: list[list[int]]) -> Tensor:
    """Each row alone, from its beginning (B, V)."""
    out = []
    for i, row in enumerate(rows):
        ids = torch.tensor([list(row)])
        logits = model(torch.tensor([sources[i]]), ids) if isinstance(model, Translator) else model(ids)
        out.append(logits[0, -1])
    return torch.stack(out)


def make(architecture: str, changes: dict[str, object]) -> CausalLM | Translator:
    torch.manual_seed(5)
    model = build_model(tiny_config(architecture, **changes)).eval()
    assert isinstance(model, CausalLM | Translator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["causal_lm", "translator"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(architecture: str, kind: str) -> None:
    model = make(architecture, KINDS[kind])
    rows = [list(prompt) for prompt in PROMPTS]
    cached = Cached(model, SOURCES if architecture == "translator" else None)
    logits = cached.prefill(rows)
    for _ in range(8):
        expected = uncached(model, rows, SOURCES)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
        logits = cached.step(rows)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["causal_lm", "translator"])
def test_rows_change_places(architecture: str) -> None:
    """copy_rows reads everything before it writes: a permutation and a fork in one call."""
    model = make(architecture, {"positions": "rotary"})
    rows = [list(prompt) for prompt in PROMPTS]
    cached = Cached(model, SOURCES if architecture == "translator" else None)
    cached.prefill(rows)
    order = [2, 0, 0]
    cached.cache.copy_rows(order, [0, 1, 2], max(map(len, rows)))
    if cached.memory and cached.memory_mask is not None:
        cached.memory.copy_rows(order, [0, 1, 2], cached.memory.max_len)
        cached.memory_mask = cached.memory_mask[order]
    moved = [[*rows[i], 18 + n] for n, i in enumerate(order)]
    expected = uncached(model, moved, [SOURCES[i] for i in order])
    torch.testing.assert_close(cached.step(moved), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sources", "targets"), [([3, 3, 1], [0, 2, 4]), ([0, 1], [1, 0])])
def test_copied_rows_are_those_that_an_indexed_copy_gives(sources: list[int], targets: list[int]) -> None:
    """Apart, and where a row is both source and target; positions past the length stay."""
    cache = KVCache(2, 5, 1, 4, 2)
    cache.k.copy_(torch.arange(80.0).view_as(cache.k))
    cache.v.copy_(-cache.k)
    wanted = cache.k.clone()
    wanted[:, targets, :, :3] = cache.k[:, sources, :, :3]
    cache.copy_rows(sources, targets, 3)
    assert torch.equal(cache.k, wanted)
    assert torch.equal(cache.v, -wanted)


@torch.no_grad()
def test_a_chunked_prompt_equals_a_whole_one() -> None:
    model = make("causal_lm", {"positions": "rotary"})
    whole, parts = Cached(model), Cached(model)
    prompt = torch.tensor([PROMPTS[2]])
    positions = torch.arange(7)[None]
    expected = whole.run(prompt, positions, 7)
    parts.run(prompt[:, :3], positions[:, :3], 3)
    torch.testing.assert_close(parts.run(prompt[:, 3:], positions[:, 3:], 7), expected[:, 3:])


@torch.no_grad()
def test_a_reused_slot_forgets_its_last_row() -> None:
    model = make("causal_lm", {})
    cached = Cached(model)
    cached.prefill([[1, *range(6, 26)]])
    torch.testing.assert_close(cached.prefill([[1, 8]]), uncached(model, [[1, 8]], []), rtol=1e-4, atol=1e-5)


def test_a_view_outside_the_buffers_is_refused() -> None:
    cache = KVCache(1, 2, 1, 8, 4)
    with pytest.raises(IndexError, match=r"rows 1\.\.3 of 2"):
        cache.view(1, torch.zeros(2, 1, dtype=torch.long), 4)
    with pytest.raises(IndexError, match="length 9 of 8"):
        cache.view(0, torch.zeros(2, 1, dtype=torch.long), 9)


def test_bytes_are_counted() -> None:
    assert KVCache(2, 3, 1, 8, 4, dtype=torch.bfloat16).n_bytes == 2 * (2 * 3 * 1 * 8 * 4) * 2


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_rows_that_nobody_needs_take_no_memory() -> None:
    before = _resident()
    cache = KVCache(2, 64, 4, 1024, 64)
    assert cache.n_bytes == 2**28
    assert _resident() - before < 2**26
    assert not cache.k[1, 63].any()
    cache.k[1, 63] = 1.0
    assert cache.k[1, 63].all()
    assert not cache.k[1, 62].any()


@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_those_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert torch.equal(zeros(shape, device="cpu", dtype=dtype), torch.zeros(shape, dtype=dtype))


def test_no_room_for_a_cache_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes of a cache"):
        zeros((2**56,), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu", 0), "meta"])
def test_zeros_lie_on_any_device(device: torch.device | str) -> None:
    made = zeros((2, 3), device=device, dtype=torch.float32)
    assert made.device.type == torch.device(device).type
