"""Ten times what the service can do, arriving whether it answers or not: who is served, who is sent away?

    python -m benchmarks.burst --url http://127.0.0.1:8000 --endpoint translate --seconds 20

First a closed loop of a few clients finds the capacity; then requests come at a multiple of it, each on its
own, while /health, /ready and /metrics are asked all the time. Served requests must be the only ones that are
not 429 or 503, every refusal must say when to come again, and what was accepted must not have waited
longer than `max_wait_seconds` promises (the report shows it; times of a shared machine vary).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from benchmarks.concurrency import CALLS, Call, measure

_PROBES = ("/health", "/ready", "/metrics")
_MAX_OPEN = 900  # connections of this client: a bound for its own memory, below the server's


@dataclass
class Outcome:
    """What came of the requests and the probes; times in seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    retry_after: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    n_silent: int = 0  # refusals without Retry-After
    n_unsent: int = 0  # the client itself had too many open

    @property
    def is_sound(self) -> bool:
        return set(self.statuses) <= {"200", "429", "503"} and not self.n_silent


async def send(http: httpx.AsyncClient, call: Call, number: int, outcome: Outcome) -> None:
    """One request, whatever comes of it."""
    started = time.perf_counter()
    try:
        response = await call(http, number)
    except httpx.HTTPError as error:
        outcome.statuses[type(error).__name__] += 1
        return
    outcome.statuses[str(response.status_code)] += 1
    if response.status_code == 200:
        outcome.accepted.append(time.perf_counter() - started)
    elif "retry-after-ms" in response.headers and "retry-after" in response.headers:
        outcome.retry_after.append(int(response.headers["retry-after-ms"]) / 1000)
    else:
        outcome.n_silent += 1


async def probe(http: httpx.AsyncClient, outcome: Outcome, stop: asyncio.Event) -> None:
    """Ask, time the answer, ask again."""
    while not stop.is_set():
        for path in _PROBES:
            started = time.perf_counter()
            response = await http.get(path)
            outcome.probes.append(time.perf_counter() - started)
            if response.status_code != 200:
                outcome.statuses[f"{path} {response.status_code}"] += 1
        await asyncio.sleep(0.1)


async def burst(url: str, call: Call, rate: float, seconds: float) -> Outcome:
    """`rate` requests a second for so long; returns when the last has its answer."""
    outcome, stop = Outcome(), asyncio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    watcher = httpx.AsyncClient(base_url=url, timeout=60)
    async with watcher, httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        probing = asyncio.create_task(probe(watcher, outcome, stop))
        started, sent = time.perf_counter(), 0
        async with asyncio.TaskGroup() as group:
            n_open: set[asyncio.Task[None]] = set()
            while (now := time.perf_counter() - started) < seconds:
                while sent < now * rate:
                    sent += 1
                    if len(n_open) >= _MAX_OPEN:
                        outcome.n_unsent += 1
                        continue
                    task = group.create_task(send(http, call, sent, outcome))
                    n_open.add(task)
                    task.add_done_callback(n_open.discard)
                await asyncio.sleep(0.005)
        stop.set()
        await probing
    return outcome


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def report(capacity: float, factor: float, outcome: Outcome) -> None:
    """Print it as a table."""
    print(f"capacity {capacity:.1f} requests/s; offered {factor:g} times that\n")
    print("| | count | median | 99% | slowest |\n|---|---|---|---|---|")
    for name, values in (
        ("accepted, latency (s)", outcome.accepted),
        ("refused, Retry-After (s)", outcome.retry_after),
        ("probes, latency (s)", outcome.probes),
    ):
        marks = " | ".join(f"{quantile(values, share):.3f}" for share in (0.5, 0.99, 1.0))
        print(f"| {name} | {len(values)} | {marks} |")
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items()))
    print(
        f"\nanswers {counts}; refusals that do not say when: {outcome.n_silent}; unsent: {outcome.n_unsent}"
    )


async def run(arguments: argparse.Namespace) -> bool:
    call = CALLS[arguments.endpoint]
    await measure(arguments.url, call, 1, 4)  # warm
    capacity, _ = await measure(arguments.url, call, 16, 96)
    outcome = await burst(arguments.url, call, arguments.factor * capacity, arguments.seconds)
    report(capacity, arguments.factor, outcome)
    return outcome.is_sound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--endpoint", choices=sorted(CALLS), default="translate")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
