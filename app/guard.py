"""The door of the service: who calls, how often, with how much. Plain ASGI, around all routes.

Cheap questions come first: a stranger's body is not read where the key can only stand in a header.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Receive, Scope, Send

from app.bodies import BodyLimits, count_characters, glimpse_fields, read_body, read_fields, replay
from app.dialects import Dialect, error_response, speak
from app.errors import Crowded, Unauthorized, brief, reason_of
from app.keys import Key, KeyRing
from app.quotas import Quotas

PROBES = frozenset({"/health", "/ready"})
METRICS = frozenset({"/metrics"})
DOCS = frozenset({"/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json"})
# To look at it needs no key; what it then asks of the service does.
_PAGE = "/"
# Where LibreTranslate's clients put their key: into the body, or the query.
_BODY_KEY_PATHS = frozenset({"/", "/translate", "/detect", "/languages"})
# Answered even when there are too many connections: whoever watches must see that there are.
_WATCHED = PROBES | METRICS
_CROWDED_RETRY_SECONDS = 1.0
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)

NO_KEY = "this path needs an API key: Authorization: Bearer KEY, or x-api-key: KEY"
NO_BODY_KEY = f"{NO_KEY}, or api_key in LibreTranslate's form"
WRONG_KEY = "this API key is not known"

DialectOf = Callable[[str, Mapping[str, Any]], Dialect | None]


@dataclass(frozen=True)
class Rules:
    """What the guard goes by. `dialect_of` tells whose form a body is in, by path and fields."""

    keys: KeyRing
    quotas: Quotas
    open_paths: frozenset[str]
    body: BodyLimits
    dialect_of: DialectOf


class GuardMiddleware:
    """Refuses in the dialect's form what may not come in; passes on the rest, its body already read."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app = app
        self.rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(scope, self.rules)
        try:
            body = await visit.admit(receive)
        except Exception as exc:
            reason = reason_of(exc)
            if reason == "generation":  # nobody planned it: the outer middleware's affair
                raise
            scope["state"]["record"].error_type = reason
            visit.speak()
            await error_response(exc, scope)(scope, receive, send)
            return
        await self.app(scope, replay(body, receive), send)


class _Visit:
    """One request at the door."""

    def __init__(self, scope: Scope, rules: Rules) -> None:
        self._scope, self._rules = scope, rules
        self._path: str = scope["path"]
        self._headers = Headers(scope=scope)
        self._content_type = self._headers.get("content-type", "")
        self._body = b""
        self._may_parse = False  # until its structure is known to be within the limits

    async def admit(self, receive: Receive) -> bytes:
        """The body, once everything is in order; sets the request's key. Raises what is not."""
        if self._scope["state"].get("crowded") and self._path not in _WATCHED:
            raise Crowded(_CROWDED_RETRY_SECONDS)
        encoding = self._headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise HTTPException(415, f"content-encoding is {brief(encoding)}; send the body uncompressed")
        needs_key = bool(self._rules.keys) and not self._is_open()
        key = self._header_key() if needs_key else None
        self._body = await read_body(self._scope, receive, self._rules.body)
        n_characters = count_characters(
            self._body, self._content_type, self._scope["query_string"], self._rules.body
        )
        self._may_parse = True
        if needs_key:
            key = key or self._body_key()
            self._rules.quotas.charge(key, "characters", n_characters)
        self._scope["state"]["key"] = key
        return self._body

    def speak(self) -> None:
        """Errors in the form that the body tells, where the path does not."""
        if self._path not in ("/", "/translate"):
            return
        read = read_fields if self._may_parse else glimpse_fields
        fields = read(self._body, self._content_type) or QueryParams(self._scope["query_string"])
        dialect = self._rules.dialect_of(self._path, fields)
        if dialect is not None:
            speak(self._scope, dialect)

    def _is_open(self) -> bool:
        if self._path == _PAGE and self._scope["method"] in ("GET", "HEAD"):
            return True
        return self._path in self._rules.open_paths

    def _header_key(self) -> Key | None:
        """The key of the headers; none where it may still stand in the body. Raises Unauthorized."""
        bearer = _BEARER.fullmatch(self._headers.get("authorization", ""))
        given = bearer[1] if bearer else self._headers.get("x-api-key")
        if given:
            return self._known(given)
        if self._path in _BODY_KEY_PATHS:
            return None
        raise Unauthorized(NO_KEY)

    def _body_key(self) -> Key:
        fields = read_fields(self._body, self._content_type) or {}
        given = fields.get("api_key") or QueryParams(self._scope["query_string"]).get("api_key")
        if isinstance(given, str) and given:
            return self._known(given)
        raise Unauthorized(NO_BODY_KEY)

    def _known(self, given: str) -> Key:
        key = self._rules.keys.find(given)
        if key is None:
            raise Unauthorized(WRONG_KEY)
        self._scope["state"]["record"].key_name = key.name
        # At once: what is refused for its body has been a request, too.
        self._rules.quotas.charge(key, "requests", 1)
        return key
