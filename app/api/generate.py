"""POST /generate, whole or streamed, and POST /generate_stream, in the form of Text Generation Inference."""

import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any, Literal, NotRequired

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.bounds import (
    Strict,
    Texts,
    check_count,
    check_frequency_penalty,
    check_penalty,
    check_probability,
    check_temperature,
    check_texts,
    input_names,
)
from app.api.deps import BodyRoute, Call, CallDep, gather, note_times, prepare
from app.api.generation import (
    EventStream,
    Generation,
    Token,
    check_stops,
    first_of,
    fit_new_tokens,
    max_new_tokens,
    sse_event,
    with_own_penalty,
)
from app.dialects import Dialect, error_body
from app.engine.registry import GeneratingLane, Task
from app.engine.sequence import Sequence
from app.errors import ClientGone, InvalidRequest, Json, brief, classify
from app.settings import Settings
from model.sampling import SamplingParams
from model.tokenizer import TextStream, Tokenizer

log = logging.getLogger("app")
router = APIRouter(route_class=BodyRoute)


class GenerateParameters(Strict):
    """null means the default. Greedy unless do_sample or a sampling parameter is given."""

    max_new_tokens: int | None = Field(None, description="20 by default; the limit is in /info")
    do_sample: bool | None = Field(None, description="draw tokens, by default with a temperature of 1")
    temperature: float | None = Field(None, description="0 is greedy")
    top_k: int | None = Field(None, description="0 is off")
    top_p: float | None = Field(
        None, description="draw from the likeliest tokens that have this share together; 1 is off"
    )
    typical_p: float | None = Field(None, description="the same of the most typical tokens; 1 is off")
    repetition_penalty: float | None = Field(
        None,
        description="by default the model's own (`config` in /info) without sampling, 1 with it; 1 is none",
    )
    frequency_penalty: float | None = Field(
        None, description="taken from a token's logit for each time that it stands there already; 0 is none"
    )
    stop: str | Texts | None = Field(None, description="the text ends with the first that appears")
    seed: int | None = Field(None, description="the same seed draws the same tokens")
    truncate: int | None = Field(None, description="keep only the last tokens of the prompt, so many in all")
    return_full_text: bool | None = Field(None, description="with the prompt before the text")
    details: bool | None = Field(None, description="the tokens, why the text ended, and the seed")
    decoder_input_details: bool | None = Field(None, description="with details: the prompt's tokens, too")
    top_n_tokens: int | None = Field(None, description="with details: so many likely tokens at each place")
    best_of: int | None = Field(None, description="draw so many texts, keep the likeliest; not in a stream")
    # Clients of this form may send these; only the values that change nothing are taken.
    watermark: Literal[False] | None = None
    adapter_id: None = None
    grammar: None = None


class GenerateRequest(Strict):
    """One text or a list of texts; a stream takes one."""

    inputs: str | Texts = Field(examples=["Once upon a time"])
    parameters: GenerateParameters | None = None
    model: str | None = Field(None, description="as /info names it; by default the first")
    stream: bool | None = None


class PrefillToken(TypedDict):
    """A token of the prompt; the first one has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Details(TypedDict):
    """How a text came about; best_of_sequences are the attempts that were not the best."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: NotRequired[list[list[Token]]]
    best_of_sequences: NotRequired[list["BestOfSequence"]]


class BestOfSequence(Details):
    """An attempt that was not the best."""

    generated_text: str


class Generated(TypedDict):
    """One text."""

    generated_text: str
    details: NotRequired[Details]


@dataclass(frozen=True)
class GenerateWork:
    """A request whose sequences are in the lane: best_of generations for each text."""

    texts: list[str]
    generations: list[list[Generation]]
    parameters: GenerateParameters
    sampled: bool
    is_list: bool

    @property
    def flat(self) -> list[Generation]:
        return [generation for group in self.generations for generation in group]


async def admit(body: GenerateRequest, call: Call, *, streamed: bool) -> GenerateWork:
    """Check, tokenise and submit."""
    settings = call.services.settings
    task = call.models.generate(body.model)
    parameters = body.parameters or GenerateParameters()
    texts = check_texts(body.inputs, settings)
    stops = _check(parameters, settings, task)
    if streamed:
        _check_stream(parameters, texts)
    # A stream's events carry them, details too, and the best of several are found by them.
    scored = streamed or bool(parameters.details) or (parameters.best_of or 1) > 1
    sampling = with_own_penalty(_sampling(parameters), parameters.repetition_penalty, task)
    sampling = replace(sampling, logprobs=scored)
    prompts = await prepare(sum(map(len, texts)), _encode_all, texts, parameters, task.tokenizer)
    generations = [
        _generations(name, prompt, sampling, parameters, stops, task, settings)
        for name, prompt in zip(input_names(body.inputs), prompts, strict=True)
    ]
    work = GenerateWork(
        texts, generations, parameters, sampling.temperature > 0, isinstance(body.inputs, list)
    )
    sequences = [generation.sequence for generation in work.flat]
    call.record.n_prompt_tokens = sum(map(len, prompts))
    call.submit(task.lane, sequences)
    return work


