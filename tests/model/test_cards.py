"""The cards of the weights that ship."""

import re
from pathlib import Path

import pytest

from model import checkpoint

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@pytest.mark.parametrize("folder", sorted(WEIGHTS.iterdir()), ids=lambda folder: folder.name)
def test_the_scores_are_those_of_the_weights(folder: Path) -> None:
    """New weights want `evaluate --card` again."""
    (named,) = re.findall(r"Weights ([0-9a-f]{12})\b", (folder / "README.md").read_text(encoding="utf-8"))
    assert checkpoint.file_sha256(folder / checkpoint.WEIGHTS).startswith(named)
