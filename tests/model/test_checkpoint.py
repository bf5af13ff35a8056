"""A folder comes back as it was saved, or the message names the file at fault."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.checkpoint import CheckpointError
from model.models import build_model
from model.tokenizer import Tokenizer
from tests.tiny import TinyFolders, fitting_config


@pytest.fixture
def folder(tiny_folders: TinyFolders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders.translate, tmp_path / "translate"))


@pytest.mark.parametrize("architecture", ["translator", "masked_lm", "causal_lm"])
def test_round_trip(architecture: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = fitting_config(architecture, tokenizer)
    model = build_model(config)
    checkpoint.save(tmp_path / "m", model, tokenizer, dtype=torch.float32)
    loaded = checkpoint.load(tmp_path / "m")
    assert (loaded.config, loaded.name) == (config, "m")
    assert loaded.sha256 == hashlib.sha256((tmp_path / "m/model.safetensors").read_bytes()).hexdigest()
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(
        [checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.TOKENIZER]
    )
    assert loaded.tokenizer.encode("나는 집에 간다.") == tokenizer.encode("나는 집에 간다.")
    for (name, ours), (same, theirs) in zip(
        model.named_parameters(), loaded.model.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(ours, theirs)
        assert not theirs.requires_grad
    assert not loaded.model.training
    # Again over what is there: a save replaces.
    checkpoint.save(tmp_path / "m", model, tokenizer)
    assert (
        checkpoint.load(tmp_path / "m", dtype=torch.bfloat16).model.embeddings.tokens.weight.dtype
        == torch.bfloat16
    )


def test_every_user_may_read(folder: Path) -> None:
    assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())


def test_tied_weights_are_stored_once(folder: Path) -> None:
    tensors = load_file(folder / checkpoint.WEIGHTS)
    vocab_size = checkpoint.load_config(folder).vocab_size
    assert [name for name, t in tensors.items() if vocab_size in t.shape] == ["embeddings.tokens.weight"]


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.TOKENIZER])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.TOKENIZER])
@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    raw = (folder / name).read_bytes()
    broken = {"half": raw[: len(raw) // 2], "empty": b"", "noise": b"\xff\xfe" + raw[::-1]}[damage]
    (folder / name).write_bytes(broken)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / checkpoint.CONFIG).read_text())
    (folder / checkpoint.CONFIG).write_text(json.dumps(values | changes))


def test_a_configuration_that_says_nothing(folder: Path) -> None:
    (folder / checkpoint.CONFIG).write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"missing key: architecture, .*published model has a model_type"
    ):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, r"config\.json: unknown key: n_layers"),
        ({"d_model": 64}, r"model\.safetensors: .* has shape .*, the configuration wants"),
        ({"n_encoder_layers": 3}, r"model\.safetensors: missing tensor encoder\.blocks\.2"),
        ({"n_encoder_layers": 1}, r"model\.safetensors: unknown tensor encoder\.blocks\.1"),
        ({"vocab_size": 500}, r"tokenizer\.json: 420 tokens, but config\.json says vocab_size 500"),
        ({"eos_id": 3}, r"tokenizer\.json: eos_id is 2, but config\.json says 3"),
    ],
)
def test_files_that_do_not_fit_together(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / checkpoint.CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object"):
        checkpoint.load(folder)


def test_a_tokenizer_without_our_special_tokens(folder: Path) -> None:
    path = folder / checkpoint.TOKENIZER
    values = json.loads(path.read_text())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "[SEP]"]
    del values["model"]["vocab"]["[SEP]"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*\[SEP\]"):
        checkpoint.load(folder)


def test_a_tensor_too_many(folder: Path) -> None:
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file(tensors | {"extra": torch.zeros(1)}, folder / checkpoint.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unknown tensor extra \(1 in all\)"):
        checkpoint.load(folder)