_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@router.post("/generate", response_model=Generated | list[Generated], responses=_STREAM)
async def generate(body: GenerateRequest, call: CallDep) -> Response:
    """Continue the text; with `"stream": true` as server-sent events, one for each token."""
    work = await admit(body, call, streamed=bool(body.stream))
    if body.stream:
        return await _stream(work, call)
    await call.attendance.wait_for(gather(generation.run() for generation in work.flat))
    note_times(call.record, (generation.sequence for generation in work.flat))
    call.record.n_generated_tokens = sum(len(generation.tokens) for generation in work.flat)
    answers = [_answer(text, group, work) for text, group in zip(work.texts, work.generations, strict=True)]
    return Json(answers if work.is_list else answers[0])


@router.post("/generate_stream", response_class=Response, responses=_STREAM)
async def generate_stream(body: GenerateRequest, call: CallDep) -> Response:
    """Continue the text, always as server-sent events."""
    return await _stream(await admit(body, call, streamed=True), call)


async def _stream(work: GenerateWork, call: Call) -> Response:
    """Waits for the first token, so that what fails before it is still an ordinary error."""
    generation = work.flat[0]
    steps = generation.steps()
    first = await call.attendance.wait_for(first_of(steps))
    note_times(call.record, [generation.sequence])
    return EventStream(_events(first, steps, work, call))


async def _events(
    first: Token, steps: AsyncGenerator[Token, None], work: GenerateWork, call: Call
) -> AsyncGenerator[bytes, None]:
    generation, token, record = work.flat[0], first, call.record
    try:
        while True:
            record.n_generated_tokens = len(generation.tokens)
            yield sse_event(_step(token, work))
            if generation.finish_reason is not None:
                return
            token = await call.attendance.wait_for(first_of(steps))
    except ClientGone:
        pass  # the record knows, and nobody reads on
    except Exception as exc:
        record.error_type = classify(exc)[1]
        if record.error_type == "generation":
            log.exception("a stream failed", extra={"fields": {"id": record.request_id}})
        yield sse_event(error_body(exc, Dialect.HUGGING_FACE))
    finally:
        note_times(record, [generation.sequence])
        await steps.aclose()


def _step(token: Token, work: GenerateWork) -> dict[str, Any]:
    """One event; the last one, whose generation has its finish_reason, has the whole text."""
    generation = work.generations[0][0]
    step: dict[str, Any] = {"index": len(generation.tokens), "token": token}
    if work.parameters.top_n_tokens:
        step["top_tokens"] = generation.top_tokens[-1]
    if generation.finish_reason is None:
        return step | {"generated_text": None, "details": None}
    details = {
        "finish_reason": generation.finish_reason,
        "generated_tokens": len(generation.tokens),
        "input_length": len(generation.sequence.prompt_ids),
        "seed": _seed(generation, work),
    }
    return step | {"generated_text": _full_text(work.texts[0], generation, work), "details": details}


def _answer(text: str, group: list[Generation], work: GenerateWork) -> Generated:
    """The most probable of a text's generations, the others in its details."""
    best = max(group, key=lambda generation: generation.mean_logprob)
    answer = Generated(generated_text=_full_text(text, best, work))
    if work.parameters.details:
        answer["details"] = _details(best, work)
        others = [other for other in group if other is not best]
        if others:
            answer["details"]["best_of_sequences"] = [
                BestOfSequence(generated_text=_full_text(text, other, work), **_details(other, work))
                for other in others
            ]
    return answer


def _details(generation: Generation, work: GenerateWork) -> Details:
    details = Details(
        finish_reason=str(generation.finish_reason),
        generated_tokens=len(generation.tokens),
        seed=_seed(generation, work),
        prefill=_prefill(generation, work),
        tokens=generation.tokens,
    )
    if work.parameters.top_n_tokens:
        details["top_tokens"] = generation.top_tokens
    return details


def _full_text(prompt: str, generation: Generation, work: GenerateWork) -> str:
    return prompt + generation.text if work.parameters.return_full_text else generation.text


