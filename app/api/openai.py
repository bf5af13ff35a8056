"""POST /v1/completions, whole or streamed, and GET /v1/models, in OpenAI's form."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.sse import format_sse_event
from pydantic import FailFast, Field
from starlette.responses import Response
from typing_extensions import TypeAliasType, TypedDict

from app.api.bounds import (
    LogitBias,
    Strict,
    Texts,
    check_count,
    check_frequency_penalty,
    check_length,
    check_penalty,
    check_probability,
    check_range,
    check_temperature,
    check_text,
    input_names,
)
from app.api.deps import BodyRoute, Call, CallDep, gather, note_times, prepare
from app.api.generation import (
    EventStream,
    Generation,
    check_stops,
    first_of,
    fit_new_tokens,
    max_new_tokens,
    sse_event,
    with_own_penalty,
)
from app.dialects import Dialect, error_body
from app.engine.registry import GeneratingLane, Task
from app.engine.sequence import FinishReason, Sequence
from app.errors import ClientGone, InvalidRequest, Json, brief, classify
from app.settings import Settings
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer, text_pieces

log = logging.getLogger("app")
router = APIRouter(route_class=BodyRoute)

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_BIAS = 100.0  # OpenAI's; with as much a token is certain or impossible
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; clients of this form know this number
_STARTED = int(time.time())
_DONE = format_sse_event(data_str="[DONE]")

Ids = TypeAliasType("Ids", Annotated[list[int], FailFast()])
IdLists = TypeAliasType("IdLists", Annotated[list[Ids], FailFast()])
Prompts = str | Texts | Ids | IdLists


class StreamOptions(Strict):
    """Only together with stream."""

    include_usage: bool | None = Field(None, description="a last chunk without choices tells the usage")


class CompletionRequest(Strict):
    """null means the default."""

    model: str | None = Field(None, description="as /v1/models names it")
    prompt: Prompts | None = Field(
        None,
        description="a text, a list of texts, a list of token ids, or a list of such lists; ids stand after "
        "the token that begins a text, which is put before them unless it is there",
        examples=["Once upon a time"],
    )
    max_tokens: int | None = Field(None, description="16 by default; 0 only with echo")
    temperature: float | None = Field(None, description="1 by default; 0 is greedy")
    top_p: float | None = None
    n: int | None = Field(None, description="choices for each prompt; choice i of prompt p has index p*n+i")
    best_of: int | None = Field(None, description="draw so many, keep the n most probable; not in a stream")
    stop: str | Texts | None = Field(None, description="the text ends before the first that appears")
    seed: int | None = None
    logprobs: int | None = Field(
        None, description="tokens with log-probabilities, and so many alternatives (not for an echoed prompt)"
    )
    echo: bool | None = Field(None, description="the prompt stands before the completion")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: LogitBias | None = Field(
        None,
        description="what is added to the logits of tokens, -100 to 100, by their ids; /tokenize tells them",
    )
    top_k: int | None = Field(None, description="0 is off")
    repetition_penalty: float | None = None
    user: str | None = Field(None, description="ignored")
    # Taken only as far as they change nothing.
    suffix: str | None = Field(None, description="not supported: null")


class Logprobs(TypedDict):
    """One entry for each token; a token that is no whole character stands as its bytes."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text; in a stream, what it has grown by, with finish_reason in its last chunk."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(TypedDict):
    """Tokens of all prompts and of everything that was generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(TypedDict):
    """The answer, or a chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(TypedDict):
    """A model that completes."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class OpenAIError(TypedDict):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(TypedDict):
    """Every answer that is not a success."""

    error: OpenAIError


# "default" also keeps FastAPI from documenting a 422 in its own form, which never occurs here.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorBody} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
} | {"default": {"model": OpenAIErrorBody, "description": "Any other error"}}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@dataclass(frozen=True)
class Prompt:
    """What a choice goes on from. `echoed` counts from the first token that the client gave."""

    token_ids: list[int]
    text: str
    n_added: int

    @property
    def echoed(self) -> list[int]:
        return self.token_ids[self.n_added :]


class Choice:
    """One generation on its way to the client, who gets it whole or in pieces."""

    def __init__(self, prompt: Prompt, generation: Generation, body: CompletionRequest) -> None:
        self.prompt, self.generation = prompt, generation
        self._wants_logprobs = body.logprobs is not None
        self._echo = bool(body.echo)
        self._silent = body.max_tokens == 0
        self._started = False
        self._n_chars = 0  # of the generated text, handed out
        self._n_tokens = 0
        self._offset = 0  # of token number _n_tokens in the generated text

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        reason = self.generation.finish_reason
        if reason is None:
            return None
        return "length" if reason is FinishReason.LENGTH or self._silent else "stop"

    @property
    def n_generated(self) -> int:
        return 0 if self._silent else len(self.generation.tokens)

    def take(self, index: int) -> CompletionChoice:
        """What is certain by now and was not taken before. After the first token at the earliest."""
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        text = ""
        if self._echo and not self._started:
            text = self.prompt.text
            if self._wants_logprobs:
                self._take_prompt(logprobs)
        self._started = True
        if not self._silent:
            end = visible_chars(self.generation)
            text += self.generation.text[self._n_chars : end]
            self._n_chars = end
            if self._wants_logprobs:
                self._take_tokens(logprobs, end)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs if self._wants_logprobs else None,
            finish_reason=self.finish_reason,
        )

    def _take_prompt(self, logprobs: Logprobs) -> None:
        tokenizer, offset = self.generation.tokenizer, 0
        known = self.generation.sequence.prompt_logprobs_out[self.prompt.n_added :]
        pieces = text_pieces(tokenizer, self.prompt.echoed)
        for token_id, piece, logprob in zip(self.prompt.echoed, pieces, known, strict=True):
            logprobs["tokens"].append(token_name(token_id, tokenizer))
            logprobs["token_logprobs"].append(None if logprob is None else finite(logprob))
            logprobs["top_logprobs"].append(None)
            logprobs["text_offset"].append(offset)
            offset += len(piece)

    def _take_tokens(self, logprobs: Logprobs, end: int) -> None:
        """Tokens that begin before `end`, and at the end of the generation those without text, too."""
        generation, tokenizer = self.generation, self.generation.tokenizer
        ended = generation.finish_reason not in (None, FinishReason.STOP)
        before = len(self.prompt.text) if self._echo else 0
        while self._n_tokens < len(generation.tokens) and (ended or self._offset < end):
            token, top = generation.tokens[self._n_tokens], generation.top_tokens[self._n_tokens]
            name = token_name(token["id"], tokenizer)
            alternatives = {token_name(each["id"], tokenizer): finite(each["logprob"]) for each in top}
            logprobs["tokens"].append(name)
            logprobs["token_logprobs"].append(finite(token["logprob"]))
            logprobs["top_logprobs"].append(alternatives | {name: finite(token["logprob"])})
            logprobs["text_offset"].append(before + self._offset)
            self._offset += len(token["text"])
            self._n_tokens += 1


def visible_chars(generation: Generation) -> int:
    """How much of the text is certain to be part of the answer: nothing of a stop string is, in this form."""
    text, stops = generation.text, generation.stops
    if generation.finish_reason is None:
        return len(text) - max((overlap(text, stop) for stop in stops), default=0)
    if generation.finish_reason is FinishReason.STOP:
        return len(text) - max(len(stop) for stop in stops if text.endswith(stop))
    return len(text)


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string, not yet whole, may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def token_name(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; a special one's name; what is no whole character as its bytes."""
    if token_id in tokenizer.special_ids:
        return tokenizer.token_text(token_id)
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


