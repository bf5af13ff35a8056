"""One tiny random checkpoint of every kind, made once by the reference library."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VOCAB = 120


@dataclass(frozen=True)
class Pair:
    """A reference model and the folder that it saved."""

    model: Any
    folder: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """By the name of a case."""
    from tests.families import reference  # seconds, which only these tests should cost

    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = reference.CASES[name].make(VOCAB)
            reference.save(model, folder)
            made[name] = Pair(model, folder)
        return made[name]

    return make
