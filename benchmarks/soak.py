"""A mixed load with misbehaving clients for a given time: does the service stay whole, and what grows?

    python -m benchmarks.soak --minutes 30 [--clients 16] [-- --generate-slots 8 ...]

Starts a server of its own; what stands behind `--` is given to it. Every client does one thing after the
other, drawn from well-behaved requests of all routes and from bad manners: leaving before the answer or in
mid-stream, half a body, a dripping head, garbage, ten megabytes, streams that are never read. Once a minute
all come at once, ten times as many. The report: answers by status, probes' latencies under load, and the
slopes of resident memory, threads, open files and series in /metrics, by least squares over what was read
after the first fifth. Ends with 1 when something answered that should not have, or something leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median

import httpx

from benchmarks.concurrency import sentence

_EXPECTED = {200, 400, 401, 404, 405, 408, 413, 422, 429, 503}
_BURST_FACTOR, _BURST_SECONDS = 10, 60.0
_PROBES = ("/health", "/ready", "/metrics")
_SERIES = re.compile(r"^(?!#)\S", re.MULTILINE)
_BUSY = re.compile(r"^transformer_(?:rows_in_use|queue_items)\{[^}]*\} (\S+)", re.MULTILINE)
_HEAD = "POST {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\nContent-Length: {n}\r\n\r\n"


@dataclass
class Sample:
    """What was read at one time."""

    seconds: float
    rss_mib: float
    threads: int
    files: int
    series: int


@dataclass
class Diary:
    """What happened, and what was read meanwhile."""

    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    probe_seconds: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def note(self, kind: str, response: httpx.Response) -> None:
        """Count an answer; it must be an expected one, and an error must be JSON that says so."""
        self.answers[f"{kind} {response.status_code}"] += 1
        if response.status_code not in _EXPECTED:
            self.faults[f"{kind} answered {response.status_code}"] += 1
        if response.status_code in (429, 503) and "retry-after" not in response.headers:
            self.faults[f"{kind} refused without Retry-After"] += 1
        if response.status_code >= 400 and "error" not in response.json():
            self.faults[f"{kind} has an error that is no JSON"] += 1


@dataclass
class Visitor:
    """One client with a random generator of its own."""

    http: httpx.AsyncClient
    port: int
    random: random.Random
    diary: Diary

    def text(self) -> str:
        return " ".join(sentence(self.random.randrange(128)) for _ in range(self.random.randint(1, 3)))

    async def post(self, kind: str, path: str, **what: object) -> None:
        self.diary.note(kind, await self.http.post(path, **what))  # type: ignore[arg-type]

    async def translate(self) -> None:
        texts = [self.text() for _ in range(self.random.choice([1, 1, 1, 8]))]
        await self.post("translate", "/translate", json={"inputs": texts})

    async def libretranslate(self) -> None:
        await self.post("libretranslate", "/translate", data={"q": self.text(), "target": "ko"})

    async def fill(self) -> None:
        await self.post("fill-mask", "/fill-mask", json={"inputs": f"{self.text()} I [MASK] it."})

    async def pair(self) -> None:
        inputs = {"first": self.text(), "second": self.text()}
        await self.post("next-sentence", "/next-sentence", json={"inputs": inputs})

    async def generate(self) -> None:
        parameters = {"max_new_tokens": self.random.randint(1, 48), "do_sample": True, "seed": 1}
        await self.post("generate", "/generate", json={"inputs": self.text(), "parameters": parameters})

    async def stream(self) -> None:
        body = {"inputs": self.text(), "parameters": {"max_new_tokens": 24}}
        async with self.http.stream("POST", "/generate_stream", json=body) as response:
            await response.aread()
        self.diary.note("stream", response)

    async def complete(self) -> None:
        body = {"prompt": [self.text(), self.text()], "max_tokens": 16, "n": 2, "stream": True}
        await self.post("completions", "/v1/completions", json=body)

    async def tokenize(self) -> None:
        await self.post("tokenize", "/tokenize", json={"inputs": self.text()})

    async def ask(self) -> None:
        path = self.random.choice(["/info", "/v1/models", "/languages", "/nothing", "/translate", "/docs"])
        self.diary.note("ask", await self.http.get(path))

    async def err(self) -> None:
        bodies = (b"", b"{", b"\xff", b"[" * 100_000, b'{"inputs": 3}', b'{"inputs": "a", "x": 1}')
        headers = {"content-type": "application/json"}
        await self.post("err", "/generate", content=self.random.choice(bodies), headers=headers)

    async def overfill(self) -> None:
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # refused while still being sent
            await self.post("overfill", "/generate", content=b" " * 10_000_000)

    async def leave(self) -> None:
        """Before the answer, or in mid-stream."""
        body = {"inputs": self.text(), "parameters": {"max_new_tokens": 100}}
        path = self.random.choice(["/translate", "/generate_stream", "/generate"])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.random.uniform(0.0, 1.0)):
                if path == "/translate":
                    body = {"inputs": [self.text() for _ in range(16)]}
                await self.http.post(path, json=body)
        self.diary.answers["leave"] += 1

    async def mumble(self) -> None:
        """Bytes that are no request, or half of one, by drips or never read."""
        kind = self.random.choice(["garbage", "half a body", "drips", "unread"])
        body = json.dumps({"inputs": self.text(), "parameters": {"max_new_tokens": 200}}).encode()
        async with self._socket() as writer:
            if kind == "garbage":
                writer.write(self.random.randbytes(200) + b"\r\n\r\n")
            elif kind == "drips":
                for letter in "GET /health HTTP":
                    writer.write(letter.encode())
                    await asyncio.sleep(0.05)
            else:
                head = _HEAD.format(path="/generate_stream", n=len(body)).encode()
                writer.write(head + body[: len(body) // 2 if kind == "half a body" else None])
            await asyncio.sleep(self.random.uniform(0.0, 2.0))
        self.diary.answers[kind] += 1

    @contextlib.asynccontextmanager
    async def _socket(self) -> AsyncIterator[asyncio.StreamWriter]:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield writer
        finally:
            writer.transport.abort()

    async def act(self) -> None:
        """One thing; what goes wrong with it on the way is a fault."""
        deed = self.random.choices(*zip(*_DEEDS, strict=True))[0]
        try:
            await deed(self)
        except (httpx.HTTPError, OSError, ValueError) as error:
            self.diary.faults[f"{deed.__name__}: {type(error).__name__}"] += 1


_DEEDS: list[tuple[Callable[[Visitor], Awaitable[None]], int]] = [
    (Visitor.translate, 4),
    (Visitor.libretranslate, 2),
    (Visitor.fill, 4),
    (Visitor.pair, 2),
    (Visitor.generate, 4),
    (Visitor.stream, 3),
    (Visitor.complete, 2),
    (Visitor.tokenize, 2),
    (Visitor.ask, 2),
    (Visitor.err, 2),
    (Visitor.overfill, 1),
    (Visitor.leave, 4),
    (Visitor.mumble, 3),
]


async def visit(visitor: Visitor, until: float) -> None:
    """One deed after the other."""
    while time.monotonic() < until:
        await visitor.act()
        await asyncio.sleep(visitor.random.uniform(0.0, 0.1))


async def storm(visitors: list[Visitor], until: float) -> None:
    """Once a minute, ten times as many at once, without waiting for each other."""
    while time.monotonic() + _BURST_SECONDS < until:
        await asyncio.sleep(_BURST_SECONDS)
        await asyncio.gather(*(visitor.act() for visitor in visitors for _ in range(_BURST_FACTOR)))


async def watch(http: httpx.AsyncClient, pid: int, until: float, interval: float, diary: Diary) -> None:
    """Probe, time the answers, and read what the process holds."""
    started = time.monotonic()
    while time.monotonic() < until:
        text = ""
        for path in _PROBES:
            asked = time.perf_counter()
            response = await http.get(path)
            diary.probe_seconds.append(time.perf_counter() - asked)
            text = response.text
            if response.status_code != 200:
                diary.faults[f"{path} answered {response.status_code}"] += 1
        diary.samples.append(read_process(pid, time.monotonic() - started, len(_SERIES.findall(text))))
        await asyncio.sleep(interval)


def read_process(pid: int, seconds: float, series: int) -> Sample:
    """Of Linux' /proc."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    n_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(seconds, int(found["VmRSS"].split()[0]) / 1024, int(found["Threads"]), n_files, series)


