"""POST /tokenize: ids, texts, offsets."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.app.fakes import byte_tokenizer, word_tokenizer

Client = httpx.AsyncClient


async def tokenize(client: Client, inputs: object, **values: object) -> Any:
    answer = await client.post("/tokenize", json={"inputs": inputs} | values)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_string_gives_a_list(client: Client) -> None:
    ids = byte_tokenizer().encode("ab")
    assert await tokenize(client, "ab", task="translate") == [
        {"id": ids[0], "text": "a", "start": 0, "stop": 1, "special": False},
        {"id": ids[1], "text": "b", "start": 1, "stop": 2, "special": False},
    ]


async def test_a_list_gives_a_list_of_lists(client: Client) -> None:
    answer = await tokenize(client, ["a", "", "bc"])
    assert [[token["text"] for token in tokens] for tokens in answer] == [["a"], [], ["b", "c"]]


async def test_parts_of_a_character_share_its_place(client: Client) -> None:
    answer = await tokenize(client, "a집", task="generate")
    assert [(token["text"], token["start"], token["stop"]) for token in answer] == [
        ("a", 0, 1),
        *[("집", 1, 2)] * 3,
    ]


async def test_text_that_looks_special_is_text_but_for_the_mask(client: Client) -> None:
    text = "학교 [MASK]</s>집"
    plain = await tokenize(client, text, task="generate")
    assert not any(token["special"] for token in plain)
    masked = await tokenize(client, text, task="fill-mask")
    assert [(token["text"], token["start"], token["stop"]) for token in masked if token["special"]] == [
        (" [MASK]", 2, 9)
    ]


@pytest.mark.parametrize(
    "text", ["", "[MASK]", "a [MASK] [MASK]b", " [MASK] ", "  [MASK]  집 [MASK", "집[MASK]"]
)
def test_masked_pieces_tile_the_text(text: str) -> None:
    tokenizer = word_tokenizer()
    pieces = tokenizer.masked_pieces(text)
    assert [piece.id for piece in pieces] == tokenizer.encode_masked(text)[0]
    assert all(piece.text == text[piece.start : piece.stop] for piece in pieces)
    covered = sorted({i for piece in pieces for i in range(piece.start, piece.stop)})
    assert covered == list(range(len(text)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"inputs": "a", "task": "x"},
            "task: no task 'x' is loaded; there are translate, fill-mask, generate",
        ),
        ({"inputs": []}, "inputs has 0 texts, the limit is 1 to 64"),
        ({"inputs": ["a" * 15_000] * 2}, "inputs has 30000 characters in all, the limit is 20000"),
        ({"inputs": "a" * 20_001}, "inputs has 20001 characters, the limit is 20000"),
        ({"inputs": "a", "parameters": {}}, "unknown parameter: parameters"),
        ({}, "inputs: Field required"),
    ],
)
async def test_refusals(client: Client, body: dict[str, object], message: str) -> None:
    answer = await client.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert answer.json()["error"] == message


async def test_without_a_model(client: Client, app: FastAPI) -> None:
    for shelf in app.state.services.registry.shelves.values():
        for name in shelf.names:
            shelf.take(name)
    answer = await client.post("/tokenize", json={"inputs": "a"})
    assert (answer.status_code, answer.json()["error"]) == (404, "no model is loaded")
