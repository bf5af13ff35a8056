"""One table: exception -> HTTP status and error_type; and the message a client may read."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from app.engine.errors import (
    Aborted,
    Draining,
    EngineError,
    ModelConflict,
    NoRoom,
    NoSuchModel,
    Overloaded,
    PromptTooLong,
    RequestTooLarge,
    StepFailed,
    UnfitModel,
)


class ErrorBody(TypedDict):
    """Every answer that is not a success."""

    error: str
    error_type: str


class InvalidRequest(ValueError):
    """A request that breaks a rule or a bound; the message names the parameter and the limit."""


class UnclearTask(InvalidRequest):
    """A body at the bare root that tells no one task; the message says what would."""


class BodyTooLarge(HTTPException):
    """A body over the limit, found before it was parsed.

    An HTTPException, because FastAPI turns any other that is raised while it reads the body into a 400.
    """

    def __init__(self, limit: int, n_bytes: int | None) -> None:
        size = "more bytes" if n_bytes is None else f"{n_bytes} bytes"
        super().__init__(413, f"the body has {size}, the limit is {limit} bytes")


class NotLoaded(Exception):
    """A route of a model that this server does not run."""


class NotReady(Exception):
    """The models are not there yet."""


class TimedOut(Exception):
    """The request's time is over."""


class BodyTooSlow(Exception):
    """The body was not in by the end of its time."""

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(f"the body was not in after {limit_seconds:g} seconds")


class Unauthorized(Exception):
    """No key, or one that is not known."""


class Forbidden(Exception):
    """A known key, but not one that may do this."""


class RateLimited(Exception):
    """A key has asked for all that it may in this minute."""

    def __init__(self, retry_after_seconds: float, detail: str) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{detail}; try again in {retry_after_seconds:.1f} seconds")


class Crowded(Exception):
    """More connections than the limit: only probes are answered on those above it."""

    def __init__(self, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__("too many connections are open")


class ClientGone(Exception):
    """The client left before the answer; nobody reads the response."""


# The first class that fits decides, so that a subclass stands before its base.
TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (UnclearTask, 400, "validation"),
    (InvalidRequest, 422, "validation"),
    (RequestValidationError, 422, "validation"),
    (PromptTooLong, 422, "validation"),
    (RequestTooLarge, 422, "validation"),
    (Unauthorized, 401, "unauthorized"),
    (Forbidden, 403, "forbidden"),
    (Overloaded, 429, "overloaded"),
    (RateLimited, 429, "overloaded"),
    (Crowded, 503, "overloaded"),
    (BodyTooSlow, 408, "timeout"),
    (Draining, 503, "draining"),
    (Aborted, 503, "draining"),
    (TimedOut, 504, "timeout"),
    (ClientGone, 499, "disconnected"),
    (NotLoaded, 404, "not_found"),
    (UnfitModel, 422, "validation"),
    (NoSuchModel, 404, "not_found"),
    (ModelConflict, 409, "conflict"),
    (NoRoom, 507, "out_of_memory"),
    (NotReady, 503, "not_ready"),
    (StepFailed, 500, "generation"),
    (EngineError, 500, "generation"),
    (Exception, 500, "generation"),
)
_HTTP_TYPES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_encoding"}
_REASONS: dict[type[Exception], str] = {
    RateLimited: "rate_limited",
    Crowded: "crowded",
    BodyTooSlow: "slow_body",
}
# pydantic names the branch of a union in its path ("str", "list[str]", "Pair"); clients know no branches.
_BRANCH = re.compile(r"str|[A-Z]\w*|\w+\[.*\]")
_KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BRANCH_KINDS = {"str": ("a string", "strings"), "int": ("an integer", "integers")}
_MAX_FAULTS, _MAX_FAULT_CHARS, _MAX_ECHO_CHARS = 10, 300, 80
_MAX_READ_FAULTS = 200  # each is compared with all others
NO_OBJECT = "the body must be a JSON object, sent with Content-Type: application/json"
_NO_JSON = "the body is not valid JSON"
# What Python's reader refuses beside wrong syntax, of which FastAPI tells the place.
UNREADABLE = f"{_NO_JSON} in UTF-8, or holds a number of more than 4,300 digits"


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Json(JSONResponse):
    """JSON in UTF-8. A lone surrogate, which UTF-8 cannot hold, leaves as its JSON escape."""

    def render(self, content: Any) -> bytes:
        text = _encode(content)
        return text.encode("utf-8", "backslashreplace")


def brief(value: object) -> str:
    """What a client sent, for a message: not more than it takes to recognise it."""
    text = str(value)
    return text if len(text) <= _MAX_ECHO_CHARS else f"{text[: _MAX_ECHO_CHARS - 3]}..."


