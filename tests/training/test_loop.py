"""A killed and resumed run repeats the unbroken one; two processes equal one with twice the batches."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import checkpoint
from model.tokenizer import Tokenizer
from model.training.loop import make_optimizers
from tests.training.tiny_run import OPTIONS, make_trainer

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make_folder(path: Path, tokenizer: Tokenizer) -> Path:
    path.mkdir()
    tokenizer.save(path)
    return path


def test_a_killed_run_resumes_exactly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = make_trainer(make_folder(tmp_path / "whole", tokenizer), "translate", OPTIONS)
    whole.run()
    assert len(whole.losses) == OPTIONS.steps

    broken = make_folder(tmp_path / "broken", tokenizer)
    died = in_a_process("-m", "tests.training.tiny_run", str(broken), "translate", "--kill-at", "5")
    assert died.returncode == -signal.SIGKILL, died.stderr
    torch.manual_seed(12345)  # what happened before must not matter
    resumed = make_trainer(broken, "translate", OPTIONS)
    resumed.run()
    first = OPTIONS.steps - len(resumed.losses)
    assert first == OPTIONS.checkpoint_every
    assert resumed.losses == whole.losses[first:]
    ours, theirs = (load_file(tmp_path / name / "run/checkpoint.safetensors") for name in ("whole", "broken"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.tokens == whole.tokens


def test_a_run_leaves_a_log_and_a_folder_that_loads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", tokenizer)
    trainer = make_trainer(folder, "masked", replace(OPTIONS, steps=4, accumulate=1))
    held: list[int] = []
    trainer.run(on_evaluate=lambda step, _: held.append(step))
    assert held == [4]
    rows = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert set(rows[-1]) == {"step", "held_loss"}
    assert checkpoint.load(folder / "run/model").config == trainer.model.config
    assert not list((folder / "run").glob("**/*.part"))
    # A run that has ended has nothing left to do.
    again = make_trainer(folder, "masked", replace(OPTIONS, steps=4, accumulate=1))
    again.run()
    assert again.losses == []


def test_two_processes_equal_one_with_twice_the_batches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The two ranks' batches are those that one process would accumulate; some know no next sentence."""
    alone, pair = (make_folder(tmp_path / name, tokenizer) for name in ("alone", "pair"))
    trainer = make_trainer(alone, "masked", OPTIONS, dropout=0.0)
    trainer.run()
    done = in_a_process(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.training.tiny_run", str(pair), "masked", "--accumulate", "1", "--dropout", "0"),
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(folder / "run/checkpoint.safetensors") for folder in (alone, pair))
    for name in ours:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4)


def test_norms_and_biases_are_not_decayed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer = make_trainer(make_folder(tmp_path / "run", tokenizer), "translate", OPTIONS)
    adamw, muon = make_optimizers(trainer.model, OPTIONS)
    decayed, plain = adamw.param_groups
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim < 2 for p in plain["params"])
    assert all(p.ndim >= 2 for p in decayed["params"])
    maps = [p for group in muon.param_groups for p in group["params"]]
    n_all = sum(len(group["params"]) for group in (*adamw.param_groups, *muon.param_groups))
    assert n_all == len(list(trainer.model.parameters()))
    assert all(p is not trainer.model.embeddings.tokens.weight for p in maps)


def test_what_is_frozen_stays(tokenizer: Tokenizer, tmp_path: Path) -> None:
    frozen = ("embeddings.", "encoder.blocks.0.")
    options = replace(OPTIONS, frozen=frozen)
    trainer = make_trainer(make_folder(tmp_path / "run", tokenizer), "translate", options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(frozen), name
    resumed = make_trainer(tmp_path / "run", "translate", replace(options, steps=10))
    resumed.run()
    assert len(resumed.losses) == 2
    other = make_trainer(tmp_path / "run", "translate", replace(options, steps=12, frozen=frozen[:1]))
    with pytest.raises(ValueError, match="was trained with"):
        other.run()


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("decoder.blocks.9.",), "begins with 'decoder.blocks.9.'"),
        (("",), "nothing is left"),
    ],
)
def test_what_cannot_be_frozen_is_said(
    frozen: Sequence[str], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_folder(tmp_path / "run", tokenizer), "translate", replace(OPTIONS, frozen=frozen))


def test_no_data_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer = make_trainer(make_folder(tmp_path / "run", tokenizer), "translate", OPTIONS)
    trainer.task.weights[:] = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="holds no batch"):
        trainer.run()
