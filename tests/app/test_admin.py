"""Loading and unloading by the administrator's route, on fake lanes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.engine.errors import NoRoom
from app.engine.registry import AnyTask, Registry
from app.errors import InvalidRequest
from app.keys import key_line, make_key
from app.lifecycle import begin_drain
from model.checkpoint import CheckpointError
from tests.app.fakes import FakeDecodeLane, FakeWorkshop, generate_task

Client = httpx.AsyncClient

ORDINARY, ADMIN = make_key(), make_key()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two folders to load from, beside one that nobody may."""
    for name in ("roots/next", "roots/broken", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "roots/link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "roots"


@pytest.fixture
def settings_values(root: Path) -> dict[str, object]:
    lines = f"{key_line('shop', ORDINARY)};{key_line('boss', ADMIN, admin=True)}"
    return {"api_keys": lines, "model_roots": f"{root.parent / 'none'}, {root}", "max_models": 2}


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[Client]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    async with Client(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers) as client:
        yield client


@pytest.fixture
def registry(app: FastAPI) -> Registry:
    registry: Registry = app.state.services.registry
    return registry


@pytest.fixture
def ready(registry: Registry) -> dict[tuple[str, str], AnyTask | Exception]:
    assert isinstance(registry.workshop, FakeWorkshop)
    return registry.workshop.ready


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def load(client: Client, name: str = "next", **changes: str) -> httpx.Response:
    return await client.post(
        "/admin/models", json={"endpoint": "generate", "name": name, "folder": "next"} | changes
    )


async def generated(client: Client, text: str = "a", **body: Any) -> str:
    answer = await client.post("/generate", json={"inputs": text, "parameters": {"max_new_tokens": 3}} | body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_only_administrators(app: FastAPI, method: str) -> None:
    async with Client(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        stranger = await client.request(method, "/admin/models")
        assert (stranger.status_code, stranger.json()["error_type"]) == (401, "unauthorized")
        client.headers["authorization"] = f"Bearer {ORDINARY}"
        ordinary = await client.request(method, "/admin/models")
        assert (ordinary.status_code, ordinary.json()["error_type"]) == (403, "forbidden")
        assert (await client.delete("/admin/models/generate/alphabet")).status_code == 403
        assert await generated(client) == "bcd"


class TestWithoutKeys:
    @pytest.fixture
    def settings_values(self) -> dict[str, object]:
        return {}

    async def test_nobody_is_an_administrator(self, client: Client) -> None:
        for answer in (await client.get("/admin/models"), await load(client)):
            assert answer.status_code == 403
            assert "needs an admin key" in answer.json()["error"]


async def test_a_second_model(client: Client, ready: dict[tuple[str, str], AnyTask], root: Path) -> None:
    task = ready["generate", "next"] = generate_task("next", "22")
    answer = await load(client)
    assert answer.status_code == 201
    assert answer.json()["sha256"] == "22"
    assert await generated(client) == "bcd"
    assert await generated(client, model="next") == "bcd"
    assert len(task.lane.submitted) == 1
    listed = {(m["endpoint"], m["name"]): m["status"] for m in (await client.get("/admin/models")).json()}
    assert listed["generate", "next"] == listed["generate", "alphabet"] == "ready"
    refused = await load(client, "third")
    assert (refused.status_code, refused.json()["error_type"]) == (409, "conflict")
    assert refused.json()["error"] == "generate has 2 models, the limit is 2; unload one first"
    assert (await load(client, "next", folder=str(root / "next"))).status_code == 201


async def test_a_bad_checkpoint_leaves_the_running_one(
    client: Client, ready: dict[tuple[str, str], AnyTask | Exception]
) -> None:
    failures = {
        "truncated": (CheckpointError("model.safetensors: not whole"), 422, "folder: model.safetensors: not"),
        "large": (
            NoRoom("next", 900, 100, "the device has"),
            507,
            "needs 900 bytes with its caches, the device has 100",
        ),
        "odd": (ZeroDivisionError(), 500, "internal error"),
    }
    for error, status, message in failures.values():
        ready["generate", "alphabet"] = error
        answer = await load(client, "alphabet")
        assert answer.status_code == status
        assert message in answer.json()["error"]
        assert await generated(client) == "bcd"
    assert [m["status"] for m in (await client.get("/admin/models")).json()] == ["ready"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "../elsewhere"}, "there is no folder '../elsewhere' under one of model_roots"),
        ({"folder": "link"}, "there is no folder 'link' under one of model_roots"),
        ({"folder": "/etc"}, "there is no folder '/etc' under one of model_roots"),
        ({"folder": "nothing"}, "there is no folder 'nothing' under one of model_roots"),
        ({"folder": "a\0b"}, "there is no folder"),
        ({"folder": "x" * 5000}, "folder has 5000 characters, the limit is 4096"),
        ({"folder": "x" * 300}, "there is no folder"),
        ({"name": "a/b"}, "name: the name 'a/b' must be 1 to 64 letters"),
        ({"name": ""}, "name: the name '' must be"),
        ({"endpoint": "next-sentence"}, "endpoint"),
        ({"more": "1"}, "unknown parameter: more"),
    ],
)
async def test_what_is_refused(client: Client, changes: dict[str, str], message: str) -> None:
    answer = await load(client, **changes)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert message in answer.json()["error"]


