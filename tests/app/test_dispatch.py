"""POST /: the body tells which route is meant."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi import FastAPI

from tests.app.fakes import FakeDecodeLane
from tests.app.test_system import sample

Client = httpx.AsyncClient

PAIR = {"first": "a", "second": "b"}


@contextmanager
def only(app: FastAPI, *names: str) -> Iterator[None]:
    """Meanwhile only these tasks are loaded."""
    shelves = app.state.services.registry.shelves
    gone = [
        (shelf, shelf.take(name)) for e, shelf in shelves.items() if e not in names for name in shelf.names
    ]
    yield
    for shelf, task in gone:
        shelf.put(task)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"inputs": "a", "parameters": {"tgt_lang": "ko", "max_new_tokens": 3}}, "/translate"),
        ({"inputs": "a", "parameters": {"generate_parameters": {"num_beams": 2}}}, "/translate"),
        ({"q": "a", "source": "en", "target": "ko"}, "/translate"),
        ({"inputs": "a [MASK]"}, "/fill-mask"),
        ({"inputs": ["a [MASK]"], "parameters": {"top_k": 2}}, "/fill-mask"),
        ({"inputs": "a", "parameters": {"do_sample": False, "max_new_tokens": 3}}, "/generate"),
        ({"inputs": "a", "parameters": {"top_k": 3, "seed": 1}}, "/generate"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 3}}, "/generate"),
        ({"inputs": "a", "parameters": {"num_beams": 2, "max_new_tokens": 3}}, "/translate"),
        ({"inputs": "a", "stream": False}, "/generate"),
        ({"inputs": "a", "stream": True, "parameters": {"max_new_tokens": 3}}, "/generate"),
        ({"inputs": "a [MASK]", "parameters": {"do_sample": False}}, "/generate"),
        ({"inputs": PAIR}, "/next-sentence"),
        ({"inputs": [PAIR, PAIR]}, "/next-sentence"),
    ],
)
async def test_by_the_shape_of_the_body(client: Client, body: dict[str, object], path: str) -> None:
    answer, direct = await client.post("/", json=body), await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.content == direct.content
    assert answer.headers["content-type"] == direct.headers["content-type"]
    assert answer.headers["x-prompt-tokens"] == direct.headers["x-prompt-tokens"]


async def test_openai(client: Client) -> None:
    assert (await client.post("/", json={"prompt": "a", "max_tokens": 1})).json()["choices"][0]["text"] == "b"
    refused = await client.post("/", json={"prompt": "a", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


async def test_forms_and_queries(client: Client) -> None:
    fields = {"q": "a", "target": "ko", "source": "en"}
    assert (await client.post("/", data=fields)).json() == {"translatedText": "A"}
    assert (await client.post("/", params=fields)).json() == {"translatedText": "A"}
    refused = await client.post("/", data={"q": "a", "target": "fr"})
    assert (refused.status_code, set(refused.json())) == (400, {"error"})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": "a"}, "this body could be for /translate or /generate"),
        ({"inputs": ["a"], "parameters": {}}, "this body could be for /translate or /generate"),
        ({"inputs": "a", "parameters": {"targets": ["a"]}}, "this body fits no model here"),
        ({"inputs": "a", "parameters": {"tgt_lang": "ko", "seed": 1}}, "this body fits no model here"),
        ({}, "the body has no inputs, no prompt and no q"),
    ],
)
async def test_unclear_bodies(client: Client, body: dict[str, object], message: str) -> None:
    answer = await client.post("/", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "validation")
    assert (
        answer.json()["error"] == f"{message}; post to the path of a task: /translate, /fill-mask, /generate"
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000])
async def test_bodies_that_are_refused(client: Client, content: bytes) -> None:
    answer = await client.post("/", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert (await client.post("/", content=b"hello")).status_code == 422


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": "a", "parameters": 3}, 400),
        ({"inputs": 3, "stream": True}, 422),
        ({"inputs": [PAIR, "a"]}, 422),
        ({"inputs": [[]]}, 400),
    ],
)
async def test_odd_shapes(client: Client, body: dict[str, object], status: int) -> None:
    assert (await client.post("/", json=body)).status_code == status


async def test_by_the_one_task_that_is_loaded(client: Client, app: FastAPI) -> None:
    with only(app, "generate"):
        assert (await client.post("/", json={"inputs": "y"})).json() == {"generated_text": "z"}
    with only(app, "translate"):
        assert (await client.post("/", json={"inputs": "a"})).json() == [{"translation_text": "A"}]
    with only(app, "fill-mask"):
        answer = await client.post("/", json={"inputs": "a"})
    assert (answer.status_code, "has no mask" in answer.json()["error"]) == (422, True)


async def test_the_request_counts_for_its_endpoint(client: Client, generate_lane: FakeDecodeLane) -> None:
    before = await sample(client, "requests_total", endpoint="generate", outcome="success")
    assert (await client.post("/", json={"inputs": "a", "stream": True})).status_code == 200
    assert await sample(client, "requests_total", endpoint="generate", outcome="success") == before + 1
    assert not generate_lane.running


async def test_an_unmodified_client(url: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    async with huggingface_hub.AsyncInferenceClient(url) as client:
        assert await client.text_generation("a", max_new_tokens=3) == "bcd"
        pieces = [piece async for piece in await client.text_generation("a", max_new_tokens=3, stream=True)]
        assert pieces == ["b", "c", "d"]
        assert (await client.translation("I go", src_lang="en", tgt_lang="ko")).translation_text == "I GO"
        assert len(await client.fill_mask("나는 [MASK]에 간다")) == 4
