"""A lane of the engine driven turn by turn, without its thread: what one step takes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch

from app.engine.batch import BatchItem
from app.engine.lane import Handovers
from app.engine.sequence import Sequence
from app.lifecycle import Lifecycle
from app.main import load_services
from app.settings import Settings
from model.sampling import SamplingParams

# Room for whatever a benchmark asks at once.
QUEUE: dict[str, Any] = {"max_queue_items": 100_000, "max_queue_tokens": 10_000_000}


def load_lane(task: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The lane that the service makes of a folder; no thread runs it."""
    # No beginnings of prompts are kept: the rounds of a benchmark repeat theirs.
    own: dict[str, Any] = {f"{task.replace('-', '_')}_model": str(folder.resolve()), "prefix_tokens": 0}
    logging.getLogger("app").setLevel(logging.ERROR)  # it warns of every model that is not there
    with contextlib.chdir(folder):  # no `.env` there, nor other models
        services = load_services(Settings(**(own | QUEUE | settings)), Lifecycle())
    return services.tasks[task].lane


class Driver:
    """Takes a lane's turns and its clock."""

    def __init__(self, lane: Any, device: torch.device | str = "cpu") -> None:
        self.lane, self.device = lane, torch.device(device)

    @torch.inference_mode()
    def fill(self, prompts: Items[list[int]], n_new: int) -> tuple[list[Sequence], float]:
        """Start a greedy generation of every prompt; seconds until each has its first token."""
        params = SamplingParams(max_new_tokens=n_new, min_new_tokens=n_new)
        sequences = [Sequence(prompt, params) for prompt in prompts]
        started = self.now()
        self.lane.submit(sequences)
        while any(sequence.n_generated_tokens == 0 for sequence in sequences):
            self._turn()
        return sequences, self.now() - started

    @torch.inference_mode()
    def steps(self, n: int) -> float:
        """Seconds of one step, the mean over n; whatever runs must last as long."""
        started = self.now()
        for _ in range(n):
            self._turn()
        return (self.now() - started) / n

    @torch.inference_mode()
    def drop(self, sequences: list[Sequence]) -> None:
        """Give up what runs, and wait until nothing is left."""
        self.lane.abort(sequences)
        while self.lane.has_work():
            self._turn()

    @torch.inference_mode()
    def batch(self, items: list[BatchItem]) -> float:
        """Seconds that a one-shot lane takes for items."""
        started = self.now()
        self.lane.submit(items)
        while self.lane.has_work():
            self._turn()
        return self.now() - started

    def step_seconds(self, prompts: Items[list[int]], n_steps: int, rounds: int) -> list[float]:
        """Seconds of a step with all prompts under way, once a round; the first steps are not counted."""
        n_warm = 2
        sequences, _ = self.fill(prompts, 1 + n_warm + n_steps * rounds + n_warm)
        self.steps(n_warm)
        found = [self.steps(n_steps) for _ in range(rounds)]
        self.drop(sequences)
        return found

    def now(self) -> float:
        """The time when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _turn(self) -> None:
        handovers: Handovers = self.lane.turn()
        for handover in handovers:
            handover.complete()
