"""Sockets: clients that are slow, silent, too many or no HTTP; a page of another origin."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.__main__ import make_config, make_room_for_connections
from app.main import create_app
from tests.app.fakes import FakeDecodeLane, load_fakes, make_settings

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

BOUNDS: dict[str, object] = {"receive_seconds": 0.4, "read_seconds": 0.4, "max_connections": 3}
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def settings_values() -> dict[str, object]:
    return BOUNDS


@pytest.fixture
async def address(app: FastAPI) -> AsyncIterator[tuple[str, int]]:
    config = make_config(app, make_settings(port=0, **BOUNDS))
    config.lifespan = "off"
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    await serving


@asynccontextmanager
async def connection(address: tuple[str, int]) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes or resets."""
    found = b""
    async with asyncio.timeout(20):
        while not reader.at_eof():
            try:
                found += await reader.read(65536)
            except ConnectionResetError:  # the reader keeps to itself what came just before
                return found + bytes(reader._buffer)  # type: ignore[attr-defined]
    return found


async def drip(writer: asyncio.StreamWriter, data: bytes, *, times: int = 10_000) -> None:
    """One piece after the other, as long as the server takes them."""
    try:
        for _ in range(times):
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.02)
    except ConnectionError:
        pass


async def test_silence_is_cut_off(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, _):
        assert await rest(reader) == b""


