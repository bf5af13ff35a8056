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


@dataclass(frozen=True)
class TextPair:
    """A tokenizer of the reference, in the older files and, where it has one, as a tokenizer.json."""

    reference: Any
    older: Path
    newer: Path


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextPair]:
    """By the name of a kind."""
    from tests.families import reference, tokenizers

    made: dict[str, TextPair] = {}

    def make(name: str) -> TextPair:
        if name not in made:
            older, newer = tmp_path_factory.mktemp("older"), tmp_path_factory.mktemp("newer")
            tokenizers.KINDS[name].make(older)
            tokenizer = reference.read_tokenizer(tokenizers.KINDS[name].reference, older)
            tokenizer.save_pretrained(newer)
            made[name] = TextPair(tokenizer, older, newer)
        return made[name]

    return make


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
