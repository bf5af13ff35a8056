"""Pages of other origins: none may call, unless the settings name them. Preflights answer in JSON."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from app.errors import Json

_MAX_AGE_SECONDS = 600
_SENT = ("authorization", "content-type", "x-api-key", "x-request-id")
_SHOWN = (
    *("retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "www-authenticate"),
    *("x-queue-time", "x-inference-time", "x-total-time", "x-prompt-tokens", "x-generated-tokens"),
)


class Cors(CORSMiddleware):
    """Starlette's, with the origins of the settings: parted by spaces, or `*`."""

    def __init__(self, app: ASGIApp, origins: str) -> None:
        super().__init__(
            app,
            allow_origins=origins.split(),
            allow_methods=("GET", "POST"),
            allow_headers=_SENT,
            expose_headers=_SHOWN,
            max_age=_MAX_AGE_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        plain = super().preflight_response(request_headers)
        headers = {name: value for name, value in plain.headers.items() if not name.startswith("content-")}
        if plain.status_code < 400:
            return Json({"status": "ok"}, headers=headers)
        error = {"error": bytes(plain.body).decode(), "error_type": "forbidden"}
        return Json(error, status_code=403, headers=headers)
