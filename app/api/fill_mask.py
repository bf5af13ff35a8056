"""POST /fill-mask: what stands behind the mask?"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from app.api.bounds import Strict, Texts, check_count, check_length, check_text, check_texts, input_names
from app.api.deps import BodyRoute, Call, CallDep, gather, note_times, prepare
from app.api.examples import example_weight
from app.engine.batch import BatchItem, Filled
from app.engine.registry import OneShotLane, Task
from app.errors import InvalidRequest, Json, NotLoaded, brief
from app.sentences import split_text
from app.settings import Settings
from app.spaces import plain
from model.examples import Examples
from model.nearest_words import Votes, find_votes
from model.tokenizer import Tokenizer

router = APIRouter(route_class=BodyRoute)

DEFAULT_TOP_K = 5
_SPLIT_AS = "en"  # whose rules for the ends of sentences, and abbreviations, do for the others
_AS_IT_IS = 1 << 30  # tokens of a sentence
_MOST_LOOKED_UP = 8  # masks; a text with more of them is like no other
_FILLING_CHARS = 16  # the least that a filling counts for, so that a few hundred are no small work


class FillMaskParameters(Strict):
    """null means the default."""

    top_k: int | None = Field(None, description="fillings of each mask; 5 by default")
    targets: str | Texts | None = Field(None, description="rank only these words, each one token long")
    examples: float | None = Field(
        None,
        description="the most that words count which stand there in known sentences like the text, 0 to "
        "0.95; 0 is off; by default as the model has it",
    )


class FillMaskRequest(Strict):
    """The mask token stands literally in the text."""

    inputs: str | Texts = Field(examples=["I go [MASK]."])
    parameters: FillMaskParameters | None = None
    model: str | None = Field(None, description="as /info names it; by default the first")


class Filling(TypedDict):
    """One word for one mask."""

    score: float
    token: int
    token_str: str
    sequence: str


Fillings = list[Filling] | list[list[Filling]]


@dataclass(frozen=True)
class MaskedText:
    """A text, its ids, and for each mask whether the space before it belongs to the filling."""

    text: str
    token_ids: list[int]
    spaced: list[bool]


@dataclass(frozen=True)
class FillMaskWork:
    """A request whose items are in the lane."""

    task: Task[OneShotLane]
    texts: list[MaskedText]
    items: list[BatchItem]
    is_list: bool


async def admit(body: FillMaskRequest, call: Call) -> FillMaskWork:
    """Check, tokenise and submit."""
    settings = call.services.settings
    task = call.models.fill_mask(body.model)
    if not task.config.mlm_head:
        raise NotLoaded(f"the fill-mask model {task.name!r} has no head that fills masks")
    parameters = body.parameters or FillMaskParameters()
    targets = _check(parameters, settings)
    texts = check_texts(body.inputs, settings)
    n_chars = sum(map(len, [*texts, *(targets or ())]))
    masked = await prepare(n_chars, _encode_all, body.inputs, task, settings)
    top_k = DEFAULT_TOP_K if parameters.top_k is None else parameters.top_k
    if targets is not None:
        top_k = min(top_k, len(targets))
    _check_fillings(sum(len(text.spaced) for text in masked), top_k, settings)
    wanted = await prepare(n_chars, _resolve, targets, masked, task.tokenizer)
    votes = await _votes(masked, task, example_weight(parameters.examples, task))
    items = [_item(text, wanted, top_k, own) for text, own in zip(masked, votes, strict=True)]
    call.record.n_prompt_tokens = sum(len(item.token_ids) for item in items)
    call.submit(task.lane, items)
    return FillMaskWork(task, masked, items, isinstance(body.inputs, list))


@router.post("/fill-mask", response_model=Fillings | list[Fillings])
async def fill_mask(body: FillMaskRequest, call: CallDep) -> Json:
    """The most probable words for each mask."""
    work = await admit(body, call)
    results = await call.attendance.wait_for(gather(_filled(item) for item in work.items))
    note_times(call.record, work.items)
    call.record.n_generated_tokens = 0
    # Each filling is written with its whole text.
    n_chars = sum(
        (len(text.text) + _FILLING_CHARS) * sum(map(len, result))
        for text, result in zip(work.texts, results, strict=True)
    )
    return await prepare(n_chars, _render, work, results)


def _render(work: FillMaskWork, results: list[Filled]) -> Json:
    answers = [
        [_fillings(text, k, ranked, work.task.tokenizer) for k, ranked in enumerate(result)]
        for text, result in zip(work.texts, results, strict=True)
    ]
    flat = [answer[0] if len(answer) == 1 else answer for answer in answers]
    return Json(flat if work.is_list else flat[0])


async def _filled(item: BatchItem) -> Filled:
    filled = await item.result()
    assert isinstance(filled, list)
    return filled


def _check(parameters: FillMaskParameters, settings: Settings) -> list[str] | None:
    """The bounded targets, once each."""
    if parameters.top_k is not None:
        check_count("top_k", parameters.top_k, 1, settings.max_top_k)
    if parameters.targets is None:
        return None
    given = [parameters.targets] if isinstance(parameters.targets, str) else parameters.targets
    check_length("targets", given, settings.max_targets, "words")
    for i, target in enumerate(given):
        check_text(f"targets[{i}]", target, settings.max_text_chars)
        if not target.strip():
            raise InvalidRequest(f"targets[{i}] is empty, it must be a word")
    # Whether a space stands before the word is the mask's affair.
    return list(dict.fromkeys(target.lstrip() for target in given))


def _check_fillings(n_masks: int, n_each: int, settings: Settings) -> None:
    if n_masks * n_each > settings.max_fillings:
        raise InvalidRequest(
            f"inputs has {n_masks} masks with {n_each} fillings each: together {n_masks * n_each}, "
            f"the limit is {settings.max_fillings}"
        )


def _encode_all(inputs: str | list[str], task: Task[OneShotLane], settings: Settings) -> list[MaskedText]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    named = zip(input_names(inputs), texts, strict=True)
    return [_encode(name, text, task, settings) for name, text in named]


def _encode(name: str, text: str, task: Task[OneShotLane], settings: Settings) -> MaskedText:
    tokenizer, limit = task.tokenizer, task.lane.limits.max_item_tokens
    token_ids, spaced = tokenizer.masked_ids(plain(text))
    if not spaced:
        raise InvalidRequest(f"{name} has no mask; write {tokenizer.mask_token} where a word is missing")
    check_count(f"the number of masks in {name}", len(spaced), 1, settings.max_masks)
    if len(token_ids) > limit:
        raise InvalidRequest(f"{name} has {len(token_ids)} tokens, the limit is {limit}")
    return MaskedText(text, token_ids, spaced)


def _resolve(
    targets: list[str] | None, masked: list[MaskedText], tokenizer: Tokenizer
) -> dict[bool, list[int] | None]:
    """The ids of the targets where a space belongs to the filling, and where none does."""
    places = sorted({spaced for text in masked for spaced in text.spaced}, reverse=True)
    if targets is None:
        return dict.fromkeys(places)
    return {spaced: [_target_id(target, spaced, tokenizer) for target in targets] for spaced in places}


async def _votes(
    masked: list[MaskedText], task: Task[OneShotLane], weight: float
) -> list[list[Votes | None]]:
    """What known sentences say about each mask of each text."""
    examples = task.examples
    # No queue takes more.
    if examples is None or not weight or len(masked) > task.lane.limits.max_queue_items:
        return [[] for _ in masked]
    # One takes longer than the event loop may be held up.
    return await asyncio.to_thread(_look_up, masked, examples, task, weight)


def _look_up(
    masked: list[MaskedText], examples: Examples, task: Task[OneShotLane], weight: float
) -> list[list[Votes | None]]:
    tokenizer, config = task.tokenizer, task.config
    return [
        [
            votes
            for sentence, follows in _masked_sentences(text.text, tokenizer)
            for votes in find_votes(examples, sentence, tokenizer, config, weight, follows=follows)
        ]
        if len(text.spaced) <= _MOST_LOOKED_UP
        else []
        for text in masked
    ]


def _masked_sentences(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The sentences that hold masks; does each follow a space?"""
    before = ""
    for part in split_text(plain(text), _SPLIT_AS, tokenizer, _AS_IT_IS):
        if tokenizer.mask_token in part.text:
            yield part.text, before.endswith(" ")
        before = part.text


