"""Labelled texts, low-rank learning, and the command that makes an addition to a masked model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import checkpoint
from model.adapter import Adapter
from model.checkpoint import CheckpointError
from model.models import Classifier
from model.tokenizer import Tokenizer
from model.training.__main__ import main
from model.training.classify import STARTS, Recipe, Transfer
from model.training.labelled import (
    ClassifyTask,
    Example,
    Labelled,
    accuracy,
    probabilities,
    read_labelled,
    score_labels,
)
from model.training.lowrank import LowRankLinear, adapt, adapter_tensors, take_adapter
from model.training.packs import PackError
from tests.tiny import PAIRS, TinyFolders, fitting_config

LABELS = ["english", "korean"]
RECIPE = Path(__file__).resolve().parents[2] / "model/training/recipes/classify.toml"


def examples() -> list[Example]:
    """Which language? Anyone can learn that."""
    return [Example(str(i), (pair[i],)) for pair in PAIRS for i in (0, 1)]


@pytest.fixture
def data(tokenizer: Tokenizer) -> Labelled:
    return Labelled(examples(), LABELS, tokenizer, 64)


def classifier(tokenizer: Tokenizer) -> Classifier:
    torch.manual_seed(1)
    return Classifier(
        fitting_config("classifier", tokenizer, labels=LABELS, n_segments=2, n_decoder_layers=0)
    )


def write(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_files_of_texts_and_of_pairs(tmp_path: Path) -> None:
    one = write(tmp_path / "a.tsv", "label\ttext", ["1\tGood.", "0\tBad."])
    two = write(tmp_path / "b.tsv", "label\tsentence1\tsentence2", ["neutral\tA.\tB."])
    assert read_labelled(one) == [Example("1", ("Good.",)), Example("0", ("Bad.",))]
    assert read_labelled(two) == [Example("neutral", ("A.", "B."))]
    for header, rows, message in [
        ("text\tlabel", ["a\tb"], "a.tsv:1: the columns are"),
        ("label\ttext", ["1\tGood.", "0"], "a.tsv:3: 1 columns, not 2"),
        ("label\ttext", [], "no examples"),
    ]:
        with pytest.raises(PackError, match=message):
            read_labelled(write(tmp_path / "a.tsv", header, rows))


def test_inputs_of_texts_and_pairs(tokenizer: Tokenizer) -> None:
    t = tokenizer
    a, b = t.encode("I go home."), t.encode("나는 집에 간다.")
    pair = Labelled([Example("korean", ("I go home.", "나는 집에 간다."))], LABELS, t, 64)
    assert pair.rows[0].tolist() == [t.cls_id, *a, t.sep_id, *b, t.sep_id]
    assert pair.segments[0].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert (pair.labels.tolist(), pair.n_cut) == ([1], 0)
    short = Labelled([Example("0", ("I go home.",))], LABELS, t, 5)
    assert short.rows[0].tolist() == [t.cls_id, *a[:3], t.sep_id]
    assert short.n_cut == 1
    with pytest.raises(ValueError, match="none of english, korean: '2'"):
        Labelled([Example("2", ("x",))], LABELS, t, 64)


def test_batches_hold_every_example_once(data: Labelled) -> None:
    task = ClassifyTask(data, np.arange(0, 24, 2), budget=64)
    batches = task.batches(0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(0, 24, 2))
    batch = task.collate(batches[0], np.random.default_rng(0))
    assert batch["token_ids"].numel() <= 64
    assert batch["labels"].tolist() == [0] * len(batches[0])


def test_low_rank_learning_begins_where_the_base_is(tokenizer: Tokenizer, data: Labelled) -> None:
    model = classifier(tokenizer).eval()
    before = probabilities(model, data)
    adapt(model, rank=2, scale=2.0, n_layers=1)
    torch.testing.assert_close(probabilities(model, data), before)
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"encoder", "head"}
    adapted = [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert len(adapted) == 6
    assert all(name.startswith("encoder.blocks.1.") for name in adapted)
    with pytest.raises(ValueError, match="3 layers of 2"):
        adapt(classifier(tokenizer), 2, 2.0, 3)


def test_a_saved_addition_says_what_was_learned(
    tiny_folders: TinyFolders, tokenizer: Tokenizer, data: Labelled, tmp_path: Path
) -> None:
    recipe = Recipe.read(RECIPE)
    transfer = Transfer(tiny_folders.fill_mask, recipe_of_two_layers(recipe), "cpu", 0)
    model = transfer.model(0)
    frozen = model.embeddings.tokens.weight.clone()
    transfer.train(model, data, np.arange(len(data)), 15, 256)
    assert torch.equal(model.embeddings.tokens.weight, frozen)
    assert accuracy(model, data) > 0.9
    base = shutil.copytree(tiny_folders.fill_mask, tmp_path / "fill-mask")
    sha256 = checkpoint.file_sha256(base / checkpoint.WEIGHTS)
    adapter = Adapter("../fill-mask", sha256, recipe.scale, recipe.labels)
    checkpoint.save_adapter(tmp_path / "classify", adapter, adapter_tensors(model), torch.float32)
    loaded = checkpoint.load(tmp_path / "classify").model
    assert isinstance(loaded, Classifier)
    torch.testing.assert_close(probabilities(loaded, data), probabilities(model, data), atol=1e-5, rtol=1e-4)


def test_where_a_classifier_begins(tiny_folders: TinyFolders) -> None:
    transfer = Transfer(tiny_folders.fill_mask, recipe_of_two_layers(Recipe.read(RECIPE)), "cpu", 0)
    low_rank, whole, random = (transfer.model(0, start) for start in STARTS)
    name = "encoder.blocks.0.feed_forward.up.weight"
    assert torch.equal(whole.get_parameter(name), transfer.tensors[name])
    assert not torch.equal(random.get_parameter(name), transfer.tensors[name])
    learning = [all(p.requires_grad for p in model.parameters()) for model in (low_rank, whole, random)]
    assert learning == [False, True, True]


def test_a_classifier_goes_on_from_an_earlier_addition(
    tiny_folders: TinyFolders, data: Labelled, tmp_path: Path
) -> None:
    recipe = recipe_of_two_layers(Recipe.read(RECIPE))
    transfer = Transfer(tiny_folders.fill_mask, recipe, "cpu", 0)
    learned = transfer.model(0)
    transfer.train(learned, data, np.arange(len(data)), 3, 256)
    adapter = Adapter("../fill-mask", "0" * 64, recipe.scale, recipe.labels)
    checkpoint.save_adapter(tmp_path, adapter, adapter_tensors(learned), torch.float32)
    again = transfer.model(1)
    take_adapter(again, load_file(tmp_path / checkpoint.WEIGHTS))
    assert torch.equal(probabilities(again, data), probabilities(learned, data))
    other = Transfer(tiny_folders.fill_mask, Recipe(**{**vars(recipe), "n_layers": 1}), "cpu", 0)
    with pytest.raises(ValueError, match="other rank, layers"):
        other.learn(data, 1.0, earlier=tmp_path)
    turned = Transfer(
        tiny_folders.fill_mask, Recipe(**{**vars(recipe), "labels": recipe.labels[::-1]}), "cpu", 0
    )
    with pytest.raises(ValueError, match="its labels or its scale"):
        turned.learn(data, 1.0, earlier=tmp_path)
    (tmp_path / checkpoint.WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=checkpoint.WEIGHTS):
        transfer.learn(data, 1.0, earlier=tmp_path)


def recipe_of_two_layers(recipe: Recipe) -> Recipe:
    return Recipe(**{**vars(recipe), "n_layers": 2, "bf16": False, "lr": 5e-3})


def test_scores_by_label(data: Labelled) -> None:
    found = torch.zeros(24, 2)
    found[:, 0] = 1.0  # everything is English
    found[1] = torch.tensor([0.0, 1.0])
    row = score_labels("x", LABELS, data, found)
    assert (row["n"], row["accuracy"], row["english"], row["korean"]) == ("24", "54.2", "100.0", "8.3")


def test_the_command_trains_saves_and_reports(
    tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(tiny_folders.fill_mask, tmp_path / "fill-mask")
    rows = [f"{e.label}\t{e.texts[0]}" for e in examples()]
    for name in ("train", "test", "other"):
        write(tmp_path / f"{name}.tsv", "label\ttext", rows)
    recipe = write(
        tmp_path / "recipe.toml",
        '[data]\ntrain = ["train.tsv"]\ntest = "test.tsv"\nother = "other.tsv"\nlabels = ["bad", "good"]',
        [
            "[adapter]\nrank = 2\nscale = 1.0\nn_layers = 1",
            "[few]\n8 = { passes = 1, batch_tokens = 128, seeds = 2 }",
            "[train]\nminutes = 60.0\npasses = 1.0\nbatch_tokens = 256\nlr = 1e-3\nrandom_lr = 1e-3",
        ],
    )
    out = tmp_path / "classify"
    command = ["classify", "--recipe", recipe, "--base", base, "--data", tmp_path, "--out", out]
    assert main([*map(str, command), "--compare", "--card"]) == 0
    assert checkpoint.load(out).config.labels == ["bad", "good"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "train alone, pre-trained, all weights" in card
    assert "train alone, random weights" in card
    assert "both, 5 folds" in card
    assert "other alone, 5 folds" in card
    assert " 8 |     2 |        24 |" in card
    assert checkpoint.file_sha256(out / checkpoint.WEIGHTS)[:12] in card
    evaluate = ["evaluate", "--model", out, "--labelled", tmp_path / "test.tsv", "--show", "1"]
    capsys.readouterr()
    assert main([str(a) for a in evaluate]) == 0
    assert "| test |  24 |   0 |" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main([*map(str, command[:-1]), str(again), "--continue-from", str(out)]) == 0
    assert "after those of an earlier addition" in capsys.readouterr().out
    assert main([*map(str, command), "--minutes", "0.0001"]) == 1
    assert "give more --minutes" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("classify*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_whole(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.labels == ["negative", "positive"]
    assert sorted(recipe.few) == [100, 1000]
    assert recipe.few[100].seeds == 3
