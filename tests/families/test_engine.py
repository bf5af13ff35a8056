"""The serving engine says, token for token, what the reference library says of the same weights."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from app.engine.batch import BatchItem, BatchLane
from app.engine.decode import DecodeLane, make_decode_lane
from app.engine.sequence import Hypothesis, Sequence
from model.adopted import AdoptedTokenizer, Manner
from model.checkpoint import Checkpoint, Folder
from model.inference import optimise
from model.sampling import BeamParams, SamplingParams
from tests.engine.rig import drive, turn
from tests.families.conftest import VOCAB, Pair

Make = Callable[[str], Pair]
N = 64
SPECIAL = [0, 1, 3, 4]  # what must not be said; 2 is the end


def checkpoint(pair: Pair) -> Checkpoint:
    """The folder's model with a tokenizer of bare ids."""
    folder = Folder(pair.folder)
    backend = Backend(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    backend.decoder = decoders.ByteLevel()
    manner = Manner("bytes", VOCAB, SPECIAL, eos_id=2, mask_id=4)
    tokenizer = AdoptedTokenizer(backend, manner)
    model = folder.model("cpu", torch.float32)
    optimise(model)  # as the service does
    return Checkpoint(model, tokenizer, folder.config, "tiny", "0" * 64)


def lane_of(pair: Pair) -> DecodeLane[Any]:
    return make_decode_lane(
        "lane", checkpoint(pair), n_slots=12, prefill_tokens=64, max_queue_items=99, max_queue_tokens=9999
    )


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(8, VOCAB) for _ in range(length)] for length in lengths]


def settings(**options: Any) -> dict[str, Any]:
    """What makes the reference choose among the same tokens, and only as told."""
    common = {"suppress_tokens": SPECIAL, "do_sample": False, "forced_eos_token_id": None, "pad_token_id": 1}
    return common | {"eos_token_id": 2} | options


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "llama", "llama-biased-tied", "llama-llama3", "llama-yarn"),
        *("mistral", "qwen2", "qwen2-window", "qwen3"),
    ],
)
async def test_greedy_tokens(pair: Make, name: str) -> None:
    """Forty of them, prompts of several lengths side by side, one up to the end of the context."""
    found = pair(name)
    lane = lane_of(found)
    texts = prompts(1, 3, 11, 24, N - 40)
    sequences = [Sequence(ids, SamplingParams(max_new_tokens=40)) for ids in texts]
    lane.submit(sequences[:2])
    with torch.inference_mode():
        for _ in range(3):  # the others join in mid-course
            turn(lane)
    lane.submit(sequences[2:])
    drive(lane)
    said: set[int] = set()
    for ids, sequence in zip(texts, sequences, strict=True):
        (ours,) = await sequence.result()
        out = found.model.generate(torch.tensor([ids]), **settings(max_new_tokens=40))
        theirs = out[0, len(ids) :].tolist()
        assert ours.token_ids == [token for token in theirs if token != 2]
        said |= set(theirs)
    assert len(said) > 15  # or the comparison says little


async def run_beams(
    lane: DecodeLane[Any], sources: list[list[int]], params: BeamParams, start: list[int]
) -> Any:
    sequences = [Sequence(ids, params, target_ids=start) for ids in sources]
    lane.submit(sequences)
    drive(lane)
    return [await sequence.result() for sequence in sequences]


def likely_end(model: Any, sources: list[list[int]]) -> int:
    """A token that the model says often: as the end token it ends some hypotheses early."""
    rows = [model.generate(torch.tensor([ids]), **settings(max_new_tokens=20))[0, 3:] for ids in sources]
    return int(torch.cat(rows).mode().values)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("name", ["marian", "m2m100", "mbart"])
async def test_beams(pair: Make, name: str, early_stopping: Any) -> None:
    """The four best, with their scores, by the reference's rules, whatever the penalty and the length."""
    found = pair(name)
    sources = [[*ids, 2] for ids in prompts(2, 17, N - 1)]
    end = likely_end(found.model, sources)
    bare = checkpoint(found)
    ending = replace(bare, config=replace(bare.config, eos_id=end))
    lane = make_decode_lane(
        "lane", ending, n_slots=12, prefill_tokens=64, max_queue_items=99, max_queue_tokens=9999
    )
    forced = None if name == "marian" else 7
    start = [bare.config.start_id or 0, *([] if forced is None else [forced])]
    reasons = set()
    for length_penalty, n_new in ((1.0, 1), (1.0, 24), (0.0, 9), (2.0, 12), (-1.0, 12)):
        params = BeamParams(
            num_beams=4,
            num_return_sequences=4,
            length_penalty=length_penalty,
            max_new_tokens=n_new,
            early_stopping=early_stopping,
        )
        ours = await run_beams(lane, sources, params, start)
        for ids, hypotheses in zip(sources, ours, strict=True):
            compare(hypotheses, reference_beams(found.model, ids, params, forced, end))
            reasons |= {h.finish_reason for h in hypotheses}
    assert len(reasons) == 2  # some ended by themselves, some for their length


def reference_beams(
    model: Any, ids: list[int], params: BeamParams, forced: int | None, end: int
) -> list[tuple[list[int], float]]:
    out = model.generate(
        torch.tensor([ids]),
        **settings(
            num_beams=4,
            num_return_sequences=4,
            length_penalty=params.length_penalty,
            max_new_tokens=params.max_new_tokens,
            early_stopping=params.early_stopping,
            forced_bos_token_id=forced,
            eos_token_id=end,
            renormalize_logits=True,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    return [
        (list(takewhile(lambda token: token not in (end, 1), row[1:])), score)
        for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True)
    ]


def compare(ours: list[Hypothesis], theirs: list[tuple[list[int], float]]) -> None:
    # Where fewer than four could be told apart, the reference fills up with what it never found.
    real = [(tokens, score) for tokens, score in theirs if score > -1e8]
    assert [h.token_ids for h in ours] == [tokens for tokens, _ in real]
    for hypothesis, (_, score) in zip(ours, real, strict=True):
        assert hypothesis.score == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "distilbert"])
async def test_masks(pair: Make, name: str) -> None:
    """The five best of every mask, in rows of several lengths in one batch, up to the longest."""
    found = pair(name)
    folder = checkpoint(found)
    lane = BatchLane("lane", folder, max_batch_tokens=999, max_queue_items=9, max_queue_tokens=999)
    texts = prompts(3, 20, N)
    for ids in texts:
        ids[1], ids[-1] = 4, 4
    items = [
        BatchItem(ids, [0] * len(ids), task="fill-mask", targets=[None] * 2, allowed=["space", "no_space"])
        for ids in texts
    ]
    lane.submit(items)
    with torch.inference_mode():
        while lane.has_work():
            for handover in lane.turn():
                handover.complete()
        for ids, item in zip(texts, items, strict=True):
            ranked = await item.result()
            assert isinstance(ranked, list)
            probs = found.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
            for place, ours in zip((1, len(ids) - 1), ranked, strict=True):
                best = probs[place].topk(5)
                assert [token for token, _ in ours] == best.indices.tolist()
                assert [score for _, score in ours] == pytest.approx(best.values.tolist(), abs=1e-4)
