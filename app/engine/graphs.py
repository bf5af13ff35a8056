"""A decode step without anything that depends on data: static buffers, few shapes, no waiting for the device.

On a GPU each shape is one CUDA graph, captured when the model is loaded, so that a step costs one launch in
place of hundreds. The same code runs on a CPU as it is, which is how tests compare it with the plain step.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("app.engine")

_LEAST_LENGTH = 128
_WARM_UP_RUNS = 2  # before a capture: libraries allocate and choose their kernels at the first calls

Work = Callable[[], None]
# (token ids, positions, memory lengths, each (B,); the length that is read) -> logits (B, V), float32
Compute = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def doubling(least: int, most: int) -> list[int]:
    """least, twice that, and so on, below `most`; and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def at_least(sizes: Iterable[int], wanted: int) -> int:
    """The smallest of the sizes, which ascend, that is enough."""
    return next(size for size in sizes if size >= wanted)


class Launcher:
    """How a step's work gets to a device: at once, operation by operation."""

    captures = False  # is there anything to gain by `record`?

    def record(self, work: Work) -> Work:
        """The same work in one launch, to be done again and again. Raises what stands in the way of that."""
        return work


class CudaLauncher(Launcher):
    """Records work as CUDA graphs whose memory is one pool: they must run one after the other."""

    captures = True

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def record(self, work: Work) -> Work:
        self._warm_up(work)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context, because a capture that fails leaves its own stream behind as the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                # In its own thread's name alone: a model may be loaded while the device thread runs others.
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                work()
        except Exception:
            self._pool = None  # it may count as in use for ever: what follows begins another
            raise
        self._pool = graph.pool()
        return graph.replay

    def _warm_up(self, work: Work) -> None:
        """On a side stream, as torch's notes on CUDA graphs ask for."""
        present = torch.cuda.current_stream()
        self._stream.wait_stream(present)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP_RUNS):
                    work()
        finally:
            present.wait_stream(self._stream)


def make_launcher(device: torch.device) -> Launcher:
    """The one that suits a device."""
    return CudaLauncher() if device.type == "cuda" else Launcher()


class StaticStep:
    """`compute` over static inputs, for a bucket of rows and a bucket of lengths.

    Rows past those asked for read token 0 at position 0: they are free, and nobody reads what they write.
    """

    def __init__(
        self,
        compute: Compute,
        n_slots: int,
        max_len: int,
        vocab_size: int,
        device: torch.device,
        launcher: Launcher,
    ) -> None:
        self._compute, self._launcher = compute, launcher
        self.row_sizes, self.lengths = doubling(1, n_slots), doubling(_LEAST_LENGTH, max_len)
        self._staged = torch.zeros(3, n_slots, dtype=torch.long, pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(3, n_slots, dtype=torch.long, device=device)
        self._logits = torch.zeros(n_slots, vocab_size, device=device)
        self._recorded: dict[tuple[int, int], Work] = {}

    def run(self, token_ids: list[int], positions: list[int], memory_lengths: list[int]) -> Tensor:
        """Logits (B, V) of the first B rows, to be read before the next run."""
        n_rows = len(token_ids)
        rows = at_least(self.row_sizes, n_rows)
        length = at_least(self.lengths, max(max(positions) + 1, *memory_lengths))
        # Before the staged inputs change, what was copied from them last must have arrived: the logits of
        # that step have been read since.
        self._staged.zero_()
        self._staged[:, :n_rows] = torch.tensor([token_ids, positions, memory_lengths])
        self._inputs.copy_(self._staged, non_blocking=True)
        self._recorded.get((rows, length), self._work(rows, length))()
        return self._logits[:n_rows]

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every shape, the largest first, so that the smaller ones find their memory in its pool.

        A shape that cannot be recorded is logged, and runs operation by operation from then on.
        """
        failed: dict[str, list[str]] = defaultdict(list)
        for rows in reversed(self.row_sizes):
            for length in reversed(self.lengths):
                try:
                    self._recorded[rows, length] = self._launcher.record(self._work(rows, length))
                except Exception as error:
                    failed[_story(error)].append(f"{rows} x {length}")
        log.info("captured %d decode graphs", len(self._recorded))
        for story, shapes in failed.items():
            log.warning("no decode graph for rows x length %s: %s", ", ".join(shapes), story)

    def _work(self, rows: int, length: int) -> Work:
        def work() -> None:
            token_ids, positions, memory_lengths = self._inputs[:, :rows]
            self._logits[:rows] = self._compute(token_ids, positions, memory_lengths, length)

        return work


def _story(error: BaseException) -> str:
    """What went wrong first: ending a broken capture raises something of its own."""
    while error.__context__ is not None:
        error = error.__context__
    first_line, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line}"
