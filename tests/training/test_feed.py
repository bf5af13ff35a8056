"""Batches from other processes, time as the measure of a run, and the optimiser over stacks of matrices."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model.tokenizer import Tokenizer
from model.training.muon import BatchedMuon
from model.training.schedule import Schedule
from model.training.shards import write_shard
from tests.training.tiny_run import OPTIONS, make_trainer


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 on
def test_batches_from_workers_train_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        tokenizer.save(folder)
        trainer = make_trainer(folder, "translate", replace(OPTIONS, workers=workers))
        trainer.run()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == OPTIONS.steps


def test_a_run_ends_when_its_time_is_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    options = replace(OPTIONS, steps=10**6, minutes=0.5, checkpoint_every=10**6, evaluate_every=10**6)
    trainer = make_trainer(tmp_path, "masked", options)
    trainer.seconds = 29.9  # as if it had run for so long
    trainer.run()
    assert 0 < trainer.step < 1000
    assert trainer.seconds >= 30
    assert trainer.is_finished()
    resumed = make_trainer(tmp_path, "masked", options)
    resumed.run()
    assert resumed.losses == []


def test_the_schedule_follows_the_share_of_the_run_that_is_gone() -> None:
    schedule = Schedule(1000, warmup=10, decay=0.5)
    assert schedule(400, 0.75) == schedule(750) == 0.5
    assert schedule(4, 0.1) == schedule(4) == 5 / 11
    assert schedule(400, 1.2) == 0.0


def test_matrices_in_stacks_learn_as_one_by_one() -> None:
    torch.manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8), (8, 16)]
    singly = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    stacked = [nn.Parameter(p.detach().clone()) for p in singly]
    optimizers = (
        torch.optim.Muon(singly, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        BatchedMuon(stacked, lr=0.02, weight_decay=0.1),
    )
    for step in range(4):
        for one, other in zip(singly, stacked, strict=True):
            one.grad = None if step == 2 and one is singly[0] else torch.randn_like(one)
            other.grad = None if one.grad is None else one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()  # type: ignore[no-untyped-call]
    # Products in bfloat16, of one matrix or of a stack: they may round apart.
    for one, other in zip(singly, stacked, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_another_process_maps_a_shard_anew(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard", tokenizer, [("written", ["I go home."])])
    sent = pickle.dumps(shard)
    assert len(sent) < 500
    assert pickle.loads(sent).unit(0).tolist() == shard.unit(0).tolist()


def test_minutes_are_for_one_process(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a clock each"):
        make_trainer(tmp_path, "masked", replace(OPTIONS, minutes=1.0))