async def rest(http: httpx.AsyncClient, diary: Diary) -> None:
    """When all have left, nothing may wait or run."""
    busy = 1.0
    for _ in range(60):
        text = (await http.get("/metrics")).text
        busy = sum(float(value) for value in _BUSY.findall(text))
        if busy == 0:
            return
        await asyncio.sleep(1.0)
    diary.faults[f"{busy:g} rows or items still in use a minute after the last client left"] += 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def serving(port: int, arguments: list[str], diary: Diary) -> AsyncIterator[Process]:
    """A server; at the end it must leave in order."""
    command = [sys.executable, "-m", "app", "--port", str(port), "--log-level", "error", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stderr=DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http, asyncio.timeout(600):
            while not await is_ready(http):
                if process.returncode is not None:
                    sys.exit(f"the server ended with {process.returncode}; start it by hand to see why")
                await asyncio.sleep(0.2)
        yield process
        process.terminate()
        code = await asyncio.wait_for(process.wait(), 60)
        if code != 0:
            diary.faults[f"the server ended with {code}"] += 1
    finally:
        if process.returncode is None:
            process.kill()


async def is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


def report(diary: Diary) -> None:
    """Print what came of it."""
    print("| answers | count |\n|---|---|")
    for name, count in sorted(diary.answers.items()):
        print(f"| {name} | {count} |")
    latencies = sorted(diary.probe_seconds)
    print(
        f"\nprobes under load: {len(latencies)}, median {1000 * median(latencies):.0f} ms, "
        f"99% {1000 * latencies[int(0.99 * (len(latencies) - 1))]:.0f} ms, "
        f"slowest {1000 * latencies[-1]:.0f} ms"
    )
    print("\n| | first | last | slope an hour |\n|---|---|---|---|")
    settled = diary.samples[len(diary.samples) // 5 :]
    for name in ("rss_mib", "threads", "files", "series"):
        values = [float(getattr(sample, name)) for sample in settled]
        slope = linear_regression([sample.seconds / 3600 for sample in settled], values).slope
        print(f"| {name} | {values[0]:.1f} | {values[-1]:.1f} | {slope:+.2f} |")
    print("\nfaults: " + (", ".join(f"{name} ({count})" for name, count in diary.faults.items()) or "none"))


async def run(arguments: argparse.Namespace) -> Diary:
    diary, port = Diary(), free_port()
    until = 0.0
    async with serving(port, arguments.server, diary) as process:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=180, limits=limits) as http,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as probe,
        ):
            visitors = [Visitor(http, port, random.Random(seed), diary) for seed in range(arguments.clients)]
            until = time.monotonic() + 60 * arguments.minutes
            watching = asyncio.create_task(watch(probe, process.pid, until, arguments.interval, diary))
            await asyncio.gather(*(visit(visitor, until) for visitor in visitors), storm(visitors, until))
            await watching
            await rest(probe, diary)
    return diary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two readings")
    parser.add_argument("server", nargs="*", help="arguments of the server, behind --")
    diary = asyncio.run(run(parser.parse_args()))
    report(diary)
    sys.exit(1 if diary.faults else 0)


if __name__ == "__main__":
    main()
