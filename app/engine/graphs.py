"""A decode step without anything that depends on data: static buffers, few shapes, no waiting for the device.

On a GPU each shape is one CUDA graph, captured when the model is loaded, so that a step costs one launch in
place of hundreds. The same code runs on a CPU as it is, which is how tests compare it with the plain step.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from app.engine.drawing import Drawing, Level

log = logging.getLogger("app.engine")

_LEAST_LENGTH = 128
_WARM_UP_RUNS = 2  # before a capture: libraries allocate and choose their kernels at the first calls
_MAX_FLIGHTS = 2  # launches on their way: one that is read, and the one after it

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


class Mark(Protocol):
    """A place in the order of a device's work."""

    def synchronize(self) -> None:
        """Wait until the device has come by. Raises what went wrong on the way."""


class _Passed:
    """The mark of a device that has done everything when it is asked."""

    def synchronize(self) -> None:
        pass


class Launcher:
    """How a step's work gets to a device: at once, operation by operation."""

    captures = False  # is there anything to gain by `record`?

    def do(self, work: Work) -> None:
        """Give work to the device, which does it when it has done what it was given before."""
        work()

    def mark(self) -> Mark:
        """Behind all that the device was given."""
        return _Passed()

    def record(self, work: Work) -> Work:
        """The same work in one launch, to be done again and again. Raises what stands in the way of that."""
        return work


class CudaLauncher(Launcher):
    """Records work as CUDA graphs whose memory is one pool: they must run one after the other."""

    captures = True

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

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


@dataclass(frozen=True)
class _Desk:
    """The host's side of a launch: what the device fetches, and what it brings back."""

    inputs: Tensor  # (4, N): token ids, positions, memory lengths, numbers drawn in the bits of float64
    results: Tensor  # (2, N): as in `Drawing`

    @classmethod
    def make(cls, n_slots: int, *, pinned: bool) -> _Desk:
        inputs, results = (torch.zeros(n, n_slots, dtype=torch.long, pin_memory=pinned) for n in (4, 2))
        return cls(inputs, results)


class Flight:
    """A launched step on its way: what it drew for its first rows."""

    def __init__(self, results: Tensor, n_rows: int, mark: Mark) -> None:
        self._results, self._n_rows, self._mark = results, n_rows, mark

    def land(self) -> tuple[list[int], list[float]]:
        """Wait for it -> token ids and log-probabilities, per row. Raises what went wrong on the device."""
        self._mark.synchronize()
        token_ids, logprobs = self._results[:, : self._n_rows]
        return token_ids.tolist(), logprobs.view(torch.float64).tolist()


class StaticStep:
    """`compute` over static inputs, for a bucket of rows and one of lengths; `drawing` goes on to the tokens.

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
        drawing: Drawing | None = None,
    ) -> None:
        self._compute, self._launcher, self.drawing = compute, launcher, drawing
        self.row_sizes, self.lengths = doubling(1, n_slots), doubling(_LEAST_LENGTH, max_len)
        self._inputs = torch.zeros(4, n_slots, dtype=torch.long, device=device)
        self._logits = torch.zeros(n_slots, vocab_size, device=device)
        pinned = device.type == "cuda"
        # A desk comes round again when the flight before the last has landed.
        self._desks = itertools.cycle([_Desk.make(n_slots, pinned=pinned) for _ in range(_MAX_FLIGHTS)])
        self._recorded: dict[tuple[int, int, Level], Work] = {}

    def run(self, token_ids: list[int], positions: list[int], memory_lengths: list[int]) -> Tensor:
        """Logits (B, V) of the first B rows, to be read before the next run; no flight may be on its way."""
        length = max(max(positions) + 1, *memory_lengths)
        desk = self._fill(torch.tensor([token_ids, positions, memory_lengths]))
        self._start(desk, len(token_ids), length, Level.GREEDY)
        return self._logits[: len(token_ids)]

    def launch(
        self, token_ids: list[int], positions: list[int], uniform: list[float], level: Level
    ) -> Flight:
        """A step of the first B rows to the tokens that it draws, for which nobody waits yet.

        A token id may be `UNKNOWN`: the row reads what it drew last. `uniform` holds a number in [0, 1) per
        row. Two flights may be on their way, no more.
        """
        desk = self._fill(torch.tensor([token_ids, positions]))
        desk.inputs[3].view(torch.float64)[: len(uniform)] = torch.tensor(uniform, dtype=torch.float64)
        self._start(desk, len(token_ids), max(positions) + 1, level)
        self._launcher.do(lambda: self._bring(desk))
        return Flight(desk.results, len(token_ids), self._launcher.mark())

    def _fill(self, rows: Tensor) -> _Desk:
        desk = next(self._desks)
        desk.inputs.zero_()
        desk.inputs[: rows.size(0), : rows.size(1)] = rows
        return desk

    def _start(self, desk: _Desk, n_rows: int, length: int, level: Level) -> None:
        rows, length = at_least(self.row_sizes, n_rows), at_least(self.lengths, length)
        work = self._recorded.get((rows, length, level)) or self._work(rows, length, level)

        def fetch_and_work() -> None:
            self._inputs.copy_(desk.inputs, non_blocking=True)
            work()

        self._launcher.do(fetch_and_work)

    def _bring(self, desk: _Desk) -> None:
        assert self.drawing is not None
        desk.results.copy_(self.drawing.results, non_blocking=True)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every shape, the largest first, so that the smaller ones find their memory in its pool.

        A shape that cannot be recorded is logged, and runs operation by operation from then on.
        """
        failed: dict[str, list[str]] = defaultdict(list)
        levels = reversed(Level) if self.drawing else [Level.GREEDY]
        shapes = itertools.product(reversed(self.row_sizes), reversed(self.lengths), levels)
        for rows, length, level in shapes:
            try:
                self._recorded[rows, length, level] = self._launcher.record(self._work(rows, length, level))
            except Exception as error:
                failed[_story(error)].append(f"{rows} x {length} {level.name.lower()}")
        log.info("captured %d decode graphs", len(self._recorded))
        for story, names in failed.items():
            log.warning("no decode graph for rows x length %s: %s", ", ".join(names), story)

    def _work(self, rows: int, length: int, level: Level) -> Work:
        def work() -> None:
            token_ids, positions, memory_lengths, numbers = self._inputs[:, :rows]
            if self.drawing is None:
                self._logits[:rows] = self._compute(token_ids, positions, memory_lengths, length)
                return
            token_ids = self.drawing.read(token_ids, positions, level)
            logits = self._compute(token_ids, positions, memory_lengths, length)
            self._logits[:rows] = logits
            self.drawing.draw(logits, positions, numbers.view(torch.float64), length, level)

        return work


def _story(error: BaseException) -> str:
    """What went wrong first: ending a broken capture raises something of its own."""
    while error.__context__ is not None:
        error = error.__context__
    first_line, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line}"
