"""The one-shot lane: an item's answer is the same alone and in any batch, and batches keep their budget."""

import asyncio
import random
from collections.abc import Sequence as Items

import pytest
import torch
from torch import Tensor

from app.engine.batch import BatchItem, BatchLane, choose_batch
from app.engine.errors import Aborted, Draining, EngineError, Overloaded, PromptTooLong, StepFailed
from app.engine.runner import MaskedRunner
from model.checkpoint import Checkpoint
from model.models import MaskedLM
from model.nearest_words import Votes
from tests.engine.rig import gauge, ordinary_ids


class FailingMaskedRunner(MaskedRunner):
    """The real one; it fails on a token, and turns the row of another into NaN."""

    bad_token = nan_token = -1
    max_rows = 1000

    def encode(self, token_ids: Items[Items[int]], segment_ids: Items[Items[int]]) -> Tensor:
        if len(token_ids) > self.max_rows:
            raise torch.OutOfMemoryError(f"{len(token_ids)} rows")
        if any(self.bad_token in ids for ids in token_ids):
            raise RuntimeError("bad token")
        hidden = super().encode(token_ids, segment_ids)
        for row in (row for row, ids in enumerate(token_ids) if self.nan_token in ids):
            hidden[row] = torch.nan
        return hidden


def make_lane(checkpoint: Checkpoint, max_batch_tokens: int = 200, **limits: int) -> BatchLane:
    limits = {"max_queue_items": 100, "max_queue_tokens": 5000} | limits
    lane = BatchLane("fill-mask", checkpoint, max_batch_tokens=max_batch_tokens, **limits)
    lane.runner = FailingMaskedRunner(checkpoint)
    return lane


def fill(checkpoint: Checkpoint, words: list[int], n_masks: int = 1, **wishes: object) -> BatchItem:
    tokenizer = checkpoint.tokenizer
    ids = [tokenizer.cls_id, *words, *[tokenizer.mask_id] * n_masks, tokenizer.sep_id]
    values: dict[str, object] = {"targets": [None] * n_masks, "allowed": [None] * n_masks}
    return BatchItem(ids, [0] * len(ids), "fill-mask", **(values | wishes))  # type: ignore[arg-type]


