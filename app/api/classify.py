"""POST /classify: which of its labels does a classifier give a text?"""

import math
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from app.api.bounds import Strict, Texts, check_count, check_texts, input_names
from app.api.deps import BodyRoute, Call, CallDep, gather, note_times, prepare
from app.engine.batch import BatchItem, Logits
from app.engine.registry import OneShotLane, Task
from app.errors import InvalidRequest, Json
from app.spaces import plain

router = APIRouter(route_class=BodyRoute)

Function = Literal["softmax", "sigmoid", "none"]


class ClassifyParameters(Strict):
    """null means the default."""

    top_k: int | None = Field(None, description="labels of each text, the best; all by default")
    function_to_apply: Function | None = Field(
        None, description="what makes scores of the model's logits; softmax by default"
    )


class ClassifyRequest(Strict):
    """One text or a list of texts."""

    inputs: str | Texts = Field(examples=["It was a wonderful evening."])
    parameters: ClassifyParameters | None = None
    model: str | None = Field(None, description="as /info names it; by default the first")


class LabelScore(TypedDict):
    """One label of the model's."""

    label: str
    score: float


@dataclass(frozen=True)
class ClassifyWork:
    """A request whose items are in the lane."""

    task: Task[OneShotLane]
    items: list[BatchItem]
    top_k: int | None
    function: Function
    is_list: bool

    def answer(self, logits: Logits) -> list[LabelScore]:
        """The labels of one text with their scores, best first."""
        scores = apply_function(self.function, logits)
        ranked = sorted(zip(self.task.config.labels, scores, strict=True), key=lambda pair: -pair[1])
        return [LabelScore(label=label, score=score) for label, score in ranked[: self.top_k]]


async def admit(body: ClassifyRequest, call: Call) -> ClassifyWork:
    """Check, tokenise and submit."""
    settings = call.services.settings
    task = call.models.classify(body.model)
    parameters = body.parameters or ClassifyParameters()
    if parameters.top_k is not None:
        check_count("top_k", parameters.top_k, 1, settings.max_top_k)
    texts = check_texts(body.inputs, settings)
    named = dict(zip(input_names(body.inputs), texts, strict=True))
    encoded = await prepare(sum(map(len, texts)), _encode_all, named, task)
    items = [BatchItem(token_ids=ids, segment_ids=[0] * len(ids), task="classify") for ids in encoded]
    call.record.n_prompt_tokens = sum(map(len, encoded))
    call.submit(task.lane, items)
    function = parameters.function_to_apply or "softmax"
    return ClassifyWork(task, items, parameters.top_k, function, isinstance(body.inputs, list))


@router.post("/classify", response_model=list[LabelScore] | list[list[LabelScore]])
async def classify(body: ClassifyRequest, call: CallDep) -> Json:
    """The labels of each text with their scores, best first."""
    work = await admit(body, call)
    results = await call.attendance.wait_for(gather(_logits(item) for item in work.items))
    note_times(call.record, work.items)
    call.record.n_generated_tokens = 0
    answers = [work.answer(result) for result in results]
    return Json(answers if work.is_list else answers[0])


async def _logits(item: BatchItem) -> Logits:
    logits = await item.result()
    assert isinstance(logits, Logits)
    return logits


def apply_function(function: Function, logits: Logits) -> list[float]:
    """softmax: the labels exclude each other; sigmoid: each by itself; none: the logits."""
    if function == "none":
        return list(logits)
    if function == "sigmoid":
        return [0.5 * (1.0 + math.tanh(0.5 * x)) for x in logits]  # no overflow on either side
    greatest = max(logits)
    parts = [math.exp(x - greatest) for x in logits]
    return [part / sum(parts) for part in parts]


def _encode_all(named: dict[str, str], task: Task[OneShotLane]) -> list[list[int]]:
    return [_encode(name, text, task) for name, text in named.items()]


def _encode(name: str, text: str, task: Task[OneShotLane]) -> list[int]:
    tokenizer, limit = task.tokenizer, task.lane.limits.max_item_tokens
    token_ids = tokenizer.text_ids(plain(text))
    if len(token_ids) > limit:
        raise InvalidRequest(f"{name} has {len(token_ids)} tokens, the limit is {limit}")
    return token_ids
