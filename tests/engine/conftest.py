"""Two copies of each tiny model: the lanes' own, and one for the oracles, which no device thread touches."""

import random

import pytest

from app import metrics
from model.checkpoint import Checkpoint
from tests.engine.rig import load_bold
from tests.tiny import TinyFolders


@pytest.fixture(scope="session")
def causal(tiny_folders: TinyFolders) -> Checkpoint:
    return load_bold(tiny_folders.generate)


@pytest.fixture(scope="session")
def causal_oracle(tiny_folders: TinyFolders) -> Checkpoint:
    return load_bold(tiny_folders.generate)


@pytest.fixture(scope="session")
def translator(tiny_folders: TinyFolders) -> Checkpoint:
    return load_bold(tiny_folders.translate)


@pytest.fixture(scope="session")
def translator_oracle(tiny_folders: TinyFolders) -> Checkpoint:
    return load_bold(tiny_folders.translate)


@pytest.fixture(scope="session")
def masked(tiny_folders: TinyFolders) -> Checkpoint:
    return load_bold(tiny_folders.fill_mask)


@pytest.fixture(scope="session")
def masked_oracle(tiny_folders: TinyFolders) -> Checkpoint:
    return load_bold(tiny_folders.fill_mask)


@pytest.fixture(autouse=True)
def _no_lanes_before() -> None:
    """A lane that a test leaves at work would stay in the gauges, where lanes of one name add up."""
    for gauge in (metrics.queue_items, metrics.queue_tokens, metrics.rows_in_use):
        gauge.clear()


@pytest.fixture(autouse=True)
def _the_same_numbers_every_time(request: pytest.FixtureRequest) -> None:
    """Sequences without a seed draw their own from here: a test that fails fails again."""
    random.seed(request.node.name)