async def test_a_head_that_drips_is_cut_off(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n")
        dripping = asyncio.create_task(drip(writer, b"x: y\r\n"))
        assert await rest(reader) == b""
        dripping.cancel()


async def test_a_body_that_drips_is_told_so(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b"Content-Length: 100000\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, b" "))
        answer = await rest(reader)
        dripping.cancel()
        assert answer.startswith(b"HTTP/1.1 408 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert error == {"error": "the body was not in after 0.4 seconds", "error_type": "timeout"}


async def test_a_body_that_drips_on_after_its_refusal_is_cut_off(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b"Content-Length: 999999999\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, b" "))
        assert (await rest(reader)).startswith(b"HTTP/1.1 413 ")
        dripping.cancel()


async def test_the_second_request_of_a_connection_has_its_own_time(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        for _ in range(4):
            writer.write(b"GET /health HTTP/1.1\r\n")
            await asyncio.sleep(0.15)
            writer.write(b"Host: x\r\n\r\n")
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b'{"status":"ok"}'))


async def test_an_answer_that_takes_its_time_is_not_cut_off(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    generate_lane.pause_seconds = 0.3
    async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}") as client:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 5}}
        assert (await client.post("/generate", json=body)).json()["generated_text"] == "bcdef"


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"A" * 70_000, b"\x00\r\n\r\n"],
)
async def test_what_is_no_http_is_answered_in_json(address: tuple[str, int], garbage: bytes) -> None:
    async with connection(address) as (reader, writer):
        writer.write(garbage + b"\r\n\r\n")
        head, _, body = (await rest(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error_type"] == "validation"


@pytest.mark.parametrize(
    "head",
    [
        b"GET http://x HTTP/1.1\r\nHost: x\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n",
        HEAD + b"Transfer-Encoding: identity\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 15\r\n",
        HEAD + b"Content-Length: 15\r\nContent-Length: 15\r\n",
    ],
)
async def test_a_head_that_means_nothing_here_is_answered_in_json(
    address: tuple[str, int], head: bytes
) -> None:
    async with connection(address) as (reader, writer):
        writer.write(head + b"\r\n")
        answer, _, body = (await rest(reader)).partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error_type"] == "validation"


@pytest.mark.parametrize("hosts", [b"", b"Host: x\r\nHost: y\r\n"])
async def test_a_request_names_one_host(address: tuple[str, int], hosts: bytes) -> None:
    async with connection(address) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n" + hosts + b"\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 400 ")


async def test_a_head_over_the_limit_is_refused(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        pouring = asyncio.create_task(drip(writer, b"x: " + b"y" * 4000 + b"\r\n", times=20))
        assert (await rest(reader)).startswith(b"HTTP/1.1 400 ")
        pouring.cancel()


async def test_headers_behind_the_body_are_not_the_requests(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b"x-request-id: one\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b'f\r\n{"inputs": "a"}\r\n0\r\nx-request-id: two\r\n\r\n')
        answer = await reader.readuntil(b"}")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"x-request-id: one\r\n" in answer


async def test_requests_in_a_row_are_answered_in_a_row(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    generate_lane.pause_seconds = 0.1
    async with connection(address) as (reader, writer):
        for inputs in (b"y", b"a"):
            content = b'{"inputs": "%s", "parameters": {"max_new_tokens": 6}}' % inputs
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        writer.write(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = await rest(reader)
        assert answers.count(b"HTTP/1.1 200 ") == 3
        assert answers.index(b'"z"') < answers.index(b'"bcdefg"') < answers.index(b"text/html")
        assert answers.endswith(b"\r\n\r\n")


async def test_a_client_that_asks_first_is_told_to_go_on(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b"Content-Length: 15\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b'{"inputs": "a"}')
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("pause", [0.0, 0.1])
@pytest.mark.parametrize(
    ("path", "status", "form"), [("generate", 422, b'"error_type"'), ("v1/completions", 400, b'"message"')]
)
async def test_garbage_in_a_body_is_refused_by_who_reads_it(
    address: tuple[str, int], pause: float, path: str, status: int, form: bytes
) -> None:
    async with connection(address) as (reader, writer):
        head = HEAD.replace(b"/generate", b"/" + path.encode())
        writer.write(head + b"x-request-id: bad\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(pause)  # the endpoint waits for the rest
        writer.write(b"zz\r\n" + b"z" * 100_000)
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"a chunk is broken" in answer
        assert form in answer
        assert b"x-request-id: bad" in answer
        assert b"connection: close" in answer
        assert answer.count(b"\r\n\r\n") == 1


async def test_garbage_in_a_second_body_spares_the_first(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    generate_lane.pause_seconds = 0.2
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b'Content-Length: 15\r\n\r\n{"inputs": "y"}')
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1 422 ") == 1
        assert answer.count(b"\r\n\r\n") == 2


async def test_garbage_in_a_body_behind_its_answer_is_not_answered(address: tuple[str, int]) -> None:
    async with connection(address) as (reader, writer):
        head = HEAD.replace(b"application/json", b"image/png")
        writer.write(head + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"zz\r\n")
        assert b"HTTP/1.1" not in await rest(reader)


async def test_garbage_between_requests_spares_the_first(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    """As where a client counts its body a byte too short."""
    generate_lane.pause_seconds = 0.2
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b'Content-Length: 15\r\n\r\n{"inputs": "y"}}')
        await asyncio.sleep(0.1)
        writer.write(b"}" * 1000)
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer
        assert answer.count(b"HTTP/1.1") == 1


async def test_half_a_request_in_waiting_does_not_cut_off_the_answer(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    generate_lane.pause_seconds = 0.2
    async with connection(address) as (reader, writer):
        content = b'{"inputs": "a", "parameters": {"max_new_tokens": 5}}'
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content + HEAD)
        answer = await reader.readuntil(b"}")
        assert b'"bcdef"' in answer
        dripping = asyncio.create_task(drip(writer, b"x: y\r\n"))
        assert await rest(reader) == b""
        dripping.cancel()


async def test_no_more_than_so_many_requests_wait_in_a_row(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    generate_lane.pause_seconds = 0.1
    async with connection(address) as (reader, writer):
        writer.write(HEAD + b'Content-Length: 15\r\n\r\n{"inputs": "y"}')
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        assert (await rest(reader)).count(b"HTTP/1.1 200 ") == 65


@pytest.mark.parametrize("content", [b'{"inputs": "a", "stream": true}', b'{"inputs": "a"}'])
async def test_who_leaves_with_a_request_in_waiting_ends_both(
    address: tuple[str, int],
    generate_lane: FakeDecodeLane,
    content: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    generate_lane.pause_seconds = 0.3
    async with connection(address) as (_, writer):
        writer.write((HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content) * 2)
        await until(lambda: bool(generate_lane.running))
        await asyncio.sleep(0.5)
    async with asyncio.timeout(2):
        await until(lambda: not generate_lane.running)
    await asyncio.sleep(0.1)
    assert len(generate_lane.submitted) == 1
    assert "exception" not in caplog.text


@pytest.mark.parametrize("together", [False, True])
async def test_an_offer_of_another_protocol_is_passed_over(
    address: tuple[str, int], *, together: bool
) -> None:
    """Java's client makes it with each request."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    content = b'{"inputs": "y"}'
    requests = [
        HEAD + offer + b"Content-Length: 15\r\n\r\n" + content,
        HEAD + offer + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + content + b"\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + offer + b"Content-Length: 0\r\n\r\n",
        HEAD + b"Connection: close\r\nContent-Length: 15\r\n\r\n" + content,
    ]
    async with connection(address) as (reader, writer):
        if together:
            writer.write(b"".join(requests))
        else:
            for byte in b"".join(requests):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
        answers = await rest(reader)
        assert answers.count(b"HTTP/1.1 200 ") == 5
        assert answers.count(b'{"generated_text":"z"}') == 3


async def test_an_unread_stream_is_cut_off(address: tuple[str, int], app: FastAPI) -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    app.mount("/endless", endless)
    async with connection(address) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /endless/ HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(20):
            await ended.wait()


async def test_above_the_limit_only_probes_are_answered(
    address: tuple[str, int], generate_lane: FakeDecodeLane
) -> None:
    """Three of three are taken, six at most are open at all."""
    generate_lane.pause_seconds = 30
    content = b'{"inputs": "a"}'
    taken = [await asyncio.open_connection(*address) for _ in range(3)]
    for _, writer in taken:
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    await until(lambda: len(generate_lane.running) == 3)
    async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}") as client:
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        refused = await client.post("/generate", json={"inputs": "a"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        for _, writer in taken:
            await close(writer)
        await until(lambda: not generate_lane.running)
        generate_lane.pause_seconds = 0.0
        assert (await client.post("/generate", json={"inputs": "a"})).status_code == 200


async def test_far_above_the_limit_connections_are_closed(address: tuple[str, int]) -> None:
    many = [await asyncio.open_connection(*address) for _ in range(10)]
    assert await asyncio.gather(*(rest(reader) for reader, _ in many)) == [b""] * 10
    for _, writer in many:
        await close(writer)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_a_limit_that_the_system_forbids_ends_the_start() -> None:
    with pytest.raises(SystemExit, match="max_connections is 1000000000: that takes 2000000200 open files"):
        make_room_for_connections(10**9)


class TestCors:
    @pytest.fixture
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(make_settings(cors_origins="http://a.test http://b.test"), load_fakes)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    async def test_named_origins_may_call_and_read_errors(self, client: httpx.AsyncClient) -> None:
        for origin in ("http://a.test", "http://b.test"):
            for answer in (
                await client.post("/generate", json={"inputs": "a"}, headers={"origin": origin}),
                await client.post("/generate", content=b"{", headers={"origin": origin}),
            ):
                assert answer.headers["access-control-allow-origin"] == origin
                assert "retry-after" in answer.headers["access-control-expose-headers"]

    async def test_others_may_not(self, client: httpx.AsyncClient) -> None:
        answer = await client.get("/health", headers={"origin": "http://c.test"})
        assert "access-control-allow-origin" not in answer.headers

    async def test_preflights(self, client: httpx.AsyncClient) -> None:
        asks = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
        }
        yes = await client.options("/generate", headers=asks | {"origin": "http://a.test"})
        assert (yes.status_code, yes.json()) == (200, {"status": "ok"})
        assert yes.headers["access-control-allow-origin"] == "http://a.test"
        no = await client.options("/generate", headers=asks | {"origin": "http://c.test"})
        assert (no.status_code, no.json()["error_type"]) == (403, "forbidden")
        assert "access-control-allow-origin" not in no.headers
