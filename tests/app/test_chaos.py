"""The real engine on tiny models behind real sockets: too much load, and clients without manners.

The long forms are `python -m benchmarks.burst` and `python -m benchmarks.soak`.
"""

import asyncio
import random
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from app.__main__ import make_config
from app.main import create_app
from benchmarks.burst import burst
from benchmarks.concurrency import CALLS, Call
from benchmarks.soak import Diary, Visitor, rest
from tests.app.fakes import make_settings
from tests.tiny import TinyFolders


@pytest.fixture(scope="module")
def port(tiny_folders: TinyFolders) -> Iterator[int]:
    """A server in a thread of its own: few rows, a short queue."""
    settings = make_settings(
        port=0,
        translate_model=str(tiny_folders.translate),
        fill_mask_model=str(tiny_folders.fill_mask),
        generate_model=str(tiny_folders.generate),
        device="cpu",
        n_threads=1,
        translate_slots=8,
        generate_slots=4,
        max_queue_items=12,
    )
    server = uvicorn.Server(make_config(create_app(settings), settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def generate(client: httpx.AsyncClient, number: int) -> object:
    """As long as the tiny model's context allows."""
    body = {"inputs": f"{number}", "parameters": {"max_new_tokens": 40}}
    return client.post("/generate", json=body)


@pytest.mark.parametrize("call", [CALLS["translate"], generate], ids=["translate", "generate"])
async def test_a_burst_is_served_or_told_when_to_come_again(port: int, call: Call) -> None:
    outcome = await burst(f"http://127.0.0.1:{port}", call, rate=200, seconds=0.6)
    assert outcome.is_sound, outcome
    assert {"200", "429"} <= set(outcome.statuses)
    assert all(1.0 <= seconds <= 60.0 for seconds in outcome.retry_after)
    assert outcome.probes


async def test_clients_without_manners_leave_nothing_behind(port: int) -> None:
    diary = Diary()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        visitors = [Visitor(http, port, random.Random(seed), diary) for seed in range(8)]
        for _ in range(4):
            await asyncio.gather(*(visitor.act() for visitor in visitors))
        await rest(http, diary)
    assert not diary.faults
    assert diary.answers["leave"]
