"""What batching across clients is worth: the same requests by one client, then by several at once.

    python -m benchmarks.concurrency --url http://127.0.0.1:8000 --clients 1 4 16

Every client count does the same work in the same run; the last column is the ratio to the first one.
Times of a shared machine vary: read the ratios, and run it twice.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import median

import httpx

SUBJECTS = ("I", "My friend", "The teacher", "Our neighbour", "She", "The doctor", "He", "My sister")
ACTIONS = ("opened the window", "went home early", "bought two apples", "read a long letter")
TIMES = ("yesterday", "in the morning", "before lunch", "after the meeting")

Call = Callable[[httpx.AsyncClient, int], Awaitable[httpx.Response]]


def sentence(number: int) -> str:
    """One of 128 plain sentences."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    action = ACTIONS[number // len(SUBJECTS) % len(ACTIONS)]
    return f"{subject} {action} {TIMES[number // 32 % len(TIMES)]}."


def translate(client: httpx.AsyncClient, number: int) -> Awaitable[httpx.Response]:
    return client.post("/translate", json={"inputs": sentence(number)})


def fill_mask(client: httpx.AsyncClient, number: int) -> Awaitable[httpx.Response]:
    masked = sentence(number).rsplit(" ", 1)[0] + " [MASK]."
    return client.post("/fill-mask", json={"inputs": masked})


def generate(client: httpx.AsyncClient, number: int) -> Awaitable[httpx.Response]:
    parameters = {"max_new_tokens": 32, "repetition_penalty": 1.0}
    return client.post("/generate", json={"inputs": sentence(number), "parameters": parameters})


CALLS: dict[str, Call] = {"translate": translate, "fill-mask": fill_mask, "generate": generate}


async def measure(url: str, call: Call, n_clients: int, n_requests: int) -> tuple[float, float]:
    """Requests per second and the median latency in seconds, with so many clients at a time."""
    latencies: list[float] = []
    numbers = iter(range(n_requests))

    async def one_client(client: httpx.AsyncClient) -> None:
        for number in numbers:
            started = time.perf_counter()
            (await call(client, number)).raise_for_status()
            latencies.append(time.perf_counter() - started)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one_client(client) for _ in range(n_clients)))
        return n_requests / (time.perf_counter() - started), median(latencies)


async def run(arguments: argparse.Namespace) -> None:
    print("| endpoint | clients | requests/s | median latency (ms) | throughput, ratio to the first row |")
    print("|---|---|---|---|---|")
    for name in arguments.endpoints:
        await measure(arguments.url, CALLS[name], 1, 4)  # warm
        first = 0.0
        for n_clients in arguments.clients:
            rate, latency = await measure(arguments.url, CALLS[name], n_clients, arguments.requests)
            first = first or rate
            print(f"| {name} | {n_clients} | {rate:.1f} | {1000 * latency:.0f} | {rate / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--endpoints", nargs="+", choices=sorted(CALLS), default=list(CALLS))
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
