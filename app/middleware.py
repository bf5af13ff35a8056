"""What every request gets: an id, headers, one log line, its metrics.

Plain ASGI: under Starlette's `@app.middleware("http")` a client's disconnect does not reach the route.
"""

import logging
import random
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics
from app.dialects import error_response
from app.errors import reason_of
from app.lifecycle import Lifecycle
from app.logs import request_log

log = logging.getLogger("app")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MODELS = "/models/"
_OUTCOMES = {"timeout": "timeout", "disconnected": "disconnected"}


@dataclass
class RequestRecord:
    """What is known of one request; routes fill in what they learn. Times in seconds."""

    request_id: str
    endpoint: str | None
    key_name: str | None = None
    model: str = metrics.NO_MODEL
    started: float = field(default_factory=time.monotonic)
    n_prompt_tokens: int | None = None
    n_generated_tokens: int | None = None
    queue_seconds: float | None = None
    inference_seconds: float | None = None
    status: int | None = None
    error_type: str | None = None
    client_gone: bool = False
    complete: bool = False

    @property
    def total_seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def outcome(self) -> str:
        if self.client_gone:
            return "disconnected"
        if self.error_type in _OUTCOMES:
            return _OUTCOMES[self.error_type]
        if self.status is None or (self.status >= 500 and self.error_type not in metrics.REASONS):
            return "failed"
        if self.status < 400:
            return "failed" if self.error_type else "success"
        return "refused"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The response headers that tell of this request."""
        found = [(b"x-request-id", self.request_id.encode())]
        if self.endpoint is None:
            return found
        times = (
            (b"x-queue-time", self.queue_seconds),
            (b"x-inference-time", self.inference_seconds),
            (b"x-total-time", self.total_seconds),
        )
        found += [(name, b"%.2f" % (1000 * t)) for name, t in times if t is not None]
        counts = (
            (b"x-prompt-tokens", self.n_prompt_tokens),
            (b"x-generated-tokens", self.n_generated_tokens),
        )
        return found + [(name, b"%d" % n) for name, n in counts if n is not None]


class ModelPathMiddleware:
    """/models/NAME before a path, or alone, chooses the model; what follows is an ordinary path.

    Clients of the Hugging Face form have such URLs: they post to them, or put /v1/... or /info behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_MODELS):
            name, _, rest = scope["path"].removeprefix(_MODELS).partition("/")
            if name:
                scope.setdefault("state", {})["model"] = name
                scope = {**scope, "path": f"/{rest}"}
        await self.app(scope, receive, send)


class RecordMiddleware:
    """Makes the record, answers what nobody handled, writes headers, log and metrics."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, str], lifecycle: Lifecycle) -> None:
        self.app = app
        self.endpoints = endpoints
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), self.endpoints.get(scope["path"]))
        scope.setdefault("state", {})["record"] = record
        in_flight = scope["method"] == "POST"  # whatever works on models; where is not known yet at "/"
        self.lifecycle.n_in_flight += in_flight
        try:
            await self._answer(record, scope, receive, send)
        finally:
            self.lifecycle.n_in_flight -= in_flight
            _conclude(record, scope)

    async def _answer(self, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not record.complete:
                record.client_gone = True
            return message

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *record.headers()]
            elif message["type"] == "http.response.body":
                record.complete = not message.get("more_body", False)
            await send(message)

        try:
            with ExitStack() as scope["state"]["held"]:  # what the request takes, until its answer is sent
                await self.app(scope, noting_receive, noting_send)
        except Exception as exc:
            record.error_type = reason_of(exc)
            log.exception("unhandled exception", extra={"fields": {"id": record.request_id}})
            if record.status is None:
                await error_response(exc, scope)(scope, receive, noting_send)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    # No secret: `uuid.uuid4` asks the system, which gives up the interpreter lock and waits for it again.
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def _conclude(record: RequestRecord, scope: Scope) -> None:
    seconds = record.total_seconds
    outcome = record.outcome
    if record.endpoint is not None:
        model = record.model if metrics.is_known(record.endpoint, record.model) else metrics.NO_MODEL
        metrics.requests_total.labels(record.endpoint, model, outcome).inc()
        metrics.request_duration_seconds.labels(record.endpoint).observe(seconds)
        if outcome == "refused" and record.error_type in metrics.REASONS:
            metrics.rejected_total.labels(record.endpoint, record.error_type).inc()
    fields = {
        "id": record.request_id,
        "key": record.key_name,
        "method": scope["method"],
        "endpoint": record.endpoint,
        # The template, or nothing: a path that no route knows may hold anything.
        "route": getattr(scope.get("route"), "path", None),
        "model": record.model or None,
        "status": record.status,
        "error_type": record.error_type,
        "total_ms": round(1000 * seconds, 2),
        "queue_ms": _milliseconds(record.queue_seconds),
        "inference_ms": _milliseconds(record.inference_seconds),
        "prompt_tokens": record.n_prompt_tokens,
        "generated_tokens": record.n_generated_tokens,
        "client_gone": record.client_gone,
    }
    request_log.info("request", extra={"fields": fields})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
