"""A small tokenizer and tiny random models, shared by all tests."""

import pytest
import torch

from model import checkpoint
from model.models import build_model
from model.tokenizer import Tokenizer
from tests.tiny import PAIRS, TinyFolders, fitting_config

TASKS = {"translate": "translator", "fill-mask": "masked_lm", "generate": "causal_lm"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level vocabulary of 420 pieces, learned from `PAIRS`."""
    return Tokenizer.train([text for pair in PAIRS for text in pair] * 3, 420)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TinyFolders:
    """Random weights (seeded) in float32 for the three tasks, `max_len` 64, rotary positions for two."""
    root = tmp_path_factory.mktemp("weights")
    for task, architecture in TASKS.items():
        positions = "sinusoidal" if task == "translate" else "rotary"
        torch.manual_seed(7)
        model = build_model(fitting_config(architecture, tokenizer, positions=positions))
        checkpoint.save(root / task, model, tokenizer, dtype=torch.float32)
    return TinyFolders(root / "translate", root / "fill-mask", root / "generate")
