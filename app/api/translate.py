"""POST /translate: texts of any length, sentence by sentence, in the form of either dialect."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Body
from pydantic import BeforeValidator, Discriminator, Field, Tag
from typing_extensions import TypedDict

from app.api.bounds import (
    GlossaryTerms,
    Strict,
    Texts,
    check_count,
    check_length,
    check_penalty,
    check_range,
    check_text,
    check_texts,
    input_names,
)
from app.api.deps import BodyRoute, Call, CallDep, prepare
from app.api.examples import example_weight
from app.api.generation import max_new_tokens
from app.api.libretranslate import (
    FORM_BODY,
    LibreError,
    LibreTranslateRequest,
    LibreTranslateWork,
    LibreTranslation,
    is_libretranslate,
    merge_query,
    plan_libretranslate,
    read_form,
)
from app.api.translation import (
    Found,
    Joined,
    Plan,
    Search,
    TextForm,
    counterpart,
    default_round_trip,
    known_language,
    named_language,
    plan_texts,
    translate_plan,
)
from app.dialects import LIBRETRANSLATE_TAG, Dialect, speak
from app.engine.registry import GeneratingLane, Task
from app.engine.sequence import FinishReason, Hypothesis, Sequence
from app.errors import NO_OBJECT, ErrorBody, InvalidRequest, Json, brief
from app.protection import Glossary, is_translatable
from app.settings import Settings
from model.adopted import AdoptedTokenizer
from model.examples import Example
from model.round_trip import ways_back
from model.sampling import BeamParams
from model.tokenizer import TextStream, Tokenizer

router = APIRouter(route_class=BodyRoute)

_MAX_ROUND_TRIP = 10.0


class BeamParameters(Strict):
    """How to search; null means the default."""

    num_beams: int | None = Field(None, description="4 by default; 1 is greedy")
    num_return_sequences: int | None = Field(
        None,
        description="translations of each text, at most num_beams; they differ, and so there may be fewer",
    )
    length_penalty: float | None = Field(
        None, description="above 0 favours long translations; by default as the model has it"
    )
    max_new_tokens: int | None = Field(
        None, description="for each sentence; by default three times its length"
    )
    no_repeat_ngram_size: int | None = Field(None, description="no run of so many tokens twice; 0 is off")
    repetition_penalty: float | None = Field(
        None, description="makes tokens that stand there already less likely; 1, the default, is none"
    )
    early_stopping: Literal["never"] | bool | None = Field(
        None, description="when a search ends, by the rules of transformers; by default by our own"
    )


class TranslateParameters(BeamParameters):
    """Without languages Korean is translated to English, and English to Korean."""

    src_lang: str | None = Field(None, description="by default what the text is in")
    tgt_lang: str | None = Field(None, description="a language of the model (in /info), as `en` or `ko`")
    format: Literal["text", "html"] | None = Field(
        None, description="text by default; html: tags stay around their words, and no markup is translated"
    )
    glossary: GlossaryTerms | None = Field(
        None,
        description="terms of the source with their translations; the case of letters does not matter",
        examples=[{"station": "정거장"}],
    )
    do_not_translate: Texts | None = Field(None, description="terms that stay as they are")
    generate_parameters: BeamParameters | None = None
    round_trip: float | None = Field(
        None,
        description="of what a search has found, prefer what would give the source again: how much that "
        "counts beside the translation's own probability; 0 is off; by default as the model has it, and "
        "none with early_stopping. Nothing happens with one beam, nor to a sentence that is too long",
    )
    examples: float | None = Field(
        None,
        description="the most that known translations of similar sentences count in choosing a word, 0 to "
        "0.95; 0 is off; by default as the model has it",
    )
    return_examples: bool | None = Field(
        None, description="the known translations that were read, sentence by sentence, the likest first"
    )
    return_alignment: bool | None = Field(
        None,
        description="cross-attention weights, sentence by sentence, over the tokens that the model read: "
        "what is kept, and a glossary's term, stands there as the word that stood for it",
    )
    return_scores: bool | None = Field(
        None,
        description="mean log-probability of a token, over the sentences; with a shortlist among the tokens "
        "of that, so that it lies a little higher. It does not count the way back: see round_trip",
    )
    # Clients of the Hugging Face form may send these; the only behaviour there is has these values.
    clean_up_tokenization_spaces: Literal[False] | None = None
    truncation: Literal["do_not_truncate"] | None = None


class TranslateRequest(Strict):
    """One text or a list of texts."""

    inputs: str | Texts = Field(examples=["I go home."])
    parameters: TranslateParameters | None = None
    model: str | None = Field(
        None, description="as /info names it; by default the first that knows the languages"
    )


class Alignment(TypedDict):
    """weights[t][s]: how much target token t looked at source token s."""

    source_tokens: list[str]
    target_tokens: list[str]
    weights: list[list[float]]


class KnownTranslation(TypedDict):
    """likeness: how much its source is like the sentence, 0 to 1."""

    source: str
    target: str
    likeness: float


class Translation(TypedDict):
    """finish_reason stands only where a sentence ended for its length, unmet only where something is missing:
    the terms, addresses and numbers of the text that the translation should have, and has not.
    """

    translation_text: str
    unmet: NotRequired[list[str]]
    score: NotRequired[float]
    finish_reason: NotRequired[Literal["length"]]
    alignment: NotRequired[list[Alignment]]
    examples: NotRequired[list[list[KnownTranslation]]]


@dataclass(frozen=True)
class TranslateWork:
    """A request whose sentences are in the lane."""

    plan: Plan
    parameters: TranslateParameters
    is_list: bool

    def answer(self, found: Found) -> list[Translation] | list[list[Translation]]:
        """The best for each text; all that differ, where several were asked for."""
        answers = [[self._translation(j) for j in self.plan.join(text, found)] for text in self.plan.texts]
        if not self.is_list:
            return answers[0]
        return answers if self.plan.n_best > 1 else [answer[0] for answer in answers]

    def _translation(self, joined: Joined) -> Translation:
        answer = Translation(translation_text=joined.text)
        if joined.unmet:
            answer["unmet"] = joined.unmet
        if self.parameters.return_scores:
            answer["score"] = sum(h.score for _, h in joined.chosen) / max(len(joined.chosen), 1)
        if any(h.finish_reason is FinishReason.LENGTH for _, h in joined.chosen):
            answer["finish_reason"] = "length"
        if self.parameters.return_alignment:
            answer["alignment"] = [_alignment(s.sequence, h, self.plan.tokenizer) for s, h in joined.chosen]
        if self.parameters.return_examples:
            answer["examples"] = [[_known(example) for example in s.examples] for s, _ in joined.chosen]
        return answer


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": LibreError},
    **{status: {"model": ErrorBody | LibreError} for status in (404, 413, 429, 500, 503, 504)},
}


def _form(body: Any) -> str:
    return LIBRETRANSLATE_TAG if is_libretranslate(body) else "TranslateRequest"


AnyRequest = Annotated[
    Annotated[TranslateRequest, Tag("TranslateRequest")]
    | Annotated[LibreTranslateRequest, BeforeValidator(read_form), Tag(LIBRETRANSLATE_TAG)],
    Discriminator(_form),
]


async def admit(
    body: TranslateRequest | LibreTranslateRequest | None, call: Call
) -> TranslateWork | LibreTranslateWork:
    """Check, split, tokenise and submit all sentences of all texts."""
    request, models, settings = call.request, call.models, call.services.settings
    work: TranslateWork | LibreTranslateWork
    if isinstance(body, TranslateRequest):
        parameters = body.parameters or TranslateParameters()
        task = models.translate(body.model, parameters.src_lang, parameters.tgt_lang)
        work = await _plan(body, task, settings)
    elif body is None and "q" not in request.query_params:
        raise InvalidRequest(NO_OBJECT)
    else:
        speak(request.scope, Dialect.LIBRETRANSLATE)
        merged = merge_query(body, request.query_params)
        task = models.translate(merged.model, merged.named_source, merged.target)
        work = await plan_libretranslate(merged, task, settings)
    sequences = work.plan.sequences
    call.record.n_prompt_tokens = sum(len(sequence.prompt_ids) for sequence in sequences)
    call.submit(task.lane, sequences)
    return work


@router.post(
    "/translate",
    response_model=list[Translation] | list[list[Translation]] | LibreTranslation,
    responses=_ERRORS,
    openapi_extra=FORM_BODY,
)
async def translate(call: CallDep, body: Annotated[AnyRequest | None, Body()] = None) -> Json:
    """Translate each text; white space and line breaks between its sentences stay as they are.

    With `inputs` in the form of Hugging Face, with `q` in that of LibreTranslate. Addresses (URLs, e-mail),
    code in backticks and numbers are kept.
    """
    work = await admit(body, call)
    found = await translate_plan(work.plan, call.attendance, call.record)
    return Json(await prepare(work.plan.n_chars, work.answer, found))


async def _plan(body: TranslateRequest, task: Task[GeneratingLane], settings: Settings) -> TranslateWork:
    parameters = body.parameters or TranslateParameters()
    search = _resolve(parameters, settings, task)
    _check_languages(parameters, task.tokenizer)
    form = TextForm(parameters.format == "html", _glossary(parameters, settings))
    texts = dict(zip(input_names(body.inputs), check_texts(body.inputs, settings), strict=True))

    def direction(name: str, text: str) -> tuple[str, str]:
        return _languages(name, text, parameters, task)

    plan = await plan_texts(texts, direction, search, task, form)
    return TranslateWork(plan, parameters, isinstance(body.inputs, list))


def _glossary(parameters: TranslateParameters, settings: Settings) -> Glossary | None:
    """The terms of both kinds, bounded."""
    given, kept = parameters.glossary or {}, parameters.do_not_translate or []
    for name, terms in (("glossary", given), ("do_not_translate", kept)):
        if len(terms) > settings.max_terms:
            raise InvalidRequest(f"{name} has {len(terms)} terms, the limit is {settings.max_terms}")
    for name, texts in (("glossary", [*given, *given.values()]), ("do_not_translate", kept)):
        for text in texts:
            check_length(f"{name} {brief(text)!r}", text, settings.max_term_chars, "characters")
            check_text(f"{name} {brief(text)!r}", text, settings.max_term_chars)
            if not is_translatable(text):
                raise InvalidRequest(f"{name}: {brief(text)!r} has no letter")
    twice = {term.casefold() for term in given} & {term.casefold() for term in kept}
    if twice:
        raise InvalidRequest(f"glossary: {brief(min(twice))!r} is among do_not_translate, too")
    return Glossary.of(given, kept)


def _merge(parameters: TranslateParameters) -> BeamParameters:
    """The search parameters from both places where clients put them."""
    inner = parameters.generate_parameters or BeamParameters()
    merged: dict[str, Any] = {}
    for name in BeamParameters.model_fields:
        here, there = getattr(parameters, name), getattr(inner, name)
        if here is not None and there is not None and here != there:
            raise InvalidRequest(
                f"{name} is {brief(here)} in parameters but {brief(there)} in generate_parameters"
            )
        merged[name] = there if here is None else here
    return BeamParameters(**merged)


def _resolve(parameters: TranslateParameters, settings: Settings, task: Task[GeneratingLane]) -> Search:
    """Fill in the defaults and check the bounds."""
    asked = _merge(parameters)
    limit = max_new_tokens(settings, task, n_prompt=0)
    num_beams = settings.default_beams if asked.num_beams is None else asked.num_beams
    n_best = 1 if asked.num_return_sequences is None else asked.num_return_sequences
    check_count("num_beams", num_beams, 1, settings.max_beams)
    if n_best > num_beams:
        raise InvalidRequest(
            f"num_return_sequences is {brief(n_best)}, the limit is num_beams, which is {num_beams}"
        )
    check_count("num_return_sequences", n_best, 1, num_beams)
    given = {name: value for name, value in asked.model_dump().items() if value is not None}
    given["num_beams"] = num_beams
    beams = BeamParams(
        return_alignment=bool(parameters.return_alignment),
        example_weight=example_weight(parameters.examples, task),
        round_trip=_round_trip(parameters, settings, task, stops_as_asked=asked.early_stopping is not None),
        **({"max_new_tokens": limit, "length_penalty": task.config.length_penalty} | given),
    )
    check_count("max_new_tokens", beams.max_new_tokens, 1, limit)
    check_range(
        "length_penalty", beams.length_penalty, -settings.max_length_penalty, settings.max_length_penalty
    )
    check_count("no_repeat_ngram_size", beams.no_repeat_ngram_size, 0, settings.max_ngram_size)
    check_penalty("repetition_penalty", beams.repetition_penalty, settings)
    return Search(beams, asked.max_new_tokens, limit, settings.default_beams)


def _round_trip(
    parameters: TranslateParameters, settings: Settings, task: Task[GeneratingLane], *, stops_as_asked: bool
) -> float:
    asked = parameters.round_trip
    if asked is None:
        return 0.0 if stops_as_asked else default_round_trip(settings, task)
    check_range("round_trip", asked, 0.0, _MAX_ROUND_TRIP)
    if asked and stops_as_asked:
        raise InvalidRequest("round_trip and early_stopping: one rule or the other says which is best")
    if asked and (isinstance(task.tokenizer, AdoptedTokenizer) or not ways_back(task.config)):
        raise InvalidRequest(f"round_trip is {brief(asked)}, but model {task.name} knows no way back")
    return asked


def _check_languages(parameters: TranslateParameters, tokenizer: Tokenizer) -> None:
    src, tgt = _named_languages(parameters, tokenizer)
    if src is not None and src == tgt:
        raise InvalidRequest(f"src_lang and tgt_lang are both {src!r}; they must differ")


def _named_languages(parameters: TranslateParameters, tokenizer: Tokenizer) -> tuple[str | None, str | None]:
    """What the model calls the languages that are given."""
    src, tgt = parameters.src_lang, parameters.tgt_lang
    return (
        None if src is None else named_language("src_lang", src, tokenizer.sources),
        None if tgt is None else named_language("tgt_lang", tgt, tokenizer.targets),
    )


def _languages(
    name: str, text: str, parameters: TranslateParameters, task: Task[GeneratingLane]
) -> tuple[str, str]:
    """Source and target: as given, else what the text is in (it may be the target), and the other."""
    src, tgt = _named_languages(parameters, task.tokenizer)
    if src is None:
        _, src = known_language(name, text, task, "src_lang")
    return src, tgt or counterpart(src, task.tokenizer.targets) or src


def _alignment(sequence: Sequence, hypothesis: Hypothesis, tokenizer: Tokenizer) -> Alignment:
    target_ids = hypothesis.token_ids
    weights = (hypothesis.alignment or [])[: len(target_ids)]
    return Alignment(
        source_tokens=_token_texts(sequence.prompt_ids, tokenizer),
        target_tokens=_token_texts(target_ids, tokenizer),
        weights=[[round(weight, 4) for weight in row] for row in weights],
    )


def _known(example: Example) -> KnownTranslation:
    return KnownTranslation(source=example.source, target=example.target, likeness=round(example.likeness, 4))


def _token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Special tokens by their names; a character of several tokens stands whole at its last."""
    stream = TextStream(tokenizer)
    return [tokenizer.token_text(i) if i in tokenizer.special_ids else stream.push(i) for i in ids]