def pair(checkpoint: Checkpoint, first: list[int], second: list[int]) -> BatchItem:
    tokenizer = checkpoint.tokenizer
    ids = [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
    return BatchItem(ids, [0] * (len(first) + 2) + [1] * (len(second) + 1), "next-sentence")


def random_item(checkpoint: Checkpoint, rng: random.Random) -> BatchItem:
    ids = ordinary_ids(checkpoint)
    words = [rng.choice(ids) for _ in range(rng.randint(1, 30))]
    if rng.random() < 0.3:
        return pair(checkpoint, words, [rng.choice(ids) for _ in range(rng.randint(1, 20))])
    n_masks = rng.randint(1, 3)
    targets = [rng.choice([None, rng.sample(ids, 4)]) for _ in range(n_masks)]
    allowed = [rng.choice([None, "space", "no_space"]) for _ in range(n_masks)]
    votes = [
        rng.choice([None, Votes(tuple(rng.sample(ids, 3)), (0.5, 1.0, 2.0), rng.random())])
        for _ in range(n_masks)
    ]
    wishes = {"targets": targets, "allowed": allowed, "votes": rng.choice([[], votes])}
    return fill(checkpoint, words, n_masks, top_k=rng.choice([1, 5, 1000]), **wishes)


@torch.inference_mode()
def turn(lane: BatchLane) -> None:
    for handover in lane.turn():
        handover.complete()


def drive(lane: BatchLane) -> None:
    while lane.has_work():
        turn(lane)
    assert lane.door.n_inside == 0
    assert lane._running == []


async def answer(item: BatchItem) -> list[list[tuple[int, float]]]:
    result = await asyncio.wait_for(item.result(), 10)
    if isinstance(result, float):
        return [[(0, result)]]
    assert isinstance(result, list)
    return result


async def failure(item: BatchItem) -> EngineError:
    with pytest.raises(EngineError) as raised:
        await asyncio.wait_for(item.result(), 10)
    return raised.value


def check_same(found: list[list[tuple[int, float]]], wanted: list[list[tuple[int, float]]]) -> None:
    """The same scores; the same tokens wherever their scores are not a tie."""
    for one, other in zip(found, wanted, strict=True):
        assert [p for _, p in one] == pytest.approx([p for _, p in other], rel=1e-3, abs=1e-7)
        by_token = dict(other)
        assert all(
            by_token.get(token, other[-1][1]) == pytest.approx(p, rel=1e-3, abs=1e-7) for token, p in one
        )


@torch.no_grad()
def expected(checkpoint: Checkpoint, item: BatchItem) -> list[list[tuple[int, float]]]:
    """One item alone through the whole model."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    assert isinstance(model, MaskedLM)
    logits, nsp = model(torch.tensor([item.token_ids]), torch.tensor([item.segment_ids]))
    if item.task == "next-sentence":
        return [[(0, nsp.softmax(-1)[0, 1].item())]]
    slots = [i for i, token in enumerate(item.token_ids) if token == tokenizer.mask_id]
    ranked = []
    every = item.votes or [None] * len(slots)
    for slot, allowed, targets, votes in zip(slots, item.allowed, item.targets, every, strict=True):
        fits = [
            fillable(tokenizer.token_text(t), t, allowed, tokenizer.special_ids)
            for t in range(logits.size(-1))
        ]
        probs = logits[0, slot].masked_fill(~torch.tensor(fits), -torch.inf).softmax(-1)
        probs = (votes.mix(probs) if votes else probs).tolist()
        tokens = targets or [token for token, fit in enumerate(fits) if fit]
        ranked.append(sorted(((t, probs[t]) for t in tokens), key=lambda entry: -entry[1])[: item.top_k])
    return ranked


def fillable(text: str, token: int, allowed: str | None, special: frozenset[int]) -> bool:
    if token in special or "\ufffd" in text or not text.strip():
        return False
    return allowed is None or text.startswith(" ") == (allowed == "space")


@pytest.mark.parametrize("seed", range(4))
async def test_answers_do_not_depend_on_neighbours(
    masked: Checkpoint, masked_oracle: Checkpoint, seed: int
) -> None:
    rng = random.Random(seed)
    lane = make_lane(masked, max_batch_tokens=rng.choice([1, 100, 3000]))
    items = [random_item(masked, rng) for _ in range(20)]
    for start in range(0, 20, 5):
        lane.submit(items[start : start + 5])
        turn(lane)
    drive(lane)
    for item in items:
        check_same(await answer(item), expected(masked_oracle, item))


async def test_targets_alone_are_ranked(masked: Checkpoint) -> None:
    lane, targets = make_lane(masked), ordinary_ids(masked)[50:60]
    item = fill(masked, [300], targets=[targets], top_k=3)
    lane.submit([item])
    drive(lane)
    ((best, second, third),) = await answer(item)
    assert {best[0], second[0], third[0]} <= set(targets)
    assert best[1] >= second[1] >= third[1]


@pytest.mark.parametrize(("allowed", "spaced"), [("space", True), ("no_space", False)])
async def test_only_the_allowed_fill_a_mask(masked: Checkpoint, allowed: str, spaced: bool) -> None:
    lane = make_lane(masked)
    item = fill(masked, [300], allowed=[allowed], top_k=100_000)
    lane.submit([item])
    drive(lane)
    (ranked,) = await answer(item)
    texts = [masked.tokenizer.token_text(token) for token, _ in ranked]
    assert texts
    assert all(text.startswith(" ") is spaced and text.strip() for text in texts)
    assert sum(p for _, p in ranked) == pytest.approx(1, abs=1e-4)
    assert not {token for token, _ in ranked} & masked.tokenizer.special_ids


async def test_the_order_of_a_pair_matters(masked: Checkpoint) -> None:
    lane = make_lane(masked)
    one, other = pair(masked, [300, 301], [302]), pair(masked, [302], [300, 301])
    lane.submit([one, other])
    drive(lane)
    scores = await one.result(), await other.result()
    assert all(isinstance(score, float) and 0 < score < 1 for score in scores)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("seed", range(20))
def test_batches_keep_the_budget_and_begin_with_the_oldest(masked: Checkpoint, seed: int) -> None:
    rng = random.Random(seed)
    waiting = [fill(masked, [300] * rng.randint(1, 40)) for _ in range(rng.randint(1, 30))]
    budget = rng.choice([1, 50, 200, 10_000])
    batch = choose_batch(waiting, budget)
    assert batch[0] is waiting[0]
    assert len({id(item) for item in batch}) == len(batch)
    longest = max(item.n_tokens for item in batch)
    assert len(batch) == 1 or longest * len(batch) <= budget
    distances = [abs(item.n_tokens - batch[0].n_tokens) for item in waiting]
    assert max(abs(i.n_tokens - batch[0].n_tokens) for i in batch) <= sorted(distances)[len(batch) - 1]
    assert choose_batch([], budget) == []


async def test_the_aborted_are_not_run(masked: Checkpoint) -> None:
    lane = make_lane(masked)
    going, staying = fill(masked, [300]), fill(masked, [301])
    lane.submit([going, staying])
    lane.abort([going])
    turn(lane)
    assert isinstance(await failure(going), Aborted)
    assert going.inference_seconds == 0.0
    assert await answer(staying)
    lane.abort([going, staying])
    assert await answer(staying)


async def test_only_the_culprit_fails(masked: Checkpoint, masked_oracle: Checkpoint) -> None:
    lane = make_lane(masked, max_batch_tokens=5000)
    assert isinstance(lane.runner, FailingMaskedRunner)
    lane.runner.bad_token, lane.runner.nan_token = 333, 334
    items = [fill(masked, [300 + i]) for i in range(6)]
    bad, broken = fill(masked, [333]), fill(masked, [334])
    nan_pair = pair(masked, [334], [300])
    lane.submit([*items[:3], bad, broken, nan_pair, *items[3:]])
    turn(lane)
    for item in items:
        check_same(await answer(item), expected(masked_oracle, item))
    for item in (bad, broken, nan_pair):
        assert isinstance(await failure(item), StepFailed)
    assert not lane.has_work()
    assert not lane.failures.broken


async def test_out_of_memory_is_tried_again_with_less(masked: Checkpoint) -> None:
    lane = make_lane(masked, max_batch_tokens=5000)
    assert isinstance(lane.runner, FailingMaskedRunner)
    lane.runner.max_rows = 3
    items = [fill(masked, [300 + i]) for i in range(8)]
    lane.submit(items)
    turn(lane)
    assert all([await answer(item) for item in items])


async def test_a_wish_for_each_mask(masked: Checkpoint) -> None:
    lane = make_lane(masked)
    short, fine = fill(masked, [300], n_masks=2, allowed=[None]), fill(masked, [300], n_masks=2)
    lane.submit([short, fine])
    drive(lane)
    assert isinstance(await failure(short), StepFailed)
    assert len(await answer(fine)) == 2


def test_bounds(masked: Checkpoint) -> None:
    lane = make_lane(masked, max_queue_items=3, max_queue_tokens=30)
    lane.submit([fill(masked, [300] * 7), fill(masked, [300] * 7)])
    for request in ([fill(masked, [300]), fill(masked, [300])], [fill(masked, [300] * 20)]):
        with pytest.raises(Overloaded) as refused:
            lane.submit(request)
        assert 1.0 <= refused.value.retry_after_seconds <= 60.0
    with pytest.raises(PromptTooLong, match=r"65 tokens.* 64"):
        lane.submit([fill(masked, [300] * 62)])
    with pytest.raises(ValueError, match="vocabulary"):
        lane.submit([fill(masked, [masked.config.vocab_size])])
    with pytest.raises(ValueError, match="vocabulary"):
        lane.submit([fill(masked, [300], targets=[[-1]])])
    assert (len(lane._waiting), lane.door.n_inside) == (2, 2)
    assert gauge("queue_items", "fill-mask") == 2
    assert gauge("queue_tokens", "fill-mask") == 20
    lane.door.draining = True
    with pytest.raises(Draining):
        lane.submit([fill(masked, [300])])
    drive(lane)
    assert gauge("queue_items", "fill-mask") == gauge("queue_tokens", "fill-mask") == 0


def test_an_item_must_fit_together() -> None:
    with pytest.raises(ValueError, match="segment_ids"):
        BatchItem([1, 2], [0], "next-sentence")
    with pytest.raises(ValueError, match="token_ids"):
        BatchItem([], [], "next-sentence")


async def test_fail_all(masked: Checkpoint) -> None:
    lane = make_lane(masked)
    items = [fill(masked, [300]) for _ in range(3)]
    lane.submit(items)
    for handover in lane.fail_all(StepFailed):
        handover.complete()
    errors = [await failure(item) for item in items]
    assert len(set(map(id, errors))) == 3
    assert (lane.has_work(), lane.door.n_inside) == (False, 0)


async def test_what_a_broken_turn_had_taken_is_not_lost(masked: Checkpoint) -> None:
    lane = make_lane(masked, max_batch_tokens=1)
    items = [fill(masked, [300]) for _ in range(3)]
    lane.submit(items)
    lane._run = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        lane.turn()
    for handover in lane.fail_all(StepFailed):
        handover.complete()
    assert [type(await failure(item)) for item in items] == [StepFailed] * 3
    assert lane.door.n_inside == 0
