"""POST /classify on a fake lane."""

import math

import httpx
import pytest
from fastapi import FastAPI

from app.api.classify import apply_function
from app.engine.batch import Logits
from tests.app.fakes import classify_task

Client = httpx.AsyncClient


@pytest.fixture(autouse=True)
def _with_a_classifier(app: FastAPI) -> None:
    app.state.services.registry.classify.put(classify_task())


async def test_scores_are_the_softmax_of_the_logits(client: Client) -> None:
    answer = (await client.post("/classify", json={"inputs": "집"})).json()
    logits = {"glad": 3.0, "calm": 0.0, "sad": -1.0}  # [CLS] 집 [SEP] are three tokens
    total = sum(map(math.exp, logits.values()))
    assert [entry["label"] for entry in answer] == ["glad", "calm", "sad"]
    assert [entry["score"] for entry in answer] == pytest.approx(
        [math.exp(x) / total for x in logits.values()]
    )


async def test_a_list_in_gives_a_list_of_lists(client: Client) -> None:
    body = {"inputs": ["집", "home", "집 home"], "parameters": {"top_k": 1, "function_to_apply": "none"}}
    answer = (await client.post("/classify", json=body)).json()
    assert answer == [[{"label": "glad", "score": n}] for n in (3.0, 3.0, 4.0)]
    one = await client.post("/classify", json={"inputs": ["집"], "parameters": {}})
    assert len(one.json()) == 1
    assert len(one.json()[0]) == 3


async def test_more_labels_than_there_are(client: Client) -> None:
    answer = await client.post("/classify", json={"inputs": "집", "parameters": {"top_k": 9}})
    assert len(answer.json()) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": "a", "parameters": {"top_k": 0}}, "top_k is 0, the limit is 1 to 1000"),
        ({"inputs": "a", "parameters": {"top_k": 1001}}, "top_k is 1001, the limit is 1 to 1000"),
        ({"inputs": []}, "inputs has 0 texts, the limit is 1 to 64"),
        ({"inputs": ["a", "a" * 31]}, "inputs[1] has 33 tokens, the limit is 32"),
        ({"inputs": "a" * 20_001}, "inputs has 20001 characters, the limit is 20000"),
        ({"inputs": "a", "parameters": {"temperature": 1}}, "unknown parameter: parameters.temperature"),
        ({"inputs": 3}, "inputs must be a string or a list of strings"),
    ],
)
async def test_bounds(client: Client, body: dict[str, object], message: str) -> None:
    answer = await client.post("/classify", json=body)
    assert (answer.status_code, answer.json()) == (422, {"error": message, "error_type": "validation"})


async def test_other_functions_are_refused(client: Client) -> None:
    answer = await client.post("/classify", json={"inputs": "a", "parameters": {"function_to_apply": "tanh"}})
    assert answer.status_code == 422
    assert "function_to_apply" in answer.json()["error"]


async def test_without_a_classifier(client: Client, app: FastAPI) -> None:
    app.state.services.registry.classify.take("moods")
    answer = await client.post("/classify", json={"inputs": "a"})
    assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found")


async def test_headers_and_counts(client: Client) -> None:
    answer = await client.post("/classify", json={"inputs": ["집", "home"]})
    assert (answer.headers["x-prompt-tokens"], answer.headers["x-generated-tokens"]) == ("6", "0")
    assert float(answer.headers["x-queue-time"]) >= 0


async def test_at_the_bare_root(client: Client) -> None:
    sigmoid = {"inputs": "집", "parameters": {"function_to_apply": "sigmoid"}}
    assert (await client.post("/", json=sigmoid)).json() == (
        await client.post("/classify", json=sigmoid)
    ).json()
    named = {"inputs": "집", "model": "moods"}
    assert (await client.post("/", json=named)).json() == (await client.post("/classify", json=named)).json()


async def test_an_unmodified_client(url: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    async with huggingface_hub.AsyncInferenceClient(f"{url}/classify") as client:
        answer = await client.text_classification("집")
        assert answer.label == "glad"  # the client takes the first of a list, and that is the best


def test_functions_at_the_ends_of_the_numbers() -> None:
    far = Logits([1000.0, -1000.0])
    assert apply_function("softmax", far) == [1.0, 0.0]
    assert apply_function("sigmoid", far) == [1.0, 0.0]
    assert apply_function("sigmoid", Logits([0.0, math.log(3)])) == pytest.approx([0.5, 0.75])
    assert apply_function("none", far) == [1000.0, -1000.0]
