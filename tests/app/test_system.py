"""Health, readiness, information, metrics, ids."""

import re

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from app.lifecycle import Phase, begin_drain
from app.main import create_app
from tests.app.fakes import FakeDecodeLane, load_fakes, make_settings

Client = httpx.AsyncClient


async def sample(client: Client, metric: str, /, **labels: str) -> float:
    """The sum of all that have these labels."""
    text = (await client.get("/metrics")).text
    values = [
        float(found.value)
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if found.name == f"transformer_{metric}" and labels.items() <= found.labels.items()
    ]
    assert values, f"no sample {metric} {labels}"
    return sum(values)


async def test_health_and_ready(client: Client) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["tasks"]) == (200, ["translate", "fill-mask", "generate"])
    assert await sample(client, "ready") == 1


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_may_ask_for_the_head_alone(url: str, path: str) -> None:
    async with httpx.AsyncClient() as client:
        whole, head = await client.get(url + path), await client.head(url + path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


async def test_not_ready_while_draining(client: Client, app: FastAPI) -> None:
    begin_drain(app)
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["error_type"]) == (503, "draining")
    assert int(answer.headers["retry-after"]) >= 1
    assert await sample(client, "ready") == 0
    refused = await client.post("/fill-mask", json={"inputs": "[MASK]"})
    assert (refused.status_code, refused.json()["error_type"]) == (503, "draining")
    assert (await client.get("/health")).status_code == 200


async def test_not_ready_when_broken(client: Client, app: FastAPI) -> None:
    app.state.services.worker.fault = "the device thread has ended"
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["error"] == "not ready: the device thread has ended"
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()) == (
        503,
        {"error": "the device thread has ended", "error_type": "broken"},
    )
    app.state.services.worker.fault = None
    assert (await client.get("/health")).status_code == 200


async def test_not_ready_while_loading() -> None:
    app = create_app(make_settings(), load_fakes)
    assert app.state.lifecycle.phase is Phase.LOADING
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()["error"]) == (503, "not ready: loading")
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_not_ready_without_a_model(app: FastAPI, client: Client) -> None:
    app.state.services.registry.shelves.clear()
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["error"]) == (503, "not ready: no model is loaded")
    assert (await client.get("/health")).status_code == 200
    assert await sample(client, "ready") == 0


async def test_info(client: Client) -> None:
    info = (await client.get("/info")).json()
    assert info["tasks"]["translate"]["model"] == "shout"
    assert info["tasks"]["translate"]["languages"] == ["en", "ko"]
    assert info["tasks"]["generate"]["limits"]["max_new_tokens"] == 99  # and a prompt of one token
    assert info["tasks"]["translate"]["limits"]["max_new_tokens"] == 100
    assert info["tasks"]["fill-mask"]["sha256"] == "bb"
    assert (info["tasks"]["translate"]["quantization"], info["tasks"]["translate"]["shortlist"]) == (
        "none",
        [],
    )
    assert info["tasks"]["translate"]["examples"] == 0
    assert info["limits"]["max_texts"] == 64


async def test_request_id(client: Client) -> None:
    assert (await client.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for bad in ("", "a b", "x" * 129, "\x7f"):
        made = (await client.get("/health", headers={"x-request-id": bad})).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


async def test_outcomes_are_counted(client: Client, generate_lane: FakeDecodeLane) -> None:
    async def count(outcome: str) -> float:
        return await sample(client, "requests_total", endpoint="generate", outcome=outcome)

    rejected = await sample(client, "rejected_total", endpoint="generate", reason="validation")
    before = [await count(outcome) for outcome in ("success", "refused", "failed")]
    await client.post("/generate", json={"inputs": "a"})
    await client.post("/generate", json={"inputs": "a", "parameters": {"top_k": -1}})
    generate_lane.fail_at = 2
    await client.post("/generate", json={"inputs": "a", "stream": True})
    assert [await count(outcome) for outcome in ("success", "refused", "failed")] == [n + 1 for n in before]
    assert await sample(client, "rejected_total", endpoint="generate", reason="validation") == rejected + 1


async def test_every_metric_has_the_prefix_and_starts_at_zero(client: Client) -> None:
    text = (await client.get("/metrics")).text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert all(name.startswith(("transformer_", "python_", "process_")) for name in names)
    assert await sample(client, "requests_total", endpoint="next-sentence", outcome="timeout") == 0
    assert await sample(client, "model_info", endpoint="generate", name="alphabet", sha256="cc") == 1
    assert "_created" not in text


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_no_cors(client: Client, path: str) -> None:
    answer = await client.get(path, headers={"origin": "http://elsewhere"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
