"""The load: a process of its own that sends requests and notes when what came back. No dependencies.

    python -m benchmarks.load < plan.json > results.json

Raw streams in place of a client library, and no JSON decoded per token: on a machine with few cores a heavy
client would measure itself. Its own use of the processor is part of the result.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request: what to post where, and when to send it, in seconds from the start (open loop only)."""

    path: str
    body: str
    at: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Calls for `n_clients` at a time that each send the next as soon as theirs is answered (closed loop), or
    each at its own time whatever is still under way (open loop, `n_clients` 0)."""

    port: int
    calls: list[Call]
    n_clients: int = 0
    host: str = "127.0.0.1"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**(values | {"calls": [Call(**call) for call in values["calls"]]}))


@dataclass
class Answer:
    """What came back, in seconds from the start of the run. Status 0: no answer, `error` says why."""

    path: str
    sent: float
    status: int = 0
    ended: float = 0.0
    n_tokens: int = 0
    events: list[float] = field(default_factory=list)  # arrivals of a stream's events
    error: str = ""


@dataclass(frozen=True)
class Results:
    """A run's answers in the order of their calls, its length, and the processor seconds of this process.

    And those of the server, from whoever starts the run.
    """

    answers: list[Answer]
    seconds: float
    cpu_seconds: float
    server_cpu_seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        return cls(**(values | {"answers": [Answer(**answer) for answer in values["answers"]]}))


class Connection:
    """One kept-alive connection, one request at a time."""

    def __init__(self, plan: Plan, clock: float) -> None:
        self._plan, self._zero = plan, clock
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, call: Call, sent: float | None = None) -> Answer:
        """Post and read to the end. `sent` is when it should have been sent, if not now."""
        answer = Answer(call.path, self._now() if sent is None else sent)
        try:
            await self._post(call)
            await self._read(answer)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
            self.close()
        answer.ended = self._now()
        return answer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    async def _post(self, call: Call) -> None:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                self._plan.host, self._plan.port, limit=2**22
            )
        body = call.body.encode()
        head = (
            f"POST {call.path} HTTP/1.1\r\nHost: {self._plan.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def _read(self, answer: Answer) -> None:
        assert self._reader is not None
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            await self._read_chunks(self._reader, answer)
        else:
            content = await self._reader.readexactly(int(headers.get("content-length", "0")))
            if status != 200:
                answer.error = content.decode(errors="replace")[:200]
        answer.n_tokens = len(answer.events) or int(headers.get("x-generated-tokens", "0"))
        answer.status = status
        if headers.get("connection") == "close":
            self.close()

    async def _read_chunks(self, reader: asyncio.StreamReader, answer: Answer) -> None:
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            if chunk.startswith(b"data: [DONE]"):
                continue
            if b'"error"' in chunk:
                answer.error = chunk.decode(errors="replace")[:200]
            n_events = chunk.count(b"\ndata:") + chunk.startswith(b"data:")
            answer.events += [self._now()] * n_events
        await reader.readline()


async def run(plan: Plan) -> Results:
    """Send everything; returns when the last answer is there."""
    answers: list[Answer | None] = [None] * len(plan.calls)
    started, cpu = time.perf_counter(), time.process_time()

    async def client(numbers: Iterator[int]) -> None:
        connection = Connection(plan, started)
        for number in numbers:
            answers[number] = await connection.send(plan.calls[number])
        connection.close()

    async def lone(number: int, idle: list[Connection]) -> None:
        at = plan.calls[number].at
        await asyncio.sleep(started + at - time.perf_counter())
        connection = idle.pop() if idle else Connection(plan, started)
        answers[number] = await connection.send(plan.calls[number], at)
        idle.append(connection)

    if plan.n_clients:
        numbers = iter(range(len(plan.calls)))
        await asyncio.gather(*(client(numbers) for _ in range(plan.n_clients)))
    else:
        idle: list[Connection] = []
        await asyncio.gather(*(lone(number, idle) for number in range(len(plan.calls))))
        for connection in idle:
            connection.close()
    found = [answer for answer in answers if answer is not None]
    assert len(found) == len(plan.calls)
    return Results(found, time.perf_counter() - started, time.process_time() - cpu)


def main() -> None:
    plan = Plan.from_dict(json.load(sys.stdin))
    gc.disable()  # a pause of the client is not one of the server
    json.dump(asdict(asyncio.run(run(plan))), sys.stdout)


if __name__ == "__main__":
    main()
