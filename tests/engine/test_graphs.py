"""The step of few shapes, without a graph, beside the step over exactly what there is."""

import pytest
import torch

from app.engine.graphs import StaticStep, at_least, doubling
from app.engine.runner import GenerateRunner, TranslateRunner
from model.checkpoint import Checkpoint


def test_sizes() -> None:
    assert doubling(1, 6) == [1, 2, 4, 6]
    assert doubling(128, 512) == [128, 256, 512]
    assert doubling(128, 64) == [64]
    assert [at_least([1, 2, 4, 6], n) for n in (1, 3, 5, 6)] == [1, 4, 6, 6]


def test_every_step_has_one_of_few_shapes() -> None:
    seen = []

    def compute(ids: torch.Tensor, at: torch.Tensor, memory: torch.Tensor, length: int) -> torch.Tensor:
        seen.append((len(ids), length, ids.tolist(), at.tolist(), memory.tolist()))
        return torch.ones(len(ids), 7)

    step = StaticStep(compute, 6, 512, 7, torch.device("cpu"))
    assert step.run([5, 6, 7], [3, 200, 1], [1, 2, 3]).shape == (3, 7)
    assert step.run([9], [1], [140]).shape == (1, 7)
    assert seen == [
        (4, 256, [5, 6, 7, 0], [3, 200, 1, 0], [1, 2, 3, 0]),
        (1, 256, [9], [1], [140]),
    ]


@torch.inference_mode()
def test_a_static_generation_step_equals_the_plain_one(causal: Checkpoint) -> None:
    plain, static = GenerateRunner(causal, 5, 64), GenerateRunner(causal, 5, 64)
    static.make_static()
    for runner in (plain, static):
        runner.prefill(0, [[300, 301, 302], [303], [304, 305]])
    for ids, positions in (([310, 311, 312], [3, 1, 2]), ([320, 321], [4, 2])):
        wanted = plain.step(0, ids, positions)
        torch.testing.assert_close(static.step(0, ids, positions), wanted, rtol=1e-4, atol=1e-4)
    assert static.cache.k.isfinite().all()


@torch.inference_mode()
def test_a_static_translation_step_equals_the_plain_one(translator: Checkpoint) -> None:
    plain, static = TranslateRunner(translator, 7, 64), TranslateRunner(translator, 7, 64)
    static.make_static()
    for runner in (plain, static):
        runner.encode([[0, 1], [2, 3, 4]], [[300, 301, 302], [303, 304]])
    wanted = plain.step(0, [5, 6, 310, 311, 312], [0] * 5)
    torch.testing.assert_close(static.step(0, [5, 6, 310, 311, 312], [0] * 5), wanted, rtol=1e-4, atol=1e-4)
    assert static.cache.k.isfinite().all()
    assert static.cache.v.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_a_captured_step_is_replayed() -> None:
    calls = []

    def compute(ids: torch.Tensor, at: torch.Tensor, memory: torch.Tensor, length: int) -> torch.Tensor:
        calls.append(len(ids))
        return (ids + 10 * at + 100 * memory)[:, None].float().expand(-1, 3)

    step = StaticStep(compute, 4, 128, 3, torch.device("cuda"))
    step.capture()
    n_calls = len(calls)
    assert step.run([1, 2], [3, 4], [5, 6])[:, 0].tolist() == [531, 642]
    assert step.run([7, 7, 7], [0, 0, 0], [0, 0, 1])[:, 2].tolist() == [7, 7, 107]
    assert len(calls) == n_calls
