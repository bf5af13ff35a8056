"""The three forms in which errors are written, and the handlers that answer in the right one."""

import re
from enum import StrEnum
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from app.errors import TABLE, InvalidRequest, Json, classify, describe, error_headers, reason_of


class Dialect(StrEnum):
    """Whose clients speak it."""

    HUGGING_FACE = "hugging face"
    OPENAI = "openai"
    LIBRETRANSLATE = "libretranslate"


_LIBRETRANSLATE_PATHS = ("/detect", "/languages")
# The tag of LibreTranslate's form among the bodies of POST /translate.
LIBRETRANSLATE_TAG = "LibreTranslateRequest"

_STATUSES: dict[Dialect, dict[int, int]] = {
    Dialect.HUGGING_FACE: {},
    Dialect.OPENAI: {422: 400},
    Dialect.LIBRETRANSLATE: {422: 400, 401: 403},
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# A failed step has been tried again by the engine, and what took too long once will do so again.
_OPENAI_RETRIES = frozenset({408, 409, 429, 502, 503})
# Messages start with the parameter: "max_tokens is 0, ...", "stop[1] has ...", "suffix: ...".
_PARAMETER = re.compile(r"([a-z_]+)(?:\[\d+\])*(?:: | is | has )")


def speak(scope: Scope, dialect: Dialect) -> None:
    """Answer this request in a dialect that its path alone does not tell."""
    scope["state"]["dialect"] = dialect


def dialect_of(scope: Scope) -> Dialect:
    """As set by `speak`, else by the path."""
    spoken: Dialect | None = scope.get("state", {}).get("dialect")
    path: str = scope["path"]
    if spoken is not None:
        return spoken
    if path == "/v1" or path.startswith("/v1/"):
        return Dialect.OPENAI
    return Dialect.LIBRETRANSLATE if path in _LIBRETRANSLATE_PATHS else Dialect.HUGGING_FACE


def error_status(exc: Exception, dialect: Dialect) -> int:
    status, _ = classify(exc)
    return _STATUSES[dialect].get(status, status)


def error_body(exc: Exception, dialect: Dialect) -> dict[str, Any]:
    """The JSON of an error, in a response or in an event of a stream."""
    if dialect is Dialect.OPENAI:
        return {"error": _openai_error(exc)}
    if dialect is Dialect.LIBRETRANSLATE:
        return {"error": describe(exc)}
    return {"error": describe(exc), "error_type": classify(exc)[1]}


def error_response(exc: Exception, scope: Scope) -> Response:
    """The response to an exception, with its Retry-After where there is one."""
    dialect = dialect_of(scope)
    status, headers = error_status(exc, dialect), error_headers(exc)
    if dialect is Dialect.OPENAI and status not in _OPENAI_RETRIES:
        headers["x-should-retry"] = "false"
    return Json(error_body(exc, dialect), status_code=status, headers=headers)


def _openai_error(exc: Exception) -> dict[str, str | None]:
    status, kind = error_status(exc, Dialect.OPENAI), classify(exc)[1]
    fallback = "invalid_request_error" if status < 500 else "server_error"
    return {
        "message": describe(exc),
        "type": _OPENAI_TYPES.get(status, fallback),
        "param": _parameter(exc),
        "code": None if kind == "validation" else getattr(exc, "code", kind),
    }


def _parameter(exc: Exception) -> str | None:
    """The request's parameter that is wrong, where one is."""
    if isinstance(exc, RequestValidationError):
        return next((fault["loc"][1][:100] for fault in exc.errors() if _names_parameter(fault)), None)
    if isinstance(exc, InvalidRequest):
        named = _PARAMETER.match(str(exc))
        return named.group(1) if named else None
    return getattr(exc, "parameter", None)


def _names_parameter(fault: Any) -> bool:
    return len(fault["loc"]) > 1 and isinstance(fault["loc"][1], str)


async def _handle(request: Request, exc: Exception) -> Response:
    state = request.scope.get("state", {})
    if "record" in state:
        state["record"].error_type = reason_of(exc)
        state["held"].close()  # what failed needs nothing more, however slowly the client reads why
    if isinstance(exc, RequestValidationError) and any(
        LIBRETRANSLATE_TAG in fault["loc"] for fault in exc.errors()
    ):
        speak(request.scope, Dialect.LIBRETRANSLATE)
    return error_response(exc, request.scope)


def add_handlers(app: FastAPI) -> None:
    """Answer every planned exception in the table's way; the unplanned end in the outer middleware."""
    for cls, _, _ in TABLE:
        if cls is not Exception:
            app.add_exception_handler(cls, _handle)
    app.add_exception_handler(HTTPException, _handle)