@dataclass(frozen=True)
class CompletionWork:
    """A request whose sequences are in the lane: best_of choices for each prompt."""

    id: str
    created: int
    model: str
    groups: list[list[Choice]]
    n: int
    include_usage: bool

    @property
    def choices(self) -> list[Choice]:
        return [choice for group in self.groups for choice in group]

    @property
    def sequences(self) -> list[Sequence]:
        return [choice.generation.sequence for choice in self.choices]

    @property
    def usage(self) -> Usage:
        n_prompt = sum(len(group[0].prompt.token_ids) for group in self.groups)
        n_generated = sum(choice.n_generated for choice in self.choices)
        return Usage(
            prompt_tokens=n_prompt, completion_tokens=n_generated, total_tokens=n_prompt + n_generated
        )

    def answer(self, choices: list[CompletionChoice]) -> dict[str, Any]:
        """All but the usage, which not every chunk has."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


async def admit(body: CompletionRequest, call: Call) -> CompletionWork:
    """Check, tokenise and submit."""
    settings = call.services.settings
    task = call.models.generate(body.model)
    stops = _check(body, settings, task)
    prompts = await _read_prompts("" if body.prompt is None else body.prompt, task, settings)
    groups = [_choices(name, prompt, body, stops, task, settings) for name, prompt in prompts.items()]
    work = CompletionWork(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=task.name,
        groups=groups,
        n=1 if body.n is None else body.n,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    call.record.n_prompt_tokens = work.usage["prompt_tokens"]
    call.submit(task.lane, work.sequences)
    return work


@router.post("/v1/completions", response_model=Completion, responses=_ERRORS | _STREAM)
async def complete(body: CompletionRequest, call: CallDep) -> Response:
    """Continue each prompt; with `"stream": true` as server-sent events that end with `data: [DONE]`."""
    work = await admit(body, call)
    if body.stream:
        return await _stream(work, call)
    await call.attendance.wait_for(gather(choice.generation.run() for choice in work.choices))
    note_times(call.record, work.sequences)
    call.record.n_generated_tokens = work.usage["completion_tokens"]
    best = [choice for group in work.groups for choice in _most_probable(group, work.n)]
    choices = [choice.take(index) for index, choice in enumerate(best)]
    return Json(work.answer(choices) | {"usage": work.usage})


@router.get("/v1/models", response_model=ModelList, responses=_ERRORS)
async def list_models(call: CallDep) -> ModelList:
    """The models that complete; the others have routes of their own."""
    return ModelList(object="list", data=[_model(name) for name in call.services.registry.generate.names])


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=_ERRORS)
async def get_model(model_id: str, call: CallDep) -> Model:
    """One of them."""
    return _model(call.models.generate(model_id).name)


def _model(name: str) -> Model:
    return Model(id=name, object="model", created=_STARTED, owned_by="transformer-server")


def _most_probable(group: list[Choice], n: int) -> list[Choice]:
    """The n best, best first; in the order they were drawn where none is left out."""
    if len(group) == n:
        return group
    return sorted(group, key=lambda choice: choice.generation.mean_logprob, reverse=True)[:n]


async def _stream(work: CompletionWork, call: Call) -> Response:
    """Waits for the first token, so that what fails before it is still an ordinary error."""
    growing = grow(work.choices)
    first = await call.attendance.wait_for(first_of(growing))
    note_times(call.record, work.sequences)
    return EventStream(_events(first, growing, work, call))


async def grow(choices: list[Choice]) -> AsyncGenerator[int, None]:
    """The number of a choice each time it has a new token, until all have ended. Raises EngineError."""
    steps = [choice.generation.steps() for choice in choices]
    waiting = {asyncio.create_task(first_of(step)): i for i, step in enumerate(steps)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task in done]:
                task.result()
                i = waiting.pop(task)
                yield i
                if choices[i].finish_reason is None:
                    waiting[asyncio.create_task(first_of(steps[i]))] = i
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for step in steps:
            await step.aclose()


async def _events(
    first: int, growing: AsyncGenerator[int, None], work: CompletionWork, call: Call
) -> AsyncGenerator[bytes, None]:
    index: int | None = first
    record = call.record
    try:
        while index is not None:
            chunk = work.choices[index].take(index)
            if chunk["text"] or chunk["finish_reason"]:
                yield sse_event(_chunk(work, [chunk], None))
            index = await call.attendance.wait_for(anext(growing, None))
        if work.include_usage:
            yield sse_event(_chunk(work, [], work.usage))
    except ClientGone:
        pass  # the record knows, and nobody reads on
    except Exception as exc:
        record.error_type = classify(exc)[1]
        if record.error_type == "generation":
            log.exception("a stream failed", extra={"fields": {"id": record.request_id}})
        yield sse_event(error_body(exc, Dialect.OPENAI))
    finally:
        record.n_generated_tokens = work.usage["completion_tokens"]
        note_times(record, work.sequences)
        await growing.aclose()
    yield _DONE


def _chunk(work: CompletionWork, choices: list[CompletionChoice], usage: Usage | None) -> dict[str, Any]:
    chunk = work.answer(choices)
    return chunk | {"usage": usage} if work.include_usage else chunk


def _check(body: CompletionRequest, settings: Settings, task: Task[GeneratingLane]) -> list[str]:
    """Check the bounds of what is given; the stop strings as a list."""
    _check_counts(body, settings, task)
    _check_unsupported(body)
    if body.temperature is not None:
        check_temperature(body.temperature, settings)
    if body.top_p is not None:
        check_probability("top_p", body.top_p)
    for name in ("frequency_penalty", "presence_penalty"):
        check_frequency_penalty(name, getattr(body, name) or 0.0, settings)
    _check_bias(body.logit_bias or {}, settings, task)
    if body.repetition_penalty is not None:
        check_penalty("repetition_penalty", body.repetition_penalty, settings)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: only together with stream")
    return check_stops(body.stop, settings)


def _check_counts(body: CompletionRequest, settings: Settings, task: Task[GeneratingLane]) -> None:
    n = 1 if body.n is None else body.n
    for name, low, high in (
        ("max_tokens", 0 if body.echo else 1, max_new_tokens(settings, task)),
        ("n", 1, settings.max_best_of),
        ("best_of", n, settings.max_best_of),
        ("seed", 0, settings.max_seed),
        ("logprobs", 0, settings.max_top_n_tokens),
        ("top_k", 0, settings.max_top_k),
    ):
        value = getattr(body, name)
        if value is not None:
            check_count(name, value, low, high)
    if body.stream and body.best_of is not None and body.best_of > n:
        raise InvalidRequest(f"best_of is {body.best_of} and n is {n}; in a stream they must be the same")


def _check_bias(logit_bias: dict[str, float], settings: Settings, task: Task[GeneratingLane]) -> None:
    if len(logit_bias) > settings.max_logit_biases:
        raise InvalidRequest(
            f"logit_bias has {len(logit_bias)} tokens, the limit is {settings.max_logit_biases}"
        )
    for name, amount in logit_bias.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise InvalidRequest(f"logit_bias: {brief(name)!r} is no token id")
        check_count("logit_bias", int(name), 0, task.tokenizer.vocab_size - 1)
        check_range(f"logit_bias[{name}]", amount, -_MAX_BIAS, _MAX_BIAS)


def _check_unsupported(body: CompletionRequest) -> None:
    if body.suffix:
        raise InvalidRequest("suffix: not supported here, the model only writes on; leave it out")


async def _read_prompts(prompt: Prompts, task: Task[GeneratingLane], settings: Settings) -> dict[str, Prompt]:
    """The bounded prompts by their names in messages."""
    named = _name_prompts(prompt, settings)
    for name, each in named.items():
        if isinstance(each, str):
            check_text(name, each, settings.max_text_chars)
        else:
            _check_ids(name, each, task)
    n_chars = sum(map(len, named.values()))
    encoded = await prepare(n_chars, _encode_all, list(named.values()), task.tokenizer)
    return dict(zip(named, encoded, strict=True))


def _name_prompts(prompt: Prompts, settings: Settings) -> dict[str, str | list[int]]:
    given: Any = prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return {"prompt": given}
    check_length("prompt", given, settings.max_texts, "prompts")
    return dict(zip(input_names(given, "prompt"), given, strict=True))


def _check_ids(name: str, ids: list[int], task: Task[GeneratingLane]) -> None:
    check_length(name, ids, task.lane.limits.max_prompt_tokens, "tokens")
    for token_id in (min(ids), max(ids)):
        check_count(f"{name}[{ids.index(token_id)}]", token_id, 0, task.tokenizer.vocab_size - 1)


def _encode_all(prompts: list[str | list[int]], tokenizer: Tokenizer) -> list[Prompt]:
    return [_encode(prompt, tokenizer) for prompt in prompts]


def _encode(prompt: str | list[int], tokenizer: Tokenizer) -> Prompt:
    text_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    prefix = tokenizer.prompt_prefix
    if not isinstance(prompt, str) and text_ids[: len(prefix)] == prefix:
        return Prompt(text_ids, text, 0)
    token_ids = tokenizer.prompt_ids(text_ids)
    return Prompt(token_ids, text, len(token_ids) - len(text_ids))


def _choices(
    name: str,
    prompt: Prompt,
    body: CompletionRequest,
    stops: list[str],
    task: Task[GeneratingLane],
    settings: Settings,
) -> list[Choice]:
    """best_of choices for one prompt, each with a seed of its own."""
    asked = None if body.max_tokens is None else max(body.max_tokens, 1)
    default = min(_DEFAULT_MAX_TOKENS, settings.max_new_tokens)
    n_new = fit_new_tokens(name, len(prompt.token_ids), "max_tokens", asked, default, task)
    sampling = with_own_penalty(_sampling(body), body.repetition_penalty, task)
    sampling = replace(sampling, max_new_tokens=n_new)
    choices = []
    for i in range(body.best_of or body.n or 1):
        seed = None if body.seed is None else (body.seed + i) % (settings.max_seed + 1)
        scored = bool(body.echo) and body.logprobs is not None
        sequence = Sequence(prompt.token_ids, replace(sampling, seed=seed), prompt_logprobs=scored)
        generation = Generation(sequence, task.lane, task.tokenizer, stops)
        choices.append(Choice(prompt, generation, body))
    return choices


def _sampling(body: CompletionRequest) -> SamplingParams:
    """The engine's parameters, all but the length and the seed."""
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=tuple((int(name), amount) for name, amount in (body.logit_bias or {}).items()),
        top_n_tokens=body.logprobs or 0,
        # The best of several are found by them.
        logprobs=body.logprobs is not None or (body.best_of or 1) > 1,
    )
