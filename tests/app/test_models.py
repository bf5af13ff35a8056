"""Several models of one endpoint: the body or the path names one, else the default serves."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from app import metrics
from app.engine.registry import Registry, Task
from tests.app.fakes import FakeDecodeLane, byte_tokenizer, generate_task, make_config
from tests.app.test_system import sample

Client = httpx.AsyncClient


def test_many_equal_observations_are_so_many() -> None:
    seen: list[list[float]] = []
    for name, many in (("one_by_one", False), ("at_once", True)):
        metric = metrics.Distribution(name, "Of a test.", buckets=(1.0, 2.0, 5.0), registry=None)
        for amount, n in ((0.5, 3), (2.0, 4), (2.5, 1), (9.0, 2)):
            if many:
                metric.observe_many(amount, n)
            for _ in range(0 if many else n):
                metric.observe(amount)
        (family,) = metric.collect()
        seen.append([sample.value for sample in family.samples])
    assert seen[0] == seen[1] == [3.0, 7.0, 8.0, 10.0, 10.0, 30.0]


@pytest.fixture
def registry(app: FastAPI) -> Registry:
    """A second generator, which says z after everything, and ends."""
    registry: Registry = app.state.services.registry
    task = generate_task("sleepy", "ee")
    z, end = byte_tokenizer().encode("z")[0], byte_tokenizer().eos_id
    task.lane.scripts = {text: [z, end] for text in ("a", "home")}
    registry.generate.put(task)
    metrics.add_model("generate", "sleepy", "ee")
    return registry


BODY = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
FIRST, SECOND = {"generated_text": "bc"}, {"generated_text": "z"}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("path", "model", "answer"),
    [
        ("/generate", None, FIRST),
        ("/generate", "alphabet", FIRST),
        ("/generate", "sleepy", SECOND),
        ("/models/sleepy", None, SECOND),
        ("/models/sleepy/", None, SECOND),
        ("/models/alphabet", None, FIRST),
        ("/models/sleepy/generate", None, SECOND),
        ("/models/sleepy/generate", "sleepy", SECOND),
        ("/models/sleepy/generate", "dummy", SECOND),
        ("/", "sleepy", SECOND),
    ],
)
async def test_the_hugging_face_form(client: Client, path: str, model: str | None, answer: object) -> None:
    body = BODY if model is None else BODY | {"model": model}
    assert (await client.post(path, json=body)).json() == answer


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("path", ["/generate", "/", "/generate_stream", "/tokenize"])
async def test_a_name_that_nothing_has(client: Client, path: str) -> None:
    for answer in (
        await client.post(path, json={"inputs": "a", "model": "nope"}),
        await client.post(f"/models/nope{path}", json={"inputs": "a"}),
    ):
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found")
        assert "no model 'nope' for" in answer.json()["error"]
        assert "'alphabet'" in answer.json()["error"] or "'shout'" in answer.json()["error"]


@pytest.mark.usefixtures("registry")
async def test_two_names(client: Client) -> None:
    answer = await client.post("/models/sleepy/generate", json=BODY | {"model": "alphabet"})
    assert answer.status_code == 422
    assert answer.json()["error"] == "model is 'alphabet', the path says 'sleepy'"


async def test_a_name_of_another_endpoint(client: Client) -> None:
    answer = await client.post("/models/shout/generate", json=BODY)
    assert answer.status_code == 404
    assert answer.json()["error"] == "no model 'shout' for generate; there is 'alphabet'"


@pytest.mark.usefixtures("registry")
async def test_openai(client: Client) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["alphabet", "sleepy"]
    assert (await client.get("/v1/models/sleepy")).json()["id"] == "sleepy"
    for path, model in (("/v1", "sleepy"), ("/models/sleepy/v1", "sleepy"), ("/models/sleepy/v1", "tgi")):
        answer = await client.post(f"{path}/completions", json={"prompt": "a", "model": model})
        assert answer.json()["model"] == "sleepy"
        assert answer.json()["choices"][0]["text"] == "z"
    wrong = await client.post("/models/alphabet/v1/completions", json={"prompt": "a", "model": "sleepy"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")


@pytest.mark.usefixtures("registry")
async def test_info(client: Client) -> None:
    info = (await client.get("/info")).json()
    assert list(info["models"]["generate"]) == ["alphabet", "sleepy"]
    assert info["tasks"]["generate"]["model"] == "alphabet"
    one = (await client.get("/models/sleepy/info")).json()
    assert one["models"] == {"generate": {"sleepy": info["models"]["generate"]["sleepy"]}}
    assert one["tasks"]["generate"]["sha256"] == "ee"
    assert (await client.get("/models/sleepy/health")).status_code == 200
    assert (await client.get("/models/nope/info")).status_code == 404


@pytest.mark.usefixtures("registry")
async def test_metrics_tell_models_apart(client: Client) -> None:
    async def count(model: str) -> float:
        return await sample(client, "requests_total", endpoint="generate", outcome="success", model=model)

    before = [await count(name) for name in ("alphabet", "sleepy")]
    await client.post("/models/sleepy", json=BODY)
    assert [await count(name) for name in ("alphabet", "sleepy")] == [before[0], before[1] + 1]
    await client.post("/generate", json={"inputs": "a", "model": "nope\x00{}"})
    await client.post("/generate", json={"inputs": "a", "parameters": {"top_k": -1}})
    text = (await client.get("/metrics")).text
    assert "nope" not in text
    assert 'transformer_model_info{endpoint="generate",name="sleepy",sha256="ee"} 1.0' in text


def test_series_live_as_long_as_their_model() -> None:
    def series() -> list[str]:
        from prometheus_client import generate_latest

        return [line for line in generate_latest().decode().splitlines() if '"short-lived"' in line]

    assert series() == []
    metrics.add_model("fill-mask", "short-lived", "ff")
    assert {line.partition("{")[0] for line in series()} == {
        f"transformer_{name}"
        for name in (
            "requests_total",
            "prompt_tokens_total",
            "generated_tokens_total",
            "reused_tokens_total",
            "reranked_total",
            "with_examples_total",
            "queue_items",
            "queue_tokens",
            "rows_in_use",
            "kv_cache_usage_ratio",
            "model_bytes",
            "step_failures_total",
            "model_info",
        )
    }
    assert all(line.endswith(" 0.0") for line in series() if "model_info" not in line)
    assert any('endpoint="next-sentence"' in line for line in series())
    metrics.add_model("fill-mask", "short-lived", "gg")
    assert [line for line in series() if "ff" in line] == []
    metrics.remove_model("fill-mask", "short-lived")
    assert series() == []


@pytest.fixture
def polyglot(app: FastAPI) -> FakeDecodeLane:
    """A translator of other languages, which come after the first's."""
    registry: Registry = app.state.services.registry
    first = registry.translate.default
    assert first is not None
    tokenizer = byte_tokenizer()
    other = type("Other", (type(tokenizer),), {"languages": {"de": 6, "fr": 7, "en": 8}})(tokenizer.backend)
    other.languages = {"de": 6, "fr": 7, "en": 8}
    lane = FakeDecodeLane(other, first.lane.limits)
    registry.translate.put(Task(lane, other, make_config("translator"), "polyglot", "11"))
    return lane


