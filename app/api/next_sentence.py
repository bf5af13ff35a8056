"""POST /next-sentence: does the second sentence follow the first?"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter
from pydantic import FailFast, Field
from typing_extensions import TypeAliasType, TypedDict

from app.api.bounds import Strict, check_length, check_text, input_names
from app.api.deps import BodyRoute, Call, CallDep, gather, note_times, prepare
from app.engine.batch import BatchItem
from app.engine.registry import OneShotLane, Task
from app.errors import InvalidRequest, Json, NotLoaded
from app.settings import Settings
from app.spaces import plain

router = APIRouter(route_class=BodyRoute)


class Pair(Strict):
    """Two sentences in their order."""

    first: str = Field(examples=["I was hungry."])
    second: str = Field(examples=["So I made a sandwich."])


Pairs = TypeAliasType("Pairs", Annotated[list[Pair], FailFast()])  # see Texts


class NextSentenceParameters(Strict):
    """There are none."""


class NextSentenceRequest(Strict):
    """One pair or a list of pairs."""

    inputs: Pair | Pairs
    parameters: NextSentenceParameters | None = None
    model: str | None = Field(None, description="as /info names it; by default the first")


class NextSentenceAnswer(TypedDict):
    """score is the probability that the second follows the first."""

    follows: bool
    score: float


@dataclass(frozen=True)
class NextSentenceWork:
    """A request whose items are in the lane."""

    items: list[BatchItem]
    is_list: bool


async def admit(body: NextSentenceRequest, call: Call) -> NextSentenceWork:
    """Check, tokenise and submit."""
    task = call.models.fill_mask(body.model)
    if not task.config.nsp_head:
        raise NotLoaded(
            f"the fill-mask model {task.name!r} has no head that tells whether a sentence follows"
        )
    pairs = _check(body.inputs, call.services.settings)
    n_chars = sum(len(pair.first) + len(pair.second) for pair in pairs.values())
    encoded = await prepare(n_chars, _encode_all, pairs, task)
    items = [
        BatchItem(token_ids=ids, segment_ids=segments, task="next-sentence") for ids, segments in encoded
    ]
    call.record.n_prompt_tokens = sum(len(item.token_ids) for item in items)
    call.submit(task.lane, items)
    return NextSentenceWork(items, isinstance(body.inputs, list))


@router.post("/next-sentence", response_model=NextSentenceAnswer | list[NextSentenceAnswer])
async def next_sentence(body: NextSentenceRequest, call: CallDep) -> Json:
    """Whether the second sentence follows the first, and how probable that is."""
    work = await admit(body, call)
    scores = await call.attendance.wait_for(gather(_score(item) for item in work.items))
    note_times(call.record, work.items)
    call.record.n_generated_tokens = 0
    answers = [NextSentenceAnswer(follows=score >= 0.5, score=score) for score in scores]
    return Json(answers if work.is_list else answers[0])


async def _score(item: BatchItem) -> float:
    score = await item.result()
    assert isinstance(score, float)
    return score


def _check(inputs: Pair | list[Pair], settings: Settings) -> dict[str, Pair]:
    """The bounded pairs by their names in messages."""
    if isinstance(inputs, list):
        check_length("inputs", inputs, settings.max_texts, "pairs")
    pairs = dict(zip(input_names(inputs), inputs if isinstance(inputs, list) else [inputs], strict=True))
    for name, pair in pairs.items():
        check_text(f"{name}.first", pair.first, settings.max_text_chars)
        check_text(f"{name}.second", pair.second, settings.max_text_chars)
    return pairs


def _encode_all(pairs: dict[str, Pair], task: Task[OneShotLane]) -> list[tuple[list[int], list[int]]]:
    return [_encode(name, pair, task) for name, pair in pairs.items()]


def _encode(name: str, pair: Pair, task: Task[OneShotLane]) -> tuple[list[int], list[int]]:
    """[CLS] first [SEP] second [SEP], and the segment of each token."""
    limit = task.lane.limits.max_item_tokens
    ids, segments = task.tokenizer.pair_ids(plain(pair.first), plain(pair.second))
    if len(ids) > limit:
        raise InvalidRequest(f"{name} has {len(ids)} tokens together, the limit is {limit}")
    return ids, segments
