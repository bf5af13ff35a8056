"""LibreTranslate's form of POST /translate, and its POST /detect and GET /languages."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired
from urllib.parse import parse_qsl

from fastapi import APIRouter, Body, Query
from pydantic import BeforeValidator, Field
from starlette.datastructures import QueryParams
from typing_extensions import TypedDict

from app.api.bounds import Strict, Texts, check_count, check_text, check_texts, input_names
from app.api.deps import CallDep
from app.api.examples import default_example_weight
from app.api.generation import max_new_tokens
from app.api.translation import (
    Found,
    Plan,
    Search,
    TextForm,
    default_round_trip,
    known_language,
    named_language,
    plan_texts,
)
from app.bodies import MAX_FORM_FIELDS
from app.engine.registry import GeneratingLane, Task
from app.errors import InvalidRequest, Json
from app.languages import detect_language
from app.settings import Settings
from app.spaces import composed
from app.spelling import narrow
from model.languages import language_name
from model.sampling import BeamParams

router = APIRouter()

_AUTO = "auto"
_MULTIPART = b"--"  # what begins its boundary; the content type itself does not get here
_CONTENT_TYPES = "application/json or application/x-www-form-urlencoded"


class LibreTranslateRequest(Strict):
    """As JSON, as a form, or in the query string; null means the default."""

    q: str | Texts | None = Field(None, description="the text, or a list of texts", examples=["I go home."])
    source: str | None = Field(None, description="a language, or auto, the default")
    target: str | None = Field(None, description="a language")
    format: str | None = Field(None, description="text, the default, or html")
    alternatives: int | None = Field(None, description="so many more translations, where there are")
    api_key: str | None = Field(None, description="where the server wants one")
    model: str | None = Field(
        None, description="as /info names it; by default the first that knows the languages"
    )

    @property
    def named_source(self) -> str | None:
        """None where the text shall tell."""
        return None if self.source == _AUTO else self.source


class DetectRequest(Strict):
    """As JSON, as a form, or in the query string."""

    q: str | None = Field(None, description="the text", examples=["I go home."])
    api_key: str | None = Field(None, description="where the server wants one")


class Detection(TypedDict):
    """The confidence is a percentage."""

    confidence: float
    language: str


class LibreTranslation(TypedDict):
    """A list in gives lists out; detectedLanguage only where the source was auto."""

    translatedText: str | list[str]
    alternatives: NotRequired[list[str] | list[list[str]]]
    detectedLanguage: NotRequired[Detection | list[Detection]]


class Language(TypedDict):
    """A language, and what it can be translated to; to itself it stays as it is."""

    code: str
    name: str
    targets: list[str]


class LibreError(TypedDict):
    """Every answer that is not a success."""

    error: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": LibreError} for status in (400, 403, 404, 408, 413, 429, 500, 503)
} | {"default": {"model": LibreError, "description": "Any other error"}}

# FastAPI describes the JSON body by itself; this is the same as a form.
FORM_BODY = {
    "requestBody": {
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {"$ref": "#/components/schemas/LibreTranslateRequest"}
            }
        }
    }
}


def read_form(body: Any) -> Any:
    """A body that is no JSON arrives as bytes; a field that is repeated is a list."""
    if not isinstance(body, bytes):
        return body
    if body.startswith(_MULTIPART):
        raise ValueError(f"a multipart form is not understood; send {_CONTENT_TYPES}")
    try:
        text = body.decode()
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FORM_FIELDS)
    except UnicodeDecodeError:
        raise ValueError("the form is not valid UTF-8") from None
    except ValueError:
        raise ValueError(f"the form has more than {MAX_FORM_FIELDS} fields") from None
    return _from_pairs(pairs)


def _from_pairs(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    fields: dict[str, Any] = {name: each[0] if len(each) == 1 else each for name, each in values.items()}
    number = fields.get("alternatives")
    if isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) < 10:
        fields["alternatives"] = int(number)
    return fields


def is_libretranslate(body: Any) -> bool:
    """Is a body of POST /translate in this form? A form always is."""
    if isinstance(body, bytes):
        first = body.lstrip()[:1]
        return body.startswith(_MULTIPART) or ((first.isalpha() or first == b"%") and b"=" in body)
    return isinstance(body, dict) and "inputs" not in body and not body.keys().isdisjoint(("q", "target"))


def merge_query(body: LibreTranslateRequest | None, query: QueryParams) -> LibreTranslateRequest:
    """What the body leaves open is taken from the query string."""
    given = {} if body is None else body.model_dump(exclude_none=True)
    names = LibreTranslateRequest.model_fields
    fields = _from_pairs((name, value) for name, value in query.multi_items() if name in names) | given
    if not isinstance(fields.get("alternatives", 0), int):
        raise InvalidRequest("alternatives: must be a whole number")
    for name in names.keys() - {"q", "alternatives"}:
        if isinstance(fields.get(name), list):
            raise InvalidRequest(f"{name} has {len(fields[name])} values, it takes one")
    return LibreTranslateRequest(**fields)


@dataclass(frozen=True)
class LibreTranslateWork:
    """A request in this form whose sentences are in the lane."""

    plan: Plan
    detected: list[Detection] | None
    n_alternatives: int
    is_list: bool

    def answer(self, found: Found) -> LibreTranslation:
        """Lists for a list, alternatives and detected languages where they were asked for."""
        ranked = [[joined.text for joined in self.plan.join(text, found)] for text in self.plan.texts]
        best = [each[0] for each in ranked]
        answer = LibreTranslation(translatedText=best if self.is_list else best[0])
        if self.n_alternatives:
            others = [each[1:] for each in ranked]
            answer["alternatives"] = others if self.is_list else others[0]
        if self.detected is not None:
            answer["detectedLanguage"] = self.detected if self.is_list else self.detected[0]
        return answer


async def plan_libretranslate(
    body: LibreTranslateRequest, task: Task[GeneratingLane], settings: Settings
) -> LibreTranslateWork:
    """Check, split and tokenise."""
    source, target = _check_languages(body, task)
    if body.format not in (None, "text", "html"):
        raise InvalidRequest(f"format is {body.format[:20]!r}; there are text, html")
    n_alternatives = body.alternatives or 0
    search = _search(n_alternatives, settings, task)
    if body.q is None:
        raise InvalidRequest("q: Field required")
    texts = dict(zip(input_names(body.q, "q"), check_texts(body.q, settings, "q"), strict=True))
    detected: list[Detection] = []

    def direction(name: str, text: str) -> tuple[str, str]:
        if source != _AUTO:
            return source, target
        found, code = known_language(name, text, task, "source")
        detected.append(Detection(confidence=round(100 * found.probability), language=found.code))
        return code, target

    plan = await plan_texts(texts, direction, search, task, TextForm(body.format == "html"))
    return LibreTranslateWork(plan, detected or None, n_alternatives, isinstance(body.q, list))


def _check_languages(body: LibreTranslateRequest, task: Task[GeneratingLane]) -> tuple[str, str]:
    tokenizer, source = task.tokenizer, _AUTO if body.source is None else body.source
    if body.target is None:
        raise InvalidRequest("target: Field required")
    if source != _AUTO:
        source = named_language("source", source, tokenizer.sources)
    return source, named_language("target", body.target, tokenizer.targets)


def _search(n_alternatives: int, settings: Settings, task: Task[GeneratingLane]) -> Search:
    check_count("alternatives", n_alternatives, 0, settings.max_beams - 1)
    limit = max_new_tokens(settings, task, n_prompt=0)
    n_best = n_alternatives + 1
    num_beams = max(settings.default_beams, n_best)
    beams = BeamParams(
        num_beams=num_beams,
        num_return_sequences=n_best,
        length_penalty=task.config.length_penalty,
        round_trip=default_round_trip(settings, task),
        example_weight=default_example_weight(task),
        max_new_tokens=limit,
    )
    return Search(beams, None, limit, settings.default_beams)


@router.post("/detect", response_model=list[Detection], responses=_ERRORS)
async def detect_text(
    call: CallDep,
    body: Annotated[Annotated[DetectRequest, BeforeValidator(read_form)] | None, Body()] = None,
) -> Json:
    """The language of a text, whether a model here knows it or not."""
    text = body.q if body is not None and body.q is not None else call.request.query_params.get("q")
    if text is None:
        raise InvalidRequest("q: Field required")
    check_text("q", text, call.services.settings.max_text_chars)
    found = detect_language(narrow(composed(text)))
    return Json([Detection(confidence=round(100 * found.probability, 1), language=found.code)])


# Clients of this form before version 2.1.2 send their question as a form.
@router.post("/languages", response_model=list[Language], responses=_ERRORS, include_in_schema=False)
@router.get("/languages", response_model=list[Language], responses=_ERRORS)
async def list_languages(
    call: CallDep,
    model: Annotated[str | None, Query(description="as /info names it; by default all together")] = None,
) -> Json:
    """The languages, each with what it can be translated to by one model or another."""
    chosen = call.models.translate(model)
    tasks = [chosen] if call.models.named(model) else call.services.registry.translate
    targets: dict[str, set[str]] = {}
    for tokenizer in (task.tokenizer for task in tasks):
        for code in {*tokenizer.sources, *tokenizer.targets}:
            reached = tokenizer.targets if code in tokenizer.sources else ()
            targets.setdefault(code, set()).update(reached)
    return Json(
        [
            Language(code=code, name=language_name(code), targets=sorted(targets[code]))
            for code in sorted(targets)
        ]
    )