def classify(exc: Exception) -> tuple[int, str]:
    """The status and error_type of an exception."""
    if isinstance(exc, HTTPException):
        # FastAPI raises 400 for a body that is no JSON for other reasons than its syntax.
        if exc.status_code == 400:
            return 422, "validation"
        return exc.status_code, _HTTP_TYPES.get(exc.status_code, "http")
    return next((status, kind) for cls, status, kind in TABLE if isinstance(exc, cls))


def reason_of(exc: Exception) -> str:
    """The error_type, but for what only logs and metrics tell apart: a key's own limits from a full queue."""
    return _REASONS.get(type(exc)) or classify(exc)[1]


def describe(exc: Exception) -> str:
    """The message a client may read; never that of an exception nobody planned."""
    if isinstance(exc, RequestValidationError):
        found = exc.errors()[:_MAX_READ_FAULTS]
        kinds = _expected_kinds(found)
        faults = dict.fromkeys(_describe_fault(fault, kinds) for fault in found if _is_meant(fault, kinds))
        return "; ".join(fault[:_MAX_FAULT_CHARS] for fault in islice(faults, _MAX_FAULTS))
    if isinstance(exc, HTTPException):
        return _describe_http(exc)
    planned = tuple(cls for cls, _, _ in TABLE if cls is not Exception)
    return str(exc) if isinstance(exc, planned) else "internal error"


def _describe_http(exc: HTTPException) -> str:
    if exc.status_code == 400:
        return UNREADABLE
    if exc.status_code == 404:
        return "there is nothing at this path"
    if exc.status_code == 405:
        return f"this path does not take that method, it takes {(exc.headers or {}).get('Allow', 'others')}"
    return exc.detail


def error_headers(exc: Exception) -> dict[str, str]:
    """When to try again, and what Starlette's own errors tell."""
    if isinstance(exc, Overloaded | RateLimited | Crowded | Draining):
        seconds = max(exc.retry_after_seconds, 0.001)
        found = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
        return found | ({"connection": "close"} if isinstance(exc, Crowded) else {})
    if isinstance(exc, Aborted | NotReady):
        return {"retry-after": "1", "retry-after-ms": "1000"}
    if isinstance(exc, Unauthorized):
        return {"www-authenticate": "Bearer"}
    if isinstance(exc, BodyTooSlow):
        return {"connection": "close"}
    return dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}


def _path(fault: Mapping[str, Any]) -> tuple[str, ...]:
    """Where a fault is in the body, for a client."""
    return tuple(str(part) for part in fault["loc"] if part != "body" and not _is_branch(part))


def _is_branch(part: str | int) -> bool:
    return _BRANCH.fullmatch(str(part)) is not None


def _expected_kinds(faults: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], dict[str, None]]:
    """What could stand at each path with a fault; the branches of a union each have one of their own."""
    kinds: dict[tuple[str, ...], dict[str, None]] = {}
    for fault in faults:
        here = kinds.setdefault(_path(fault), {})
        if fault["type"] in _KINDS:
            branch = str(fault["loc"][-1])
            here[_kind_of_branch(branch) if _is_branch(branch) else _KINDS[fault["type"]]] = None
    return kinds


def _kind_of_branch(branch: str, *, plural: bool = False) -> str:
    if branch.startswith("list["):
        return f"{'lists' if plural else 'a list'} of {_kind_of_branch(branch[5:-1], plural=True)}"
    return _BRANCH_KINDS.get(branch, ("an object", "objects"))[plural]


def _is_meant(fault: Mapping[str, Any], kinds: Iterable[tuple[str, ...]]) -> bool:
    """No fault is a branch of a union that another branch, whose fault is deeper, fits better."""
    path = _path(fault)
    return fault["type"] not in _KINDS or not any(
        len(other) > len(path) and other[: len(path)] == path for other in kinds
    )


def _describe_fault(fault: Mapping[str, Any], kinds: Mapping[tuple[str, ...], Iterable[str]]) -> str:
    if fault["type"] == "json_invalid":
        return f"{_NO_JSON}: {fault['ctx']['error']} at character {fault['loc'][-1]}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])  # one of our own, written to be read
    if fault["type"] == "extra_forbidden":
        *around, name = fault["loc"]  # whatever it is called, the name itself is no branch
        return f"unknown parameter: {'.'.join([*_path({'loc': around}), brief(name)])}"
    where = ".".join(_path(fault))
    if not where:
        return NO_OBJECT
    expected = list(kinds[_path(fault)]) if fault["type"] in _KINDS else []
    if len(expected) > 1:
        return f"{where} must be {' or '.join(expected)}"
    return f"{where}: {fault['msg']}"
