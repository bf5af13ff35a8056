"""A decode step without anything that depends on data: static buffers, few shapes, no waiting for the device.

On a GPU each shape is one CUDA graph, captured when the model is loaded, so that a step costs one launch in
place of hundreds. The same code runs on a CPU as it is, which is how tests compare it with the plain step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

log = logging.getLogger("app.engine")

_LEAST_LENGTH = 128
_WARM_UP_RUNS = 2  # before a capture: libraries allocate and choose their kernels at the first calls

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


class StaticStep:
    """`compute` over static inputs, for a bucket of rows and a bucket of lengths.

    Rows past those asked for read token 0 at position 0: they are free, and nobody reads what they write.
    """

    def __init__(
        self, compute: Compute, n_slots: int, max_len: int, vocab_size: int, device: torch.device
    ) -> None:
        self._compute, self._device = compute, device
        self.row_sizes, self.lengths = doubling(1, n_slots), doubling(_LEAST_LENGTH, max_len)
        cuda = device.type == "cuda"
        self._staged = torch.zeros(3, n_slots, dtype=torch.long, pin_memory=cuda)
        self._inputs = torch.zeros(3, n_slots, dtype=torch.long, device=device)
        self._logits = torch.zeros(n_slots, vocab_size, device=device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

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
        graph = self._graphs.get((rows, length))
        if graph is None:
            self._compute_into(rows, length)
        else:
            graph.replay()
        return self._logits[:n_rows]

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every shape, the largest first, so that the smaller ones find their memory in its pool."""
        pool = None
        for rows in reversed(self.row_sizes):
            for length in reversed(self.lengths):
                self._warm_up(rows, length)
                graph = torch.cuda.CUDAGraph()
                # In its own thread's name alone: a model may be loaded while the device thread runs others.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self._compute_into(rows, length)
                pool = pool or graph.pool()
                self._graphs[rows, length] = graph
        log.info("captured %d decode graphs", len(self._graphs))

    def _warm_up(self, rows: int, length: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._compute_into(rows, length)
        torch.cuda.current_stream().wait_stream(stream)

    def _compute_into(self, rows: int, length: int) -> None:
        token_ids, positions, memory_lengths = self._inputs[:, :rows]
        self._logits[:rows] = self._compute(token_ids, positions, memory_lengths, length)
