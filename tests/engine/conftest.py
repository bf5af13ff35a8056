"""Two copies of each tiny model: the lanes' own, and one for the oracles, which no device thread touches."""

import pytest

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
