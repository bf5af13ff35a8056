"""A request's body before anybody gives it a meaning: read whole, within its time, size and structure."""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from app.errors import BodyTooLarge, BodyTooSlow, ClientGone, InvalidRequest

# A string ends at its quote or, when it has none, with the text: so the scan reads each character once.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_FIELD = re.compile(r'"(\w{1,32})"\s*:')
_GLIMPSED_BYTES = 1024
_BRACKET = re.compile(r"[\[\]{}]")
_ITEM_CHARACTERS = ",[]{}"
_LISTED_NUMBER = re.compile(r"[\[,]\s*+[-\d]")
_FORM = "application/x-www-form-urlencoded"
MAX_FORM_FIELDS = 1000
BROKEN_BODY = "broken_body"  # in a scope's state: what came is no HTTP, and nothing more of it is read


@dataclass(frozen=True)
class BodyLimits:
    """What a body may be; see `Settings`."""

    max_bytes: int
    max_depth: int
    max_items: int
    receive_seconds: float


async def read_body(scope: Scope, receive: Receive, limits: BodyLimits) -> bytes:
    """The whole body. Raises BodyTooLarge, as soon as it is, BodyTooSlow, ClientGone and InvalidRequest."""
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_bytes:
        raise BodyTooLarge(limits.max_bytes, int(declared))
    try:
        async with asyncio.timeout(limits.receive_seconds):
            body = await _read(receive, limits.max_bytes)
    except TimeoutError:
        raise BodyTooSlow(limits.receive_seconds) from None
    if scope.get("state", {}).get(BROKEN_BODY):
        raise InvalidRequest("the body is not HTTP/1.1 as the server understands it: a chunk is broken")
    return body


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    n_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left")
        parts.append(message.get("body", b""))
        n_bytes += len(parts[-1])
        if n_bytes > max_bytes:
            raise BodyTooLarge(max_bytes, None)
        more = message.get("more_body", False)
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what is still to come: that the client leaves."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def count_characters(body: bytes, content_type: str, query: bytes, limits: BodyLimits) -> int:
    """The characters of all strings of a request, and one for each number in a list, which may be a token.

    Raises InvalidRequest for a structure over the limits.

    Before the JSON is parsed: a few megabytes of brackets would become a hundred times as much memory.
    """
    n_query = len(unquote_plus(query.decode("latin-1")))
    if not body:
        return n_query
    if not is_json(content_type):
        text = body.decode("utf-8", "replace")
        return n_query + (len(unquote_plus(text)) if is_form(content_type) else len(text))
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise InvalidRequest("the body is not UTF-8, which JSON must be")
    return n_query + _measure_json(body.decode("utf-8", "replace"), limits)


def _measure_json(text: str, limits: BodyLimits) -> int:
    bare, n_strings = _STRING.subn("", text)
    n_items = sum(map(bare.count, _ITEM_CHARACTERS))
    if n_items > limits.max_items:
        raise InvalidRequest(f"the body has {n_items} commas and brackets, the limit is {limits.max_items}")
    depth = deepest = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > limits.max_depth:
        raise InvalidRequest(f"the body nests {deepest} deep, the limit is {limits.max_depth}")
    # An escape \uXXXX is one character; clients that write ASCII send all Korean like that.
    n_escapes = text.replace("\\\\", "").count("\\u")  # behind an escaped backslash a u is a letter
    n_numbers = sum(1 for _ in _LISTED_NUMBER.finditer(bare))
    return max(0, len(text) - len(bare) - 2 * n_strings - 5 * n_escapes) + n_numbers


def read_fields(body: bytes, content_type: str) -> Mapping[str, Any] | None:
    """The names and values of a JSON object or a form; None for what is neither."""
    if is_form(content_type):
        try:
            return dict(parse_qsl(body.decode(), max_num_fields=MAX_FORM_FIELDS))
        except ValueError:
            return None
    try:
        value = json.loads(body) if is_json(content_type) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def glimpse_fields(body: bytes, content_type: str) -> dict[str, None]:
    """Names that stand near the beginning of a JSON body, without parsing it."""
    start = body[:_GLIMPSED_BYTES].decode("utf-8", "replace")
    return dict.fromkeys(_FIELD.findall(start)) if is_json(content_type) else {}


def is_json(content_type: str) -> bool:
    """As FastAPI decides it."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def is_form(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == _FORM
