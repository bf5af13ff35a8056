"""The mean of models, by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.training.__main__ import main
from model.training.average import average
from tests.tiny import TinyFolders


def filled(source: Path, folder: Path, value: float) -> Path:
    """A copy of a model whose every weight is one number."""
    found = checkpoint.load(source)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.fill_(value)
    checkpoint.save(folder, found.model, found.tokenizer)
    return folder


def numbers(folder: Path) -> set[float]:
    return {n for p in checkpoint.load(folder).model.parameters() for n in p.flatten().tolist()}


def test_mean(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    one = filled(tiny_folders.translate, tmp_path / "one", 1.0)
    three = filled(tiny_folders.translate, tmp_path / "three", 3.0)
    average([one, three], [1.0, 1.0], tmp_path / "mean")
    assert numbers(tmp_path / "mean") == {2.0}
    assert main(["average", "--models", str(one), str(three), "--shares", "3", "1", "--out", str(one)]) == 0
    assert numbers(one) == {1.5}


def test_dropout_may_differ(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    one = filled(tiny_folders.translate, tmp_path / "one", 1.0)
    three = filled(tiny_folders.translate, tmp_path / "three", 3.0)
    config = json.loads((three / "config.json").read_text())
    (three / "config.json").write_text(json.dumps(config | {"dropout": 0.4}))
    average([one, three], [1.0, 1.0], tmp_path / "mean")
    assert numbers(tmp_path / "mean") == {2.0}


def test_what_has_no_mean(
    tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folders.translate
    with pytest.raises(ValueError, match="2 models but 1 shares"):
        average([folder, folder], [1.0], tmp_path / "out")
    with pytest.raises(ValueError, match="not all 0"):
        average([folder, folder], [0.0, 0.0], tmp_path / "out")
    with pytest.raises(ValueError, match="differ"):
        average([folder, tiny_folders.generate], [1.0, 1.0], tmp_path / "out")
    missing = shutil.copytree(folder, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    assert main(["average", "--models", str(folder), str(missing), "--out", str(tmp_path / "out")]) == 1
    assert "model.safetensors" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
