"""The contract with real clients, in the versions of this environment and in those of an older one."""

import ast
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvicorn

from app.engine.sequence import Sequence
from app.keys import key_line
from app.main import create_app
from model.sampling import BeamParams
from tests.app.fakes import load_fakes, make_settings

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KEY = "a-key-that-is-long-enough"
NAMES = [
    node.name
    for node in ast.parse((HERE / "contract.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


def older_python() -> Path:
    """Made by `make test`, which says where it is; skips where nobody made it."""
    given = os.environ.get("CLIENTS")
    python = ROOT / (given or ".venv-clients") / "bin" / "python"
    if not python.exists():
        assert given is None, f"there is no {python}"
        pytest.skip("the older clients are not installed; `make test` installs them")
    return python


@asynccontextmanager
async def serving(*, full: bool = False, **values: object) -> AsyncIterator[str]:
    """A server with fake lanes; full, with as much in its queues as they take."""
    app = create_app(make_settings(**values), load_fakes)
    async with app.router.lifespan_context(app):
        if full:
            for name in ("translate", "generate"):
                lane: Any = app.state.services.registry.shelves[name].default.lane
                lane.pause_seconds = 600
                lane.submit([Sequence([1], BeamParams()) for _ in range(lane.limits.max_queue_items)])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
            for lane in app.state.services.worker.lanes:
                lane.abort_all()


async def run_contract(python: Path) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        servers = {
            "url": await stack.enter_async_context(serving()),
            "full": await stack.enter_async_context(serving(full=True)),
            "keyed": await stack.enter_async_context(serving(api_keys=key_line("tests", KEY))),
            "key": KEY,
        }
        environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        process = await asyncio.create_subprocess_exec(
            str(python),
            str(HERE / "contract.py"),
            json.dumps(servers),
            stdout=asyncio.subprocess.PIPE,
            env=environment | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        output, _ = await process.communicate()
    found: dict[str, Any] = json.loads(output)
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def newer() -> dict[str, Any]:
    return await run_contract(Path(sys.executable))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def older() -> dict[str, Any]:
    return await run_contract(older_python())


@pytest.mark.parametrize("name", NAMES)
def test_newer_clients(newer: dict[str, Any], name: str) -> None:
    assert newer["results"][name] is None, newer["results"][name]


@pytest.mark.parametrize("name", NAMES)
def test_older_clients(older: dict[str, Any], name: str) -> None:
    assert older["results"][name] is None, older["results"][name]


def test_they_are_two_versions_of_each(newer: dict[str, Any], older: dict[str, Any]) -> None:
    def major(found: dict[str, Any]) -> dict[str, str]:
        return {name: number.split(".")[0] for name, number in found["versions"].items()}

    assert major(older) == {"huggingface_hub": "0", "openai": "1", "libretranslatepy": "2"}
    assert major(newer) == {"huggingface_hub": "2", "openai": "3", "libretranslatepy": "2"}
    assert newer["versions"]["libretranslatepy"] != older["versions"]["libretranslatepy"]
