"""A small addition to a masked model loads as a whole classifier, or the message says what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint
from model.adapter import Adapter
from model.checkpoint import CheckpointError
from model.config import ConfigError
from model.models import Classifier
from tests.tiny import TinyFolders

MAP = "encoder.blocks.1.attention.q_proj.weight"
HEAD = ("head.pool.weight", "head.pool.bias", "head.classify.weight", "head.classify.bias")


def own_tensors(d_model: int = 32, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((d_model, d_model), (d_model,), (3, d_model), (3,))
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in zip(HEAD, shapes, strict=True)
    }
    tensors[MAP + ".up"] = torch.randn(d_model, rank, generator=generator)
    tensors[MAP + ".down"] = torch.randn(rank, d_model, generator=generator)
    return tensors


@pytest.fixture
def folders(tiny_folders: TinyFolders, tmp_path: Path) -> tuple[Path, Path]:
    """A base and an addition beside it."""
    base = Path(shutil.copytree(tiny_folders.fill_mask, tmp_path / "fill-mask"))
    write(tmp_path / "classify", base, own_tensors())
    return base, tmp_path / "classify"


def write(folder: Path, base: Path, tensors: dict[str, Tensor]) -> None:
    sha256 = checkpoint.file_sha256(base / checkpoint.WEIGHTS)
    adapter = Adapter(f"../{base.name}", sha256, 0.5, ["bad", "so-so", "good"])
    checkpoint.save_adapter(folder, adapter, tensors, torch.float32)


def test_the_whole_is_the_base_plus_the_deltas(folders: tuple[Path, Path]) -> None:
    base, folder = folders
    loaded = checkpoint.load(folder)
    assert isinstance(loaded.model, Classifier)
    assert loaded.config.labels == ["bad", "so-so", "good"]
    assert (loaded.name, loaded.sha256) == ("classify", checkpoint.file_sha256(folder / checkpoint.WEIGHTS))
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size
    theirs, ours = load_file(base / checkpoint.WEIGHTS), own_tensors()
    for name, tensor in loaded.model.named_parameters():
        expected = ours.get(name, theirs.get(name))
        assert expected is not None
        if name == MAP:
            expected = expected + 0.5 * ours[MAP + ".up"] @ ours[MAP + ".down"]
        torch.testing.assert_close(tensor, expected)
    ids = torch.tensor([[4, 20, 30, 5], [4, 21, 5, 0]])
    logits = loaded.model(ids)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[1:], loaded.model(ids[1:, :3]))  # padding changes nothing


def test_an_addition_is_small_and_carries_no_tokenizer(folders: tuple[Path, Path]) -> None:
    _, folder = folders
    assert sorted(p.name for p in folder.iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]
    assert load_file(folder / checkpoint.WEIGHTS).keys() == own_tensors().keys()


def test_a_classifier_may_stand_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = folders
    loaded = checkpoint.load(folder)
    checkpoint.save(tmp_path / "alone", loaded.model, loaded.tokenizer, torch.float32)
    again = checkpoint.load(tmp_path / "alone")
    assert again.config == loaded.config
    ids = torch.tensor([[4, 20, 30, 5]])
    assert torch.equal(again.model(ids), loaded.model(ids))


def test_another_base_is_refused(folders: tuple[Path, Path]) -> None:
    base, folder = folders
    trained = checkpoint.load(base)
    with torch.no_grad():
        trained.model.embeddings.tokens.weight += 1.0
    checkpoint.save(base, trained.model, trained.tokenizer, torch.float32)
    with pytest.raises(
        CheckpointError, match=r"made for a base of sha256 .*fill-mask.* has .*train it again"
    ):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(MAP + ".up"), "no other half"),
        (lambda t: t.update({"x.up": torch.zeros(32, 2), "x.down": torch.zeros(2, 32)}), "no map"),
        (lambda t: t.update({MAP + ".up": torch.zeros(31, 2)}), r"\(31, 2\) and \(2, 32\), does not fit"),
        (lambda t: t.pop("head.pool.bias"), r"missing tensor head\.pool\.bias"),
        (lambda t: t.update({"more": torch.zeros(1)}), "unknown tensor more"),
    ],
)
def test_tensors_that_do_not_fit(
    folders: tuple[Path, Path], damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    base, folder = folders
    tensors = own_tensors()
    damage(tensors)
    write(folder, base, tensors)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "../nowhere"}, r"nowhere.config\.json: no such file"),
        ({"base": "/etc"}, "not a relative path"),
        ({"base": "../translate"}, "holds a translator, not a masked_lm"),
        ({"base_sha256": "abc"}, "is not a digest"),
        ({"scale": 0.0}, "scale: 0.0 is not a positive number"),
        ({"scale": "1"}, "scale: '1' is of the wrong type"),
        ({"labels": ["one"]}, "not a list of two or more names"),
        ({"labels": ["same", "same"]}, "has a name twice"),
        ({"rank": 3}, "not so: rank"),
        ({"architecture": "causal_lm"}, "an addition to a base is no causal_lm"),
    ],
)
def test_a_config_that_makes_no_sense(
    folders: tuple[Path, Path], tiny_folders: TinyFolders, changes: dict[str, Any], message: str
) -> None:
    base, folder = folders
    shutil.copytree(tiny_folders.translate, base.parent / "translate")
    values = json.loads((folder / checkpoint.CONFIG).read_text())
    (folder / checkpoint.CONFIG).write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_config(folder)


def test_labels_belong_to_a_classifier(folders: tuple[Path, Path]) -> None:
    config = checkpoint.load_config(folders[0])
    with pytest.raises(ConfigError, match="labels: a masked_lm has none"):
        type(config).from_dict(config.to_dict() | {"labels": ["a", "b"]})


def test_what_ships_fits_its_base() -> None:
    """New weights of the masked model want `python -m model.training classify` again."""
    folder = Path(__file__).resolve().parents[2] / "weights/classify"
    adapter = checkpoint.load_adapter(folder)
    assert adapter
    assert checkpoint.file_sha256(folder / adapter.base / checkpoint.WEIGHTS) == adapter.base_sha256
