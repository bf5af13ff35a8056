"""The load generator against a server whose answers are known, and the command against real ones."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict

import pytest

from benchmarks import load, serve
from benchmarks.contestants import Bare, Loop
from benchmarks.load import Answer, Call, Plan, Results
from tests.tiny import TinyFolders

PAUSE = 0.02


async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """/stream: three events, the last two in one chunk; /whole: 7 tokens; /busy: refused; /dead: hangs up."""
    while True:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            break
        path = head.split(" ")[1]
        length = next(line for line in head.split("\r\n") if line.startswith("Content-Length"))
        assert json.loads(await reader.readexactly(int(length.split(":")[1])))["inputs"] == path
        if path == "/dead":
            break
        if path == "/stream":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for chunk in (b"data:{1}\n\n", b"data:{2}\n\ndata:{3}\n\n", b"data: [DONE]\n\n"):
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await asyncio.sleep(PAUSE)
            writer.write(b"0\r\n\r\n")
        else:
            status, body = ("429 Too Many", b"full") if path == "/busy" else ("200 OK", b"{}")
            headers = f"Content-Length: {len(body)}\r\nX-Generated-Tokens: 7\r\n\r\n"
            writer.write(f"HTTP/1.1 {status}\r\n{headers}".encode() + body)
    writer.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


def calls(*paths: str, every: float = 0.0) -> list[Call]:
    return [Call(path, json.dumps({"inputs": path}), every * i) for i, path in enumerate(paths)]


async def test_a_closed_loop_notes_what_came_back(port: int) -> None:
    results = await load.run(Plan(port, calls("/stream", "/whole", "/dead", "/busy", "/whole"), n_clients=2))
    stream, whole, dead, busy, last = results.answers
    assert [stream.status, whole.status, dead.status, busy.status, last.status] == [200, 200, 0, 429, 200]
    assert (stream.n_tokens, whole.n_tokens) == (3, 7)
    assert len(stream.events) == 3
    assert stream.events[1] - stream.events[0] >= PAUSE / 2
    assert stream.sent < stream.events[0] < stream.ended <= results.seconds
    assert dead.error
    assert busy.error == "full"
    assert serve.failures(results.answers).startswith("2: 429 full; ")


async def test_an_open_loop_counts_from_the_due_time(port: int) -> None:
    results = await load.run(Plan(port, calls("/whole", "/stream", "/whole", every=0.05)))
    assert [answer.sent for answer in results.answers] == pytest.approx([0.0, 0.05, 0.1])
    assert all(answer.status == 200 and answer.ended > answer.sent for answer in results.answers)
    assert results.seconds >= 0.1


def test_plans_and_results_cross_a_pipe() -> None:
    plan = Plan(1, calls("/a", "/b"), 2)
    assert Plan.from_dict(json.loads(json.dumps(asdict(plan)))) == plan
    results = Results([Answer("/a", 0.0, 200, 1.0, 2, [0.5, 1.0])], 1.0, 0.1)
    assert Results.from_dict(json.loads(json.dumps(asdict(results)))) == results


def test_gaps_and_what_http_costs() -> None:
    assert serve.gaps(Answer("/", 0.0, events=[1.0, 3.0, 6.0]), since=3.5) == [3.0]
    answers = [Answer("/", 0.0, 200, 0.25, 5), Answer("/", 1.0, 200, 1.25, 5)]
    cost = serve.http_cost([(Results(answers, 2.0, 0.0), Loop(1.0, [0.15, 0.15], 10))])
    assert cost == "2.0 requests/s; HTTP has 50% of it, adds 100.0 ms"
    assert serve.server_cost(Results(answers, 2.0, 0.0, 0.005)) == "2.50 a request"
    streams = [Answer("/", 0.0, 200, 0.25, 5, events=[0.1] * 5)]
    assert serve.server_cost(Results(streams, 2.0, 0.0, 0.005)) == "5.00 a request, 1.000 an event"
    assert "OTHER TOKENS: 9" in serve.http_cost([(Results(answers, 2.0, 0.0), Loop(1.0, [0.1], 9))])


def test_a_failure_ends_the_long_prompt() -> None:
    with pytest.raises(serve.LoadFailed, match="1: 429 full"):
        serve.check(Results([Answer("/", 0.0, 429, 1.0, error="full")], 1.0, 0.0))


@pytest.mark.parametrize("task", ["generate", "translate", "fill-mask"])
def test_the_bare_engine_does_the_same_requests(task: str, tiny_folders: TinyFolders) -> None:
    folders = {"generate": tiny_folders.generate, "translate": tiny_folders.translate}
    setting = f"{task.replace('-', '_')}_model"
    settings = {setting: str(folders.get(task, tiny_folders.fill_mask)), "n_threads": 1, "device": "cpu"}
    bare = Bare(tiny_folders.generate, task, settings)  # a folder without other models in it
    try:
        done = bare.loop([serve.text(task, number) for number in range(3)], 2, 4, {})
    finally:
        bare.close()
    assert len(done.latencies) == 3
    assert max(done.latencies) <= done.seconds
    assert (done.n_tokens > 0) == (task != "fill-mask")


@pytest.mark.slow
def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--parts", "long", "--streams", "2", "--stream-tokens", "80", "--long", "60"]
    serve.main([*words, "--settings", "n_threads=1", "device=cpu"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[-2:]] == ["no", "60 tokens"]
    quiet, stretched = (float(row[3]) for row in rows[-2:])
    assert float(rows[-1][4]) > 0.0 < min(quiet, stretched)