def _item(
    masked: MaskedText, wanted: dict[bool, list[int] | None], top_k: int, votes: list[Votes | None]
) -> BatchItem:
    return BatchItem(
        token_ids=masked.token_ids,
        segment_ids=[0] * len(masked.token_ids),
        task="fill-mask",
        top_k=top_k,
        targets=[wanted[spaced] for spaced in masked.spaced],
        allowed=["space" if spaced else "no_space" for spaced in masked.spaced],
        votes=votes,
    )


def _target_id(target: str, spaced: bool, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(f" {target}" if spaced else target)
    if len(ids) != 1:
        where = "after a space" if spaced else "without a space before it"
        raise InvalidRequest(f"targets: {brief(target)!r} {where} is {len(ids)} tokens, it must be one")
    return ids[0]


def _fillings(
    masked: MaskedText, k: int, ranked: list[tuple[int, float]], tokenizer: Tokenizer
) -> list[Filling]:
    """The fillings of mask k, the other masks left as they are."""
    parts = masked.text.split(tokenizer.mask_token)
    before, after = tokenizer.mask_token.join(parts[: k + 1]), tokenizer.mask_token.join(parts[k + 1 :])
    if masked.spaced[k]:
        before = before[:-1]  # of whatever kind
    fillings, special = [], tokenizer.special_ids
    for token_id, score in ranked:
        word = tokenizer.token_text(token_id) if token_id in special else tokenizer.decode([token_id])
        word = word if masked.spaced[k] else word.removeprefix(" ")
        filling = Filling(
            score=score, token=token_id, token_str=word.removeprefix(" "), sequence=before + word + after
        )
        fillings.append(filling)
    return fillings
