"""Bodies at the door: size, structure, characters; nothing of it depends on what the body means."""

import contextlib
import json

import httpx
import pytest

from app.bodies import BodyLimits, count_characters, read_fields
from app.errors import InvalidRequest

Client = httpx.AsyncClient
LIMITS = BodyLimits(max_bytes=10_000, max_depth=4, max_items=20, receive_seconds=1.0)
JSON, FORM = "application/json; charset=utf-8", "application/x-www-form-urlencoded"


def count(body: bytes, content_type: str = JSON, query: bytes = b"") -> int:
    return count_characters(body, content_type, query, LIMITS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", 0),
        ("abc", 3),
        ("가나다", 3),
        ({"a": "bc", "d": ["ef", 1, None], "g": 23}, 8),
        ({"a": [300, -1, 2.5]}, 4),  # a number in a list may be a token
        ('[{"', 4),  # three characters, and the backslash of one escape
        ("\\ua\\u가", 8),  # backslashes of its own, before letters: as much as they are written with
        (12345, 0),
    ],
)
def test_characters(value: object, expected: int) -> None:
    for ascii_only in (True, False):
        assert count(json.dumps(value, ensure_ascii=ascii_only).encode()) == expected


def test_characters_of_forms_and_queries() -> None:
    assert count("q=가&target=ko".encode(), FORM) == 13
    assert count(b"q=%EA%B0%80&target=ko", FORM) == 13
    assert count(b"", FORM, b"q=ab%20c") == 6
    assert count(b"anything", "text/plain") == 8


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[[[[[", "the body nests 5 deep, the limit is 4"),
        (b'{"a":{"a":{"a":{"a":{"a":1}}}}}', "the body nests 5 deep, the limit is 4"),
        (b"[1" + b",1" * 20 + b"]", "the body has 22 commas and brackets, the limit is 20"),
        (b"]" * 30, "the body has 30 commas and brackets, the limit is 20"),
        ('["a"]'.encode("utf-16"), "the body is not UTF-8, which JSON must be"),
        ('["a"]'.encode("utf-32-le"), "the body is not UTF-8, which JSON must be"),
    ],
)
def test_structures_over_the_limits(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        count(body)


@pytest.mark.parametrize(
    "body",
    [
        b'["' + b"[" * 100 + b'"]',
        b'["\\"' + b"[,{" * 100 + b'"]',
        b'["\\\\\\"' + b"[" * 100,
        b'"' + b"\\" * 99,
    ],
)
def test_what_stands_in_strings_is_no_structure(body: bytes) -> None:
    count(body)


@pytest.mark.parametrize(
    "part", [b'"', b'\\"', b'"\\"', b'"\\', b"[", b"]", b'""', b'"a",', b"\\u0061", "가".encode(), b"\xff"]
)
def test_a_scan_reads_each_character_once(part: bytes) -> None:
    """A scan that went back would take hours for some of these, and be stopped by the test's time-out."""
    body = part * (2_000_000 // len(part))
    with contextlib.suppress(InvalidRequest):
        count_characters(body, JSON, b"", LIMITS)


def test_fields() -> None:
    assert read_fields(b'{"a": 1}', JSON) == {"a": 1}
    assert read_fields(b"a=1&b=%EA%B0%80", FORM) == {"a": "1", "b": "가"}
    assert read_fields(b"[1]", JSON) is None
    assert read_fields(b"{", JSON) is None
    assert read_fields(b"a=%ff&" * 2000, FORM) is None
    assert read_fields(b"a=1", "text/plain") is None


class TestOverHttp:
    @pytest.fixture
    def settings_values(self) -> dict[str, object]:
        return {"max_json_depth": 6, "max_json_items": 100}

    async def test_in_every_dialect(self, client: Client) -> None:
        json_type = {"content-type": "application/json"}
        deep = b'{"inputs": ' + b"[" * 9
        theirs = await client.post("/generate", content=deep, headers=json_type)
        assert (theirs.status_code, theirs.json()["error_type"]) == (422, "validation")
        assert theirs.json()["error"] == "the body nests 10 deep, the limit is 6"
        wide = json.dumps({"prompt": [1] * 200}).encode()
        openai = await client.post("/v1/completions", content=wide, headers=json_type)
        assert (openai.status_code, openai.json()["error"]["type"]) == (400, "invalid_request_error")
        libre = await client.post("/translate", json={"q": ["a"] * 200, "target": "ko"})
        assert (libre.status_code, list(libre.json())) == (400, ["error"])

    async def test_what_is_over_the_limits_is_not_parsed(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: object) -> None:
            raise AssertionError("parsed")

        monkeypatch.setattr(json, "loads", refuse)
        for path in ("/", "/translate", "/generate", "/v1/completions"):
            answer = await client.post(
                path, content=b'{"q": ' + b"[" * 9, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (400, 422)
            assert b"the body nests 10 deep" in answer.content

    async def test_fitting(self, client: Client) -> None:
        answer = await client.post("/generate", json={"inputs": ["[" * 300] * 2})
        assert answer.status_code == 422  # too many tokens for the model, no longer a matter of brackets
        assert "tokens" in answer.json()["error"]
