"""A client that leaves frees its rows, through a real server and its sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from tests.app.fakes import FakeBatchLane, FakeDecodeLane


@pytest.fixture
async def address(app: FastAPI) -> AsyncIterator[tuple[str, int]]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    yield host, port
    server.should_exit = True
    await serving


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def send(address: tuple[str, int], path: str, body: object) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(*address)
    content = json.dumps(body).encode()
    headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}")
    head = "\r\n".join((f"POST {path} HTTP/1.1", *headers, "", ""))
    writer.write(head.encode() + content)
    await writer.drain()
    return writer


LONG = {"max_new_tokens": 25}


@pytest.mark.parametrize("stream", [False, True])
async def test_generation(address: tuple[str, int], generate_lane: FakeDecodeLane, *, stream: bool) -> None:
    generate_lane.pause_seconds = 0.2
    body = {"inputs": ["a"], "parameters": LONG, "stream": stream}
    writer = await send(address, "/generate", body)
    await until(lambda: len(generate_lane.running) == 1)
    await asyncio.sleep(0.3)  # a stream has begun by now
    assert len(generate_lane.running) == 1
    writer.close()
    await until(lambda: not generate_lane.running)


async def test_stream_before_its_first_token(address: tuple[str, int], generate_lane: FakeDecodeLane) -> None:
    generate_lane.pause_seconds = 30
    writer = await send(address, "/generate_stream", {"inputs": "a"})
    await until(lambda: len(generate_lane.running) == 1)
    writer.close()
    await until(lambda: not generate_lane.running)


@pytest.mark.parametrize("path", ["/v1/completions", "/"])
@pytest.mark.parametrize("stream", [False, True])
async def test_completions(
    address: tuple[str, int], generate_lane: FakeDecodeLane, path: str, *, stream: bool
) -> None:
    generate_lane.pause_seconds = 0.2
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 25, "stream": stream}
    writer = await send(address, path, body)
    await until(lambda: len(generate_lane.running) == 4)
    await asyncio.sleep(0.3)  # a stream has begun by now
    assert len(generate_lane.running) == 4
    writer.close()
    await until(lambda: not generate_lane.running)


async def test_translation_of_many_sentences(
    address: tuple[str, int], translate_lane: FakeDecodeLane
) -> None:
    translate_lane.pause_seconds = 30
    writer = await send(address, "/translate", {"inputs": ["One. Two.", "Three."]})
    await until(lambda: len(translate_lane.running) == 3)
    writer.close()
    await until(lambda: not translate_lane.running)


async def test_fill_mask(address: tuple[str, int], fill_mask_lane: FakeBatchLane) -> None:
    fill_mask_lane.pause_seconds = 30
    writer = await send(address, "/fill-mask", {"inputs": ["a [MASK]", "b [MASK]"]})
    await until(lambda: len(fill_mask_lane.running) == 2)
    writer.close()
    await until(lambda: not fill_mask_lane.running)


async def test_one_of_many_clients(address: tuple[str, int], generate_lane: FakeDecodeLane) -> None:
    generate_lane.pause_seconds = 0.05
    async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}") as client:
        stays = asyncio.create_task(client.post("/generate", json={"inputs": "a", "parameters": LONG}))
        writer = await send(address, "/generate", {"inputs": "b", "parameters": LONG})
        await until(lambda: len(generate_lane.running) == 2)
        writer.close()
        await until(lambda: len(generate_lane.running) == 1)
        assert (await stays).json()["generated_text"] == "bcdefghijklmnopqrstuvwxyz"


async def test_the_record_says_so(
    address: tuple[str, int], generate_lane: FakeDecodeLane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "app.request")
    generate_lane.pause_seconds = 30
    writer = await send(address, "/generate", {"inputs": "a"})
    await until(lambda: len(generate_lane.running) == 1)
    writer.close()
    await until(lambda: bool(caplog.records))
    fields = vars(caplog.records[-1])["fields"]
    assert (fields["client_gone"], fields["error_type"]) == (True, "disconnected")