def _seed(generation: Generation, work: GenerateWork) -> int | None:
    return generation.sequence.seed if work.sampled else work.parameters.seed


def _prefill(generation: Generation, work: GenerateWork) -> list[PrefillToken]:
    if not work.parameters.decoder_input_details:
        return []
    pieces = TextStream(generation.tokenizer)
    pairs = zip(generation.sequence.prompt_ids, generation.sequence.prompt_logprobs_out, strict=True)
    return [PrefillToken(id=i, text=pieces.push(i), logprob=logprob) for i, logprob in pairs]


def _check(parameters: GenerateParameters, settings: Settings, task: Task[GeneratingLane]) -> list[str]:
    """Check the bounds of what is given; the stop strings as a list."""
    given = {name: value for name, value in parameters.model_dump().items() if value is not None}
    for name, low, high in (
        ("top_k", 0, settings.max_top_k),
        ("seed", 0, settings.max_seed),
        ("top_n_tokens", 0, settings.max_top_n_tokens),
        ("best_of", 1, settings.max_best_of),
        ("max_new_tokens", 1, max_new_tokens(settings, task)),
    ):
        if name in given:
            check_count(name, given[name], low, high)
    if parameters.frequency_penalty is not None:
        check_frequency_penalty("frequency_penalty", parameters.frequency_penalty, settings)
    if parameters.truncate is not None and parameters.truncate < 1:
        raise InvalidRequest(f"truncate is {brief(parameters.truncate)}, the least is 1")
    if parameters.repetition_penalty is not None:
        check_penalty("repetition_penalty", parameters.repetition_penalty, settings)
    if parameters.temperature is not None:
        check_temperature(parameters.temperature, settings)
    for name in ("top_p", "typical_p"):
        if name in given:
            check_probability(name, given[name])
    return check_stops(parameters.stop, settings)


def _check_stream(parameters: GenerateParameters, texts: list[str]) -> None:
    if len(texts) != 1:
        raise InvalidRequest(f"inputs has {len(texts)} texts, a stream takes one")
    if parameters.best_of is not None and parameters.best_of > 1:
        raise InvalidRequest(f"best_of is {parameters.best_of}, a stream takes only 1")
    if parameters.decoder_input_details:
        raise InvalidRequest("decoder_input_details: a stream does not give them")


def _sampling(parameters: GenerateParameters) -> SamplingParams:
    """The engine's parameters, all but the length."""
    asks = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    sampled = bool(parameters.do_sample) or any(value is not None for value in asks)
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    params = SamplingParams(
        temperature=temperature if sampled else 0.0,
        top_k=parameters.top_k or 0,
        top_p=_default(parameters.top_p, 1.0),
        typical_p=_default(parameters.typical_p, 1.0),
        repetition_penalty=_default(parameters.repetition_penalty, 1.0),
        frequency_penalty=_default(parameters.frequency_penalty, 0.0),
        seed=parameters.seed,
        top_n_tokens=parameters.top_n_tokens or 0,
    )
    if params.temperature == 0.0 and (parameters.best_of or 1) > 1:
        raise InvalidRequest(f"best_of is {parameters.best_of}, more than 1 needs sampling (do_sample)")
    return params


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _encode_all(texts: list[str], parameters: GenerateParameters, tokenizer: Tokenizer) -> list[list[int]]:
    return [_encode(text, parameters.truncate, tokenizer) for text in texts]


def _encode(text: str, truncate: int | None, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(text)
    room = None if truncate is None else max(truncate - len(tokenizer.prompt_prefix), 0)
    if room is not None and len(ids) > room:
        ids = ids[len(ids) - room :]
    return tokenizer.prompt_ids(ids)


def _generations(
    name: str,
    prompt: list[int],
    sampling: SamplingParams,
    parameters: GenerateParameters,
    stops: list[str],
    task: Task[GeneratingLane],
    settings: Settings,
) -> list[Generation]:
    """best_of generations of one prompt, each with a seed of its own."""
    new_tokens = fit_new_tokens(
        name, len(prompt), "max_new_tokens", parameters.max_new_tokens, settings.default_new_tokens, task
    )
    sampling = replace(sampling, max_new_tokens=new_tokens)
    generations = []
    for i in range(parameters.best_of or 1):
        seed = None if sampling.seed is None else (sampling.seed + i) % (settings.max_seed + 1)
        sequence = Sequence(
            prompt, replace(sampling, seed=seed), prompt_logprobs=bool(parameters.decoder_input_details)
        )
        generations.append(Generation(sequence, task.lane, task.tokenizer, stops))
    return generations
