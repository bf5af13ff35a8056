"""What the two dialects of generation share: tokens to text, stop strings, events of a stream."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict

from app.api.bounds import check_length, check_text
from app.engine.registry import GeneratingLane, Task
from app.engine.sequence import FinishReason, Sequence, TokenEvent
from app.errors import InvalidRequest
from app.settings import Settings
from model.sampling import SamplingParams
from model.tokenizer import TextStream, Tokenizer

T = TypeVar("T")

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Token(TypedDict):
    """A generated token; its text is empty while a character is incomplete."""

    id: int
    text: str
    logprob: float
    special: bool


@dataclass
class Generation:
    """One sequence on its way from tokens to text; ends it at a stop string."""

    sequence: Sequence
    lane: GeneratingLane
    tokenizer: Tokenizer
    stops: list[str]
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    top_tokens: list[list[Token]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer)

    async def run(self) -> "Generation":
        """To the end."""
        async for _ in self.steps():
            pass
        return self

    async def steps(self) -> AsyncGenerator[Token, None]:
        """One token for each event of the sequence, until it ends or a stop string is complete."""
        async for event in self.sequence.events():
            token = self._take(event)
            if self.finish_reason is FinishReason.STOP:
                self.lane.abort([self.sequence])
            yield token
            if self.finish_reason is not None:
                return

    def _take(self, event: TokenEvent) -> Token:
        text = self._stream.push(event.token_id)
        if event.finish_reason is not None:
            text += self._stream.finish()
        stop_end = find_stop(self.text, text, self.stops)
        self.finish_reason = event.finish_reason if stop_end is None else FinishReason.STOP
        token = self._token(event.token_id, text[:stop_end], event.logprob)
        self.text += token["text"]
        self.tokens.append(token)
        self.top_tokens.append([self._named(i, logprob) for i, logprob in event.top_tokens])
        return token

    def _token(self, token_id: int, text: str, logprob: float) -> Token:
        return Token(id=token_id, text=text, logprob=logprob, special=token_id in self.tokenizer.special_ids)

    def _named(self, token_id: int, logprob: float) -> Token:
        return self._token(token_id, self.tokenizer.decode([token_id]), logprob)

    @property
    def mean_logprob(self) -> float:
        return sum(token["logprob"] for token in self.tokens) / max(len(self.tokens), 1)


def find_stop(before: str, new: str, stops: list[str]) -> int | None:
    """How much of the new text belongs to the output, when a stop string ends in it; else None."""
    if not stops:  # nor is the whole text copied for each token
        return None
    text = before + new
    ends = []
    for stop in stops:
        start = text.find(stop, max(0, len(before) - len(stop) + 1))
        if start >= 0:
            ends.append(start + len(stop) - len(before))
    return min(ends, default=None)


def check_stops(stop: str | list[str] | None, settings: Settings) -> list[str]:
    """The bounded stop strings as a list."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > settings.max_stops:
        raise InvalidRequest(f"stop has {len(stops)} strings, the limit is {settings.max_stops}")
    for i, text in enumerate(stops):
        check_length(f"stop[{i}]", text, settings.max_stop_chars, "characters")
        check_text(f"stop[{i}]", text, settings.max_stop_chars)
    return stops


def max_new_tokens(settings: Settings, task: Task[GeneratingLane], n_prompt: int = 1) -> int:
    """What a request may ask for: a prompt has one token at least, and the context holds both.

    A translation's prompt is the encoder's, so that there it takes none of the room.
    """
    return min(settings.max_new_tokens, task.lane.limits.max_new_tokens - n_prompt)


def with_own_penalty(
    params: SamplingParams, asked: float | None, task: Task[GeneratingLane]
) -> SamplingParams:
    """With the model's own penalty on repetition, where the likeliest token is always taken.

    Unless a penalty is asked for: `asked` is that on repetition.
    """
    is_asked = asked is not None or params.frequency_penalty or params.presence_penalty
    if is_asked or params.temperature > 0.0:
        return params
    return replace(params, repetition_penalty=task.config.repetition_penalty)


def fit_new_tokens(
    name: str, n_prompt: int, parameter: str, asked: int | None, default: int, task: Task[GeneratingLane]
) -> int:
    """As asked, else the default or what the context leaves of it; raises InvalidRequest with the numbers."""
    limits = task.lane.limits
    room = limits.max_new_tokens - n_prompt
    wanted = max(1, min(default, room)) if asked is None else asked
    if n_prompt > limits.max_prompt_tokens:
        raise InvalidRequest(f"{name} has {n_prompt} tokens, the limit is {limits.max_prompt_tokens}")
    if wanted > room:
        raise InvalidRequest(
            f"{name} has {n_prompt} tokens and {parameter} is {wanted}: together {n_prompt + wanted}, "
            f"the limit is {limits.max_new_tokens}"
        )
    return wanted


async def first_of(items: AsyncGenerator[T, None]) -> T:
    """What `anext` gives, as a coroutine."""
    return await anext(items)


def sse_event(content: Any) -> bytes:
    """One event of a stream; ASCII, because some clients split lines at U+2028, U+2029 and U+0085."""
    return f"data: {_encode(content)}\n\n".encode()


class EventStream(Response):
    """A stream of events that no proxy should keep or hold back.

    Starlette's own listens in a task of its own whether the client leaves; these events end when it does.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