async def test_languages_choose_where_nothing_is_named(client: Client, polyglot: FakeDecodeLane) -> None:
    for body in (
        {"inputs": "a", "parameters": {"src_lang": "de", "tgt_lang": "fr"}},
        {"q": "a", "source": "de", "target": "fr"},
    ):
        polyglot.submitted.clear()
        assert (await client.post("/translate", json=body)).status_code == 200
        assert len(polyglot.submitted) == 1
    polyglot.submitted.clear()
    both = {"q": "a", "source": "auto", "target": "en"}
    assert (await client.post("/translate", json=both)).status_code == 200  # the default knows it too
    assert (await client.post("/translate", json=both | {"model": "shout"})).status_code == 200
    assert polyglot.submitted == []
    refused = await client.post("/translate", json={"q": "a", "source": "de", "target": "ko"})
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        "source: no language 'de'; there are en, ko",
    )
    named = {"q": "a", "source": "en", "target": "ko", "model": "polyglot"}
    assert (await client.post("/translate", json=named)).status_code == 400
    assert (await client.post("/translate", data=named | {"target": "de"})).status_code == 200
    assert len(polyglot.submitted) == 1


@pytest.mark.usefixtures("polyglot")
async def test_languages_of_all_models(client: Client) -> None:
    def targets(languages: list[dict[str, object]]) -> dict[object, object]:
        return {language["code"]: language["targets"] for language in languages}

    together = targets((await client.get("/languages")).json())
    assert together["en"] == ["de", "en", "fr", "ko"]
    assert together["ko"] == ["en", "ko"]
    assert together["de"] == ["de", "en", "fr"]
    for answer in (
        await client.get("/languages", params={"model": "shout"}),
        await client.get("/models/shout/languages"),
    ):
        assert targets(answer.json()) == {"en": ["en", "ko"], "ko": ["en", "ko"]}
    assert (await client.get("/languages", params={"model": "nope"})).status_code == 404


@pytest.mark.usefixtures("registry")
async def test_unmodified_clients_whose_url_names_the_model(url: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    async with huggingface_hub.AsyncInferenceClient(
        f"{url}/models/sleepy", provider="hf-inference"
    ) as client:
        assert await client.text_generation("a", max_new_tokens=2) == "z"
        assert (await client.get_endpoint_info())["tasks"]["generate"]["model"] == "sleepy"
        assert await client.health_check()
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(base_url=f"{url}/models/sleepy/v1", api_key="none") as client:
        assert (await client.completions.create(model="sleepy", prompt="a")).choices[0].text == "z"
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert (await client.completions.create(model="sleepy", prompt="a")).choices[0].text == "z"


async def test_a_model_is_let_go_however_its_request_ends(url: str, registry: Registry) -> None:
    task = registry.generate.get("sleepy")
    assert task is not None
    lane = task.lane
    assert isinstance(lane, FakeDecodeLane)
    async with httpx.AsyncClient(base_url=f"{url}/models/sleepy") as client:
        assert (await client.post("/generate", json=BODY)).status_code == 200
        assert (await client.post("/generate", json={"inputs": "a" * 99})).status_code == 422
        assert (await client.post("/v1/completions", json={"prompt": "a", "n": 99})).status_code == 400
        lane.fail_at = 1
        assert (await client.post("/generate", json=BODY)).status_code == 500
        lane.fail_at = None
        assert task.n_users == 0
        lane.pause_seconds = 0.05
        endless = {"inputs": "b", "stream": True, "parameters": {"max_new_tokens": 20}}
        async with client.stream("POST", "/generate", json=endless) as answer:
            async for _ in answer.aiter_lines():
                assert task.n_users == 1
                break  # the client leaves
    async with asyncio.timeout(10):
        while task.n_users:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
