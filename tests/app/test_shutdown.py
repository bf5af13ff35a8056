"""The end of a real process: SIGTERM once, SIGTERM twice."""

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@asynccontextmanager
async def serving(
    pause_seconds: float, grace_seconds: float
) -> AsyncIterator[tuple[Process, httpx.AsyncClient]]:
    port = free_port()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "tests/app/fake_server.py"),
        *(str(port), str(pause_seconds), str(grace_seconds)),
        env=os.environ | {"PYTHONPATH": path},
        stderr=PIPE,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            await until_ready(client)
            # The first request of a route takes longer, and would not be in by the time of the signal.
            assert (await client.post("/generate", json=body(0))).status_code == 422
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                if (await client.get("/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.05)


def body(n_tokens: int, *, stream: bool = False) -> dict[str, object]:
    return {"inputs": "a", "parameters": {"max_new_tokens": n_tokens}, "stream": stream}


async def test_accepted_work_ends_new_work_is_refused_exit_is_zero() -> None:
    async with serving(pause_seconds=0.1, grace_seconds=20) as (process, client):
        accepted = asyncio.create_task(client.post("/generate", json=body(20)))
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.6)
        ready, alive = await client.get("/ready"), await client.get("/health")
        refused = await client.post("/generate", json=body(1))
        assert (ready.status_code, alive.status_code, refused.status_code) == (503, 200, 503)
        assert refused.json()["error_type"] == ready.json()["error_type"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        answer = await accepted
        assert answer.status_code == 200
        assert answer.json()["generated_text"] == "bcdefghijklmnopqrstu"
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_work_that_outlasts_the_grace_period_is_told_so() -> None:
    async with serving(pause_seconds=2.0, grace_seconds=2) as (process, client):  # 50 seconds of work
        streamed = asyncio.create_task(client.post("/generate", json=body(25, stream=True)))
        whole = asyncio.create_task(client.post("/generate", json=body(25)))
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        last = [line for line in (await streamed).text.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data:"))["error_type"] == "draining"
        assert ((await whole).status_code, (await whole).json()["error_type"]) == (503, "draining")


async def test_an_idle_service_leaves_at_once() -> None:
    async with serving(pause_seconds=0.0, grace_seconds=30) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_the_second_signal_ends_at_once() -> None:
    async with serving(pause_seconds=2.0, grace_seconds=60) as (process, client):
        accepted = asyncio.create_task(client.post("/generate", json=body(25)))
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGTERM
        await asyncio.gather(accepted, return_exceptions=True)


async def test_the_log_is_json_and_holds_no_text() -> None:
    async with serving(pause_seconds=0.0, grace_seconds=5) as (process, client):
        headers = {"authorization": "Bearer a-secret", "x-request-id": "id-of-mine"}
        request = {"inputs": "the prompt", "parameters": {"max_new_tokens": 2}}
        await client.post("/generate?q=in-the-query", json=request, headers=headers)
        await client.get("/no-such-path/with-words")
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = (await process.stderr.read()).decode()
    lines = [json.loads(line) for line in log.splitlines()]
    line = next(line for line in lines if line.get("id") == "id-of-mine")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/generate", 200)
    assert (line["prompt_tokens"], line["generated_tokens"], line["client_gone"]) == (11, 2, False)
    assert line["total_ms"] >= 0
    for secret in ("the prompt", "a-secret", "in-the-query", "with-words"):
        assert secret not in log
