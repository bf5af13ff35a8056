"""The step of few shapes, without a graph, beside the step over exactly what there is."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.drawing import Level
from app.engine.graphs import Launcher, StaticStep, Work, at_least, doubling, make_launcher
from app.engine.runner import GenerateRunner, TranslateRunner
from model.checkpoint import Checkpoint
from model.models import build_model
from model.tokenizer import Tokenizer
from tests.tiny import fitting_config


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

    step = StaticStep(compute, 6, 512, 7, torch.device("cpu"), Launcher())
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

    step = StaticStep(compute, 4, 128, 3, torch.device("cuda"), make_launcher(torch.device("cuda")))
    step.capture()
    n_calls = len(calls)
    assert step.run([1, 2], [3, 4], [5, 6])[:, 0].tolist() == [531, 642]
    assert step.run([7, 7, 7], [0, 0, 0], [0, 0, 1])[:, 2].tolist() == [7, 7, 107]
    assert len(calls) == n_calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_a_capture_that_fails_on_a_gpu_does_no_harm() -> None:
    def compute(ids: torch.Tensor, at: torch.Tensor, memory: torch.Tensor, length: int) -> torch.Tensor:
        if len(ids) == 2:
            ids.sum().item()
        return (ids + 10 * at + 100 * memory)[:, None].float().expand(-1, 3)

    cuda = torch.device("cuda")
    step = StaticStep(compute, 4, 128, 3, cuda, make_launcher(cuda))
    step.capture()
    assert {rows for rows, _, _ in step._recorded} == {1, 4}
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for n_rows in (1, 2, 3, 4):
        ids = list(range(n_rows))
        wanted = [token + 10 * token + 100 * token for token in ids]
        assert step.run(ids, ids, ids)[:, 0].tolist() == wanted


# Capture that fails in part


class FakeLauncher(Launcher):
    """Records the work itself; has no room for some of it."""

    captures = True

    def __init__(self, fails: Callable[[int], Exception | None]) -> None:
        self.fails, self.n_recorded, self.n_replayed = fails, 0, 0

    def record(self, work: Work) -> Work:
        self.n_recorded += 1
        error = self.fails(self.n_recorded)
        if error is not None:
            try:
                raise error
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay() -> None:
            self.n_replayed += 1
            work()

        return replay


def squares(ids: torch.Tensor, at: torch.Tensor, memory: torch.Tensor, length: int) -> torch.Tensor:
    return (ids * ids + at)[:, None].float().expand(-1, 3)


def test_what_cannot_be_captured_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """The largest shapes come first; each error is told once, with its cause and its shapes."""
    errors: dict[int, Exception] = {
        1: torch.OutOfMemoryError("CUDA out of memory.\nMore"),
        2: torch.OutOfMemoryError("CUDA out of memory."),
        5: NotImplementedError("an operation"),
    }
    launcher = FakeLauncher(errors.get)
    step = StaticStep(squares, 4, 256, 3, torch.device("cpu"), launcher)
    with caplog.at_level(logging.INFO, "app.engine"):
        step.capture()
    prefix = "no decode graph for rows x length"
    assert [record.getMessage() for record in caplog.records] == [
        "captured 3 decode graphs",
        f"{prefix} 4 x 256 greedy, 4 x 128 greedy: OutOfMemoryError: CUDA out of memory.",
        f"{prefix} 1 x 256 greedy: NotImplementedError: an operation",
    ]
    for n_rows, position, n_replayed in ((4, 9, 0), (2, 200, 1), (2, 9, 2), (1, 200, 2), (1, 9, 3)):
        ids = list(range(7, 7 + n_rows))
        wanted = [float(token * token + position) for token in ids]
        assert step.run(ids, [position] * n_rows, [0] * n_rows)[:, 0].tolist() == wanted
        assert launcher.n_replayed == n_replayed


# Nothing in it waits for the device, or hangs on what the device holds


class DataDependence(Exception):
    """An operation that a CUDA graph cannot hold."""


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what reads numbers on the host, has a size that follows from numbers, or crosses devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    names = (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select"),
        *("unique", "_unique", "_unique2", "unique_consecutive", "bincount", "lift_fresh", "lift_fresh_copy"),
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        repeats = name == "repeat_interleave" and func._overloadname != "self_int"
        moves = name == "_to_copy" and kwargs.get("device", args and args[0].device) != args[0].device
        if name in self.names or by_mask or repeats or moves:
            raise DataDependence(str(func))
        with self:  # in inference mode, what an operation is made of comes to light only so
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


class NoReading(TorchFunctionMode):
    """Refuses what a tensor on a CPU does by itself, and one on a GPU by waiting."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy", "item", "__array__"):
            raise DataDependence(str(func))
        return func(*args, **(kwargs or {}))


BAD_HABITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "branch": lambda x: 1 if x[0] > 0 else 0,
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "select": lambda x: x.masked_select(x > 0),
    "index by mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "repeat": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
    "unique": lambda x: torch.unique(x),
    "equal": lambda x: torch.equal(x, x),
    "made of a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "another device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("habit", BAD_HABITS)
@torch.inference_mode()
def test_bad_habits_are_found(habit: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    with NoWaiting(), NoReading(), pytest.raises(DataDependence):
        BAD_HABITS[habit](x)


SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "rotary": {"positions": "rotary", "norm": "rms", "activation": "silu", "gated": True, "bias": False},
    "grouped": {"positions": "rotary", "n_kv_heads": 2, "qk_norm": True},
    "window": {"positions": "learned", "window": 8},
}


def random_checkpoint(architecture: str, tokenizer: Tokenizer, **changes: object) -> Checkpoint:
    torch.manual_seed(3)
    config = fitting_config(architecture, tokenizer, **changes)
    return Checkpoint(build_model(config).eval(), tokenizer, config, "random", "")


class Watched(FakeLauncher):
    """Runs the work under the watch of `NoWaiting`, as often as a capture would."""

    def __init__(self) -> None:
        super().__init__(lambda _: None)

    def record(self, work: Work) -> Work:
        with NoWaiting(), NoReading():
            work()
        return super().record(work)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [*(("causal_lm", shape) for shape in SHAPES), *(("translator", shape) for shape in ("plain", "grouped"))],
)
@torch.inference_mode()
def test_nothing_in_a_step_waits(tokenizer: Tokenizer, architecture: str, shape: str) -> None:
    checkpoint = random_checkpoint(architecture, tokenizer, **SHAPES[shape])
    kind = GenerateRunner if architecture == "causal_lm" else TranslateRunner
    runner, launcher = kind(checkpoint, 3, 64), Watched()
    runner.make_static(launcher)
    assert runner.static is not None
    assert runner.static.row_sizes == [1, 2, 3]
    assert launcher.n_recorded == 3 * (len(Level) if architecture == "causal_lm" else 1)
