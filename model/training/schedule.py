"""The learning rate as a pure function of how far a run is: steps, or the share of its time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a plateau, linear decay to zero over the last `decay` share of the steps.

    With decay = 1 the plateau is empty. (Warm-up, stable, decay: Hu et al. 2024, MiniCPM.)
    """

    steps: int
    warmup: int = 400
    decay: float = 0.4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"a schedule of {self.steps} steps, warm-up {self.warmup}, decay {self.decay}")

    def __call__(self, step: int, progress: float | None = None) -> float:
        """The factor on the peak rate for step 0 .. steps - 1, or for the share of the run that is gone."""
        rising = (step + 1) / (self.warmup + 1) if step < self.warmup else 1.0
        left = self.steps - step if progress is None else self.steps * (1 - progress)
        span = max(1.0, self.decay * self.steps)
        falling = min(1.0, left / span) if self.decay else 1.0
        return max(0.0, min(rising, falling))
