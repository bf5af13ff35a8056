"""Markdown tables, and numbers with their spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median


class Table:
    """Prints its head at once and each row as it comes, so that a run that is cut short leaves its part."""

    def __init__(self, *columns: str) -> None:
        self._n_columns = len(columns)
        self._print(columns)
        self._print(["---"] * len(columns))

    def row(self, *cells: object) -> None:
        """One row; as many cells as columns."""
        if len(cells) != self._n_columns:
            raise ValueError(f"{len(cells)} cells for {self._n_columns} columns")
        self._print([str(cell) for cell in cells])

    @staticmethod
    def _print(cells: Iterable[str]) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the least and the greatest where there are several."""
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1_000_000) * len(ordered) // 1_000_000) - 1)]