async def test_the_base_of_an_addition_must_lie_under_a_root_too(client: Client, root: Path) -> None:
    values = '{"architecture": "classifier", "base": "../../elsewhere", "base_sha256": "%s", "scale": 1.0, '
    (root / "broken/config.json").write_text(values % ("a" * 64) + '"labels": ["a", "b"]}')
    answer = await load(client, endpoint="classify", folder="broken")
    assert (answer.status_code, "its base does not lie" in answer.json()["error"]) == (422, True)


async def test_a_request_in_flight_ends_on_the_old_one(
    client: Client, registry: Registry, ready: dict[tuple[str, str], AnyTask]
) -> None:
    old = registry.generate.default
    assert old is not None
    assert isinstance(old.lane, FakeDecodeLane)
    lane = old.lane
    lane.pause_seconds = 0.05
    running = asyncio.create_task(generated(client))
    await until(lambda: lane.running)
    new = generate_task("alphabet", "33")
    new.lane.scripts["a"] = new.tokenizer.encode("new")
    ready["generate", "alphabet"] = new
    assert (await load(client, "alphabet")).status_code == 201
    statuses = {m["sha256"]: (m["status"], m["requests"]) for m in (await client.get("/admin/models")).json()}
    assert statuses["cc"] == ("leaving", 1)
    assert statuses["33"] == ("ready", 0)
    assert await generated(client) == "new"
    assert not running.done()
    assert await running == "bcd"
    await until(lambda: not registry.leaving)
    assert old.lane not in registry.worker.lanes  # type: ignore[attr-defined]


async def test_unloading(client: Client, registry: Registry, ready: dict[tuple[str, str], AnyTask]) -> None:
    ready["generate", "next"] = generate_task("next", "22")
    await load(client)
    answer = await client.delete("/admin/models/generate/alphabet")
    assert (answer.status_code, answer.json()["name"]) == (200, "alphabet")
    assert (await client.get("/info")).json()["tasks"]["generate"]["model"] == "next"
    for path in ("generate/alphabet", "translate/next", "generate/%00"):
        missing = await client.delete(f"/admin/models/{path}")
        assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")
    assert (await client.delete("/admin/models/next-sentence/x")).status_code == 422
    await client.delete("/admin/models/generate/next")
    assert (await client.post("/generate", json={"inputs": "a"})).status_code == 404
    await until(lambda: not registry.leaving)
    assert '"next"' not in (await client.get("/metrics")).text


async def test_one_load_at_a_time(
    client: Client, registry: Registry, ready: dict[tuple[str, str], AnyTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = asyncio.Event()

    async def wait(endpoint: str, task: AnyTask) -> None:
        await warm.wait()

    monkeypatch.setattr(registry.workshop, "warm_up", wait)
    ready["generate", "next"] = generate_task("next", "22")
    first = asyncio.create_task(load(client))
    await until(lambda: registry.loading is not None)
    refused = await load(client, "other")
    assert (refused.status_code, "'next' is being loaded" in refused.json()["error"]) == (409, True)
    assert {"loading"} <= {model["status"] for model in (await client.get("/admin/models")).json()}
    assert (await client.post("/generate", json={"inputs": "a", "model": "next"})).status_code == 404
    first.cancel()  # the client leaves
    await asyncio.gather(first, return_exceptions=True)
    warm.set()
    await until(lambda: registry.loading is None)
    assert await generated(client, model="next") == "bcd"


async def test_no_load_while_draining(client: Client, app: FastAPI) -> None:
    begin_drain(app)
    assert (await load(client)).status_code == 503


def test_no_root() -> None:
    from app.api.admin import find_folder

    with pytest.raises(InvalidRequest, match="no folder"):
        find_folder("weights", [])
