"""An application on fake lanes, a client that talks to it without a socket, and a server for real ones."""

import asyncio
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from app.main import create_app
from tests.app.fakes import FakeBatchLane, FakeDecodeLane, load_fakes, make_settings


@pytest.fixture
def settings_values() -> dict[str, object]:
    """Settings that differ from the defaults; a test module may override this."""
    return {}


@pytest.fixture
async def app(settings_values: dict[str, object]) -> AsyncIterator[FastAPI]:
    app = create_app(make_settings(**settings_values), load_fakes)
    async with app.router.lifespan_context(app):
        for task in app.state.services.tasks.values():
            task.lane.submitted.clear()  # what warmed it up
        yield app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def generate_lane(app: FastAPI) -> FakeDecodeLane:
    lane: FakeDecodeLane = app.state.services.registry.generate.default.lane
    return lane


@pytest.fixture
def translate_lane(app: FastAPI) -> FakeDecodeLane:
    lane: FakeDecodeLane = app.state.services.registry.translate.default.lane
    return lane


@pytest.fixture
def fill_mask_lane(app: FastAPI) -> FakeBatchLane:
    lane: FakeBatchLane = app.state.services.registry.fill_mask.default.lane
    return lane


@pytest.fixture
async def url(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """Where the application listens."""
    # Tests of this process that went before may have forbidden the hub's client to use a network.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if hub := sys.modules.get("huggingface_hub.constants"):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving
