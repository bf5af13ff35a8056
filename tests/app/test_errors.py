"""Every answer that is not a success: JSON with `error` and `error_type`, whatever was sent."""

import gzip
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from app.engine.errors import EngineError, Overloaded
from app.errors import TABLE, UNREADABLE, ClientGone, Json, classify, describe
from tests.app.fakes import FakeDecodeLane

Client = httpx.AsyncClient
POSTS = ("/translate", "/fill-mask", "/generate", "/generate_stream", "/next-sentence")


def check(answer: httpx.Response, status: int, error_type: str) -> str:
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type), answer.text
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.headers["x-request-id"]
    error: str = answer.json()["error"]
    return error


@pytest.mark.parametrize("path", ["/nope", "/translate/x", "/%00", "/한글"])
async def test_unknown_path(client: Client, path: str) -> None:
    check(await client.get(path), 404, "not_found")


@pytest.mark.parametrize("path", POSTS)
async def test_wrong_method(client: Client, path: str) -> None:
    answer = await client.get(path)
    assert check(answer, 405, "method_not_allowed") == "this path does not take that method, it takes POST"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"nonsense", b"[]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe", b'{"inputs": NaN}'),
        *(
            b'{"inputs": null}',
            b'{"inputs": 3}',
            b'{"inputs": {}}',
            b'{"inputs": [3]}',
            b'{"inputs": [["a"]]}',
        ),
        *(b'{"inputs": "\\ud800"}', b'{"inputs": ["a", "\\udfff"]}', b'{"inputs": "a", "\\ud800": 1}'),
        *(b'{"inputs": "a", "parameters": 3}', b'{"inputs": "a", "parameters": {"\\ud800": 1}}'),
        *(b'{"inputs": "a", "parameters": {"seed": ' + b"9" * 5000 + b"}}", b"[" * 100_000),
    ],
)
async def test_bodies_that_are_refused(client: Client, path: str, content: bytes) -> None:
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert check(answer, 422, "validation")


async def test_bodies_that_are_compressed_are_refused_as_such(client: Client) -> None:
    body = b'{"inputs": "a"}'
    for path in POSTS:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await client.post(path, content=gzip.compress(body), headers=headers)
        found = check(answer, 415, "unsupported_encoding")
        assert found == "content-encoding is gzip; send the body uncompressed"
    headers["content-encoding"] = "Identity"
    assert (await client.post("/generate", content=body, headers=headers)).status_code == 200


async def test_messages_of_bodies(client: Client) -> None:
    async def message(content: bytes, content_type: str = "application/json") -> str:
        answer = await client.post("/generate", content=content, headers={"content-type": content_type})
        return check(answer, 422, "validation")

    assert await message(b'{"inputs": ') == "the body is not valid JSON: Expecting value at character 11"
    assert await message(b"\xff") == UNREADABLE
    assert await message(b'{"inputs": ' + 5000 * b"1" + b"}") == UNREADABLE
    assert "Content-Type: application/json" in await message(b'{"inputs": "a"}', "text/plain")
    assert await message(b'{"inputs": "a", "option": 1}') == "unknown parameter: option"
    assert await message(b"{}") == "inputs: Field required"
    surrogate = b'{"inputs": ["a", "bc\\ud800"]}'
    assert await message(surrogate) == "inputs[1] has a lone surrogate at character 2"


ONES = "1," * 100_000
NAMES = ",".join(f'"{i}": 1' for i in range(30_000))
WRONG = {
    "elements": f'{{"inputs": [{ONES}"a"], "prompt": [{ONES}"a"]}}',
    "stops": f'{{"inputs": "a", "prompt": "a", "stop": [{ONES}1]}}',
    "names": f'{{"inputs": "a", "prompt": "a", {NAMES}}}',
    "name": f'{{"{"a" * 100_000}": 1, "inputs": "a", "prompt": "a"}}',
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("path", [*POSTS, "/tokenize", "/v1/completions", "/"])
async def test_a_million_faults_are_few_words(client: Client, path: str, content: str) -> None:
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 4000


async def test_surrogates_anywhere(client: Client) -> None:
    bodies = {
        "/translate": '{"inputs": "a", "parameters": {"tgt_lang": "\\ud800"}}',
        "/fill-mask": '{"inputs": "[MASK]", "parameters": {"targets": ["\\ud800"]}}',
        "/generate": '{"inputs": "a", "parameters": {"stop": ["\\ud800"]}}',
        "/next-sentence": '{"inputs": {"first": "\\ud800", "second": "a"}}',
    }
    for path, content in bodies.items():
        answer = await client.post(path, content=content, headers={"content-type": "application/json"})
        check(answer, 422, "validation")


async def test_the_unplanned_is_a_500_without_its_message(
    client: Client, generate_lane: FakeDecodeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sequences: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(generate_lane, "submit", broken)
    answer = await client.post("/generate", json={"inputs": "a"}, headers={"x-request-id": "mine"})
    assert check(answer, 500, "generation") == "internal error"
    assert answer.headers["x-request-id"] == "mine"


async def test_a_task_that_is_not_loaded(client: Client, app: FastAPI) -> None:
    app.state.services.registry.translate.take("shout")
    error = check(await client.post("/translate", json={"inputs": "a"}), 404, "not_found")
    assert error == "the translate model is not loaded; loaded models: fill-mask, generate"


class TestBodyLimit:
    @pytest.fixture
    def settings_values(self) -> dict[str, object]:
        return {"max_body_bytes": 2000}

    async def test_declared(self, client: Client) -> None:
        answer = await client.post("/generate", json={"inputs": "a" * 3000})
        assert check(answer, 413, "too_large") == "the body has 3013 bytes, the limit is 2000 bytes"

    async def test_chunked(self, client: Client) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b"a" * 100

        answer = await client.post(
            "/generate", content=chunks(), headers={"content-type": "application/json"}
        )
        assert check(answer, 413, "too_large") == "the body has more bytes, the limit is 2000 bytes"

    async def test_just_fits(self, client: Client) -> None:
        answer = await client.post("/generate", json={"inputs": "abc", "stream": None})
        assert answer.status_code == 200


def test_the_table_decides_by_the_first_class_that_fits() -> None:
    assert classify(Overloaded(1.0)) == (429, "overloaded")
    assert classify(EngineError("x")) == (500, "generation")
    assert classify(KeyError("x")) == (500, "generation")
    assert describe(KeyError("a secret")) == "internal error"
    for i, (cls, _, _) in enumerate(TABLE):
        assert not any(issubclass(later, cls) for later, _, _ in TABLE[i + 1 :])


def test_every_error_is_in_the_operators_book() -> None:
    book = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", book, re.MULTILINE))
    told = {(str(status), kind) for cls, status, kind in TABLE if cls is not ClientGone}
    assert told <= rows
    assert rows - told <= {
        *(("404", "not_found"), ("405", "method_not_allowed"), ("413", "too_large")),
        *(("415", "unsupported_encoding"), ("503", "broken")),
    }


def test_however_many_faults_there_are_a_few_are_told() -> None:
    fault = {"type": "string_type", "msg": "no string", "input": 1}
    faults = [{**fault, "loc": ("body", "a", f"k{i}")} for i in range(300_000)]
    assert describe(RequestValidationError(faults)).count("no string") == 10


def test_json_of_a_lone_surrogate() -> None:
    assert Json({"a": "가\ud800"}).body == '{"a":"가\\ud800"}'.encode()
