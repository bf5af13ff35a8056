"""`python -m model.training`, from packs to a translator that began as a masked model."""

import lzma
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from app.inspection import inspect_folder
from app.settings import Settings
from model import checkpoint
from model.models import build_model
from model.shortlist import SHORTLIST_FILE
from model.tokenizer import Tokenizer
from model.training.__main__ import main, model_config
from model.training.evaluate import STORIES
from model.training.loop import Options, Trainer, freeze
from model.training.shards import Shard
from tests.tiny import PAIRS

RECIPES = Path(__file__).resolve().parents[2] / "model/training/recipes"
MODEL_RECIPES = sorted(path for path in RECIPES.glob("*-*.toml") if not path.stem.startswith("classify"))
MODEL = "[model]\nd_model = 32\nn_heads = 4\nd_ff = 48\nmax_len = 96\ndropout = 0.0\n"
TRAIN = "[train]\nsteps = 2\nwarmup = 1\nevaluate_every = 1\n"
DATA = """[data]
pairs = ["pairs.tsv"]
sentences = ["written"]
documents = ["mono.en.txt"]
batch_tokens = 512
max_len = 64
weights = { written = 1.0, mono = 1.0, sentences = 1.0 }
"""
LAYERS = {
    "masked": "n_encoder_layers = 1\nn_segments = 2\n",
    "translate": "n_encoder_layers = 2\nn_decoder_layers = 1\n",
    "causal": "n_decoder_layers = 1\n",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs, recipes, and the tokenizer that the first command learns from them."""
    folder = tmp_path_factory.mktemp("work")
    lines = [f"written\t{en} ({i})\t{ko} ({i})\n" for i in range(20) for en, ko in PAIRS]
    (folder / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    paragraph = " ".join(en for en, _ in PAIRS)
    documents = "\n\n".join(f"Story {i}. {paragraph}" for i in range(100))
    (folder / "mono.en.txt").write_text(documents, encoding="utf-8")
    for command, layers in LAYERS.items():
        (folder / f"{command}.toml").write_text(MODEL + layers + DATA + TRAIN)
    packs = ["--pairs", str(folder / "pairs.tsv"), "--documents", str(folder / "mono.en.txt")]
    assert main(["tokenizer", *packs, "--vocab-size", "400", "--out", str(folder / "tokenizer")]) == 0
    return folder


def train(work: Path, command: str, run: Path, *more: str) -> int:
    recipe = ["--recipe", str(work / f"{command}.toml"), "--tokenizer", str(work / "tokenizer")]
    return main([command, *recipe, "--data", str(work), "--run", str(run), "--threads", "1", *more])


@pytest.mark.parametrize("command", LAYERS)
def test_every_kind_trains_and_evaluates(
    command: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(work, command, tmp_path, "--set", "steps=3") == 0
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.tokenizer.vocab_size == 400
    assert bool(loaded.config.languages) == (command == "translate")
    assert (tmp_path / "log.jsonl").read_text().count("held_loss") == 3
    assert "M parameters" in capsys.readouterr().out


@pytest.mark.parametrize("command", LAYERS)
@pytest.mark.parametrize("n", [1, 300])
def test_text_of_ones_own_trains(
    command: str, n: int, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed or not, and also where it is so little that nothing is held out."""
    data = tmp_path / "data"
    data.mkdir()
    pairs = [f"any\t{en} ({i})\t{ko} ({i})\n" for i in range(n) for en, ko in PAIRS[: 1 if n == 1 else None]]
    (data / "pairs.tsv.xz").write_bytes(lzma.compress("".join(pairs).encode()))
    text = "\n\n".join(f"Story {i}. {' '.join(en for en, _ in PAIRS * 9)}" for i in range(n))
    (data / "text.txt").write_text(text, encoding="utf-8")
    sizes = [f"model.{size}" for size in ("d_model=32", "n_heads=2", "d_ff=64")]
    settings = [*sizes, "data.batch_tokens=512", "steps=1", "warmup=0"]
    words = [
        command,
        "--recipe",
        str(RECIPES / f"{command}-own.toml"),
        "--tokenizer",
        str(work / "tokenizer"),
    ]
    words += ["--data", str(data), "--run", str(tmp_path / "run"), "--threads", "1"]
    assert main([*words, *(word for each in settings for word in ("--set", each))]) == 0
    assert checkpoint.load(tmp_path / "run/model").tokenizer.vocab_size == 400
    assert ("nothing is held out" in capsys.readouterr().out) == (n == 1)


def test_nothing_to_train_on(work: Path, tmp_path: Path) -> None:
    data = ["--data", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"not there: .*pairs.tsv, .*mono.en.txt; docs/data.md"):
        train(work, "causal", tmp_path / "run", *data)
    for name in ("pairs.tsv", "mono.en.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(SystemExit, match="does not fill one batch"):
        train(work, "causal", tmp_path / "run", *data)


def test_a_run_does_not_go_on_with_other_packs_or_another_tokenizer(work: Path, tmp_path: Path) -> None:
    data = shutil.copytree(work, tmp_path / "data")
    again = ["--data", str(data), "--set", "steps=1", "--set", "warmup=0"]
    assert train(work, "causal", tmp_path / "run", *again) == 0
    assert train(work, "causal", tmp_path / "run", *again) == 0
    (tmp_path / "other").mkdir()
    Tokenizer.load(work / "tokenizer").extended([" unheard"]).save(tmp_path / "other")
    with pytest.raises(SystemExit, match="another tokenizer or from packs that have changed"):
        train(work, "causal", tmp_path / "run", *again, "--tokenizer", str(tmp_path / "other"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert train(work, "causal", tmp_path / "run", *again, "--data", str(elsewhere)) == 0
    with (data / "mono.en.txt").open("a") as file:
        file.write("\n\nOne more.")
    with pytest.raises(SystemExit, match="another tokenizer or from packs that have changed"):
        train(work, "causal", tmp_path / "run", *again)


def test_what_is_wrong_with_a_pack_is_said_in_a_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(work, tmp_path / "data")
    (data / "pairs.tsv").write_text("I go.\t나는 간다.\n")
    assert train(work, "translate", tmp_path / "run", "--data", str(data)) == 1
    assert "pairs.tsv:1: 2 columns, not 3 (source TAB english TAB korean)" in capsys.readouterr().out
    (data / "pairs.tsv").write_bytes("written\tI go.\t나는 간다.\n".encode("cp949"))
    assert main(["tokenizer", "--pairs", str(data / "pairs.tsv"), "--out", str(tmp_path)]) == 1
    assert "pairs.tsv is not UTF-8" in capsys.readouterr().out
    (data / "pairs.tsv").write_text("")
    with pytest.raises(SystemExit, match="does not fill one batch"):
        train(work, "translate", tmp_path / "run", "--data", str(data))
    with pytest.raises(SystemExit, match=r"not there: .*nowhere"):
        train(work, "translate", tmp_path / "run", "--tokenizer", str(tmp_path / "nowhere"))


def test_a_stopped_run_says_how_it_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", stopped)
    assert train(work, "causal", tmp_path) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().out


def test_pairs_without_weight_stay_out_and_are_missed(work: Path, tmp_path: Path) -> None:
    lines = [f"docs\t{en} [{i}]\t{ko} [{i}]\n" for i in range(20) for en, ko in PAIRS]
    (work / "docs.tsv").write_text("".join(lines), encoding="utf-8")
    packs = ["--set", 'data.pairs=["pairs.tsv", "docs.tsv"]']
    assert train(work, "translate", tmp_path, *packs) == 0
    shard = Shard(tmp_path / "train")
    assert (shard.label_names, shard.left_out) == (["written"], ["docs"])
    with pytest.raises(SystemExit, match="docs had no weight"):
        train(work, "translate", tmp_path, *packs, "--set", "data.weights={written=1.0, docs=0.5}")


def test_a_translator_may_start_from_a_masked_model(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(work, "masked", tmp_path / "masked") == 0
    start = ["--start-from", str(tmp_path / "masked/model")]
    assert train(work, "translate", tmp_path / "translate", *start) == 0
    assert "tensors taken from" in capsys.readouterr().out


def test_a_shortlist_is_written_beside_a_translator(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds what the training pairs say."""
    assert train(work, "translate", tmp_path) == 0
    folder = tmp_path / "model"
    recipe = ["--recipe", str(work / "translate.toml"), "--tokenizer", str(folder)]
    assert main(["shortlist", *recipe, "--data", str(work), "--run", str(tmp_path), "--common", "9"]) == 0
    assert "ko: 257 pairs, " in capsys.readouterr().out
    assert (folder / SHORTLIST_FILE).stat().st_mode & 0o777 == 0o644
    loaded = checkpoint.load(folder)
    assert loaded.shortlist is not None
    for english, korean in PAIRS:
        for source, target, language in ((english, korean, "ko"), (korean, english, "en")):
            ids = loaded.shortlist.ids(loaded.tokenizer.encode(source), language).tolist()
            known = {*ids, *loaded.shortlist.common(language).tolist()}
            assert set(loaded.tokenizer.encode(target)) <= known
            assert len(known) < 400
    assert "shortlist, for int8 on the CPU with kernels: into en, ko" in inspect_folder(folder, Settings())[0]


def test_training_may_go_on_from_a_trained_model(work: Path, tmp_path: Path) -> None:
    assert train(work, "causal", tmp_path / "first", "--set", "steps=3") == 0
    more = ["--continue-from", str(tmp_path / "first/model"), "--set", "steps=1", "--set", "lr=1e-12"]
    assert train(work, "causal", tmp_path / "second", *more) == 0
    first, second = (checkpoint.load(tmp_path / run / "model").model for run in ("first", "second"))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_wrong_override_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="stepz"):
        train(work, "causal", tmp_path, "--set", "stepz=3")
    with pytest.raises(SystemExit, match="not TOML"):
        train(work, "causal", tmp_path, "--set", "steps=three")
    with pytest.raises(SystemExit, match="frozen: a list"):
        train(work, "causal", tmp_path, "--set", 'frozen="decoder"')
    with pytest.raises(SystemExit, match=r"begins with 'decoder.blocks.77.'"):
        train(work, "causal", tmp_path, "--set", 'frozen=["decoder.blocks.77."]')


@pytest.mark.parametrize("path", MODEL_RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_build(path: Path, tokenizer: Tokenizer) -> None:
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    command = path.stem.partition("-")[0]
    model = build_model(model_config(command, recipe["model"], tokenizer))
    options = Options(**recipe["train"])
    freeze(model, options.frozen)
    # A story is held out by its first line, a pair by itself: as both, one would tell of the other.
    if command in ("masked", "causal"):
        assert STORIES not in recipe["data"].get("pairs", [])
    assert options.warmup < options.steps
    assert recipe["data"]["max_len"] <= recipe["model"]["max_len"]


def test_a_recipe_for_cuda_says_so_at_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["causal", "--recipe", str(RECIPES / "causal-gpu.toml"), "--tokenizer", str(tmp_path)]
    with pytest.raises(SystemExit, match="wants CUDA"):
        main([*words, "--data", str(tmp_path), "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
