"""POST /tokenize: the tokens of a text, as the model of a task sees them."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from app.api.bounds import Strict, Texts, check_texts
from app.api.deps import Call, CallDep, prepare
from app.errors import InvalidRequest, Json, NotLoaded
from model.tokenizer import Piece, Tokenizer

router = APIRouter()


class TokenizeRequest(Strict):
    """One text or a list of texts."""

    inputs: str | Texts = Field(examples=["I go home."])
    task: str | None = Field(
        None,
        description="translate, fill-mask, generate or classify; by default the first of them that is loaded",
    )
    model: str | None = Field(None, description="as /info names it; by default the first")


class TokenSpan(TypedDict):
    """A token, with the characters [start, stop) it came from; parts of one character share its place."""

    id: int
    text: str
    start: int
    stop: int
    special: bool


@router.post("/tokenize", response_model=list[TokenSpan] | list[list[TokenSpan]])
async def tokenize(body: TokenizeRequest, call: CallDep) -> Json:
    """Nothing is added to the text. For fill-mask the mask token counts, with the space before it."""
    name = _task_name(body, call)
    texts = check_texts(body.inputs, call.services.settings)
    n_chars, limit = sum(map(len, texts)), call.services.settings.max_tokenize_chars
    if n_chars > limit:
        raise InvalidRequest(f"inputs has {n_chars} characters in all, the limit is {limit}")
    tokenizer = call.models.of(name, body.model).tokenizer
    is_list = isinstance(body.inputs, list)
    return await prepare(n_chars, _answer, texts, is_list, name == "fill-mask", tokenizer)


def _task_name(body: TokenizeRequest, call: Call) -> str:
    names = list(call.services.tasks)
    if not names:
        raise NotLoaded("no model is loaded")
    if body.task is None:
        return call.models.endpoints(body.model)[0]
    if body.task not in names:
        raise InvalidRequest(f"task: no task {body.task[:20]!r} is loaded; there are {', '.join(names)}")
    return body.task


def _answer(texts: list[str], is_list: bool, with_masks: bool, tokenizer: Tokenizer) -> Json:
    cut = tokenizer.masked_pieces if with_masks else tokenizer.encode_with_offsets
    answers = [[_span(piece, tokenizer) for piece in cut(text)] for text in texts]
    return Json(answers if is_list else answers[0])


def _span(piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": piece.id,
        "text": piece.text,
        "start": piece.start,
        "stop": piece.stop,
        "special": piece.id in tokenizer.special_ids,
    }
