"""The service over HTTP, a real process under load from another process, beside its engine without HTTP.

    python -m benchmarks.serve                        everything on the shipped weights, some minutes
    python -m benchmarks.serve --parts closed --clients 1 32 --tasks generate
    python -m benchmarks.serve --parts long           one 2,000-token prompt among 32 streams
    python -m benchmarks.serve --quick                a minute: few clients, few requests

closed  so many clients, each sending its next request when the last one is answered; the same requests put
        into the bare engine (same settings, another process, same number at a time) for what HTTP costs
open    requests at a fixed rate, whatever is still under way; latencies count from the due time
mixed   the three endpoints at once
examples  translations of a hundred everyday sentences, and fillings of everyday sentences with a mask, with
        and without known texts that are like them, in turn, by so many clients; everything else does without,
        as the bare engine does
long    streams that run alone, then with one long prompt coming in; random weights, which know long contexts

Generations are streamed, and all of full length: the end token's row of the shipped weights is zeroed.
Every answer is counted; one that is no 200 is a failure and shows in the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arguments import add_settings, command_line, make_parser
from benchmarks.concurrency import sentence
from benchmarks.contestants import Loop, Remote
from benchmarks.load import Answer, Call, Results
from benchmarks.machine import head, n_cores
from benchmarks.server import ROOT, send, serving
from benchmarks.table import Table, percentile, spread
from benchmarks.workload import (
    SHIPPED,
    TINY,
    decoder_config,
    make_endless,
    make_folder,
    random_prompts,
)
from model.tokenizer import Tokenizer

TASKS = ("generate", "translate", "fill-mask")
SHARES = (0.5, 0.95, 0.99)
# What examples do not hold (of sentences with a mask, few as they would be filled).
EVERYDAY = {
    "translate": ROOT / "model/training/texts/everyday.tsv",
    "fill-mask": ROOT / "model/training/texts/cloze.tsv",
}
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
LONG, LONG_PROMPT, LONG_CONTEXT = "long", 2000, 4096
# The shipped generation model's sizes, with a longer context.
SMALL: dict[str, object] = {
    "vocab_size": 16_000,
    "d_model": 256,
    "n_heads": 4,
    "d_ff": 1024,
    "n_decoder_layers": 6,
}


def text(task: str, number: int) -> str:
    """The input of a request: the same number is the same text, also to the bare engine."""
    return sentence(number).rsplit(" ", 1)[0] + " [MASK]." if task == "fill-mask" else sentence(number)


def call(task: str, number: int, n_new: int, at: float = 0.0, sampling: dict[str, Any] | None = None) -> Call:
    """The request of a number; sampling is what a generation draws by, nothing means greedy."""
    parameters: dict[str, dict[str, Any]] = {
        "fill-mask": {"top_k": 5, "examples": 0},
        "translate": {"tgt_lang": "ko", "num_beams": 4, "max_new_tokens": n_new, "examples": 0},
        # As the bare engine is asked: without the penalty that the model has of its own.
        "generate": {"max_new_tokens": n_new, "repetition_penalty": 1.0} | (sampling or {}),
    }
    body: dict[str, Any] = {"inputs": text(task, number), "parameters": parameters[task]}
    if task == "generate":
        body["stream"] = True
    return Call(f"/{task}", json.dumps(body), at)


def milliseconds(values: list[float]) -> str:
    """p50 / p95 / p99 of seconds, in milliseconds."""
    if not values:
        return ""
    return " / ".join(f"{1000 * percentile(values, share):.1f}" for share in SHARES)


def gaps(answer: Answer, since: float = 0.0) -> list[float]:
    """Seconds between the events of a stream that came after a moment."""
    pairs = zip(answer.events, answer.events[1:], strict=False)
    return [after - before for before, after in pairs if after >= since]


class LoadFailed(Exception):
    """Requests were not answered as asked; the message says how many, and with what."""


class Report:
    """A table over runs: a row a run and endpoint."""

    def __init__(self) -> None:
        self._table = Table(
            *("load", "endpoint", "requests/s", "tokens/s", "first token, ms", "between tokens, ms"),
            *("whole request, ms", "failures", "client's CPU", "server's CPU, ms", "bare engine"),
        )

    def add(self, load: str, results: Results, bare: str = "") -> None:
        """One row an endpoint of a run; times are p50 / p95 / p99."""
        for path in dict.fromkeys(answer.path for answer in results.answers):
            answers = [answer for answer in results.answers if answer.path == path]
            good = [answer for answer in answers if answer.status == 200 and not answer.error]
            n_tokens = sum(answer.n_tokens for answer in good)
            self._table.row(
                load,
                path,
                f"{len(good) / results.seconds:.1f}",
                f"{n_tokens / results.seconds:.0f}" if n_tokens else "",
                milliseconds([answer.events[0] - answer.sent for answer in good if answer.events]),
                milliseconds([gap for answer in good for gap in gaps(answer)]),
                milliseconds([answer.ended - answer.sent for answer in good]),
                failures(answers),
                f"{100 * results.cpu_seconds / results.seconds:.0f}%",
                server_cost(results),
                bare,
            )


def server_cost(results: Results) -> str:
    """Processor time of the whole server a request, and an event of its streams."""
    cost, n_events = 1000 * results.server_cpu_seconds, sum(len(each.events) for each in results.answers)
    each = f"{cost / len(results.answers):.2f} a request"
    return f"{each}, {cost / n_events:.3f} an event" if n_events else each


def failures(answers: list[Answer]) -> str:
    """How many were not answered as asked, and with what."""
    bad = [answer for answer in answers if answer.status != 200 or answer.error]
    kinds = sorted({f"{answer.status or ''} {answer.error[:60]}".strip() for answer in bad})
    return f"{len(bad)}: {'; '.join(kinds)}" if bad else "0"


def check(results: Results) -> None:
    """Raises `LoadFailed` unless everything was answered, with events."""
    found = failures(results.answers)
    if found != "0" or not all(answer.events for answer in results.answers):
        raise LoadFailed(f"failures: {found}")


def closed(port: int, settings: dict[str, str], report: Report, arguments: argparse.Namespace) -> None:
    """Closed loop over HTTP and in the bare engine in turn; the table has the first round over HTTP."""
    for task in arguments.tasks:
        bare = Remote("bare engine", "bare", ROOT, {"task": task, "settings": settings})
        try:
            for n in arguments.clients:
                numbers = range(max(arguments.requests, 2 * n))
                sampling = SAMPLING if arguments.sampled else {}
                calls = [call(task, number, arguments.new, sampling=sampling) for number in numbers]
                texts = [text(task, number) for number in numbers]
                send(port, calls[:n], n)  # warm
                bare.loop(texts[:n], n, arguments.new, sampling)
                rounds = [
                    (send(port, calls, n), bare.loop(texts, n, arguments.new, sampling))
                    for _ in range(arguments.rounds)
                ]
                report.add(f"closed, {n} clients", rounds[0][0], http_cost(rounds))
        finally:
            bare.close()


def http_cost(rounds: list[tuple[Results, Loop]]) -> str:
    """Throughput over HTTP as a share of the bare engine's, and what the median request takes longer."""
    shares = [bare.seconds / results.seconds for results, bare in rounds]
    rates = [len(bare.latencies) / bare.seconds for _, bare in rounds]
    added = [
        1000 * (median(a.ended - a.sent for a in results.answers) - median(bare.latencies))
        for results, bare in rounds
    ]
    cost = f"{median(rates):.1f} requests/s; HTTP has {spread([100 * share for share in shares], 0)}% of it"
    cost += f", adds {spread(added, 1)} ms"
    n_tokens = sum(answer.n_tokens for answer in rounds[0][0].answers)
    return cost if n_tokens == rounds[0][1].n_tokens else f"{cost}; OTHER TOKENS: {rounds[0][1].n_tokens}"


def open_loop(port: int, report: Report, arguments: argparse.Namespace) -> None:
    """A fixed rate: the one that is asked for, or 6 in 10 of what 32 clients get at most."""
    for task in arguments.tasks:
        rate = arguments.rate
        if rate is None:
            warm = send(port, [call(task, number, arguments.new) for number in range(64)], 32)
            rate = 0.6 * len(warm.answers) / warm.seconds
        n = max(arguments.requests, int(10 * rate)) if not arguments.quick else arguments.requests
        calls = [call(task, number, arguments.new, number / rate) for number in range(n)]
        report.add(f"open, {rate:.1f} a second", send(port, calls))


def mixed(port: int, report: Report, arguments: argparse.Namespace) -> None:
    """All three endpoints in turn, from 24 clients."""
    calls = [call(TASKS[number % 3], number // 3, arguments.new) for number in range(3 * arguments.requests)]
    report.add("mixed, 24 clients", send(port, calls, min(24, len(calls))))


def examples(port: int, report: Report, arguments: argparse.Namespace) -> None:
    """What reading examples costs over HTTP; the table has the first round with them."""
    for task in (task for task in EVERYDAY if task in arguments.tasks):
        texts = [line.split("\t")[1] for line in EVERYDAY[task].read_text(encoding="utf-8").splitlines()]
        without, with_them = (
            [Call(f"/{task}", json.dumps({"inputs": text, "parameters": parameters})) for text in texts]
            for parameters in ({"examples": 0}, {})
        )
        for n in arguments.clients:
            send(port, with_them[:n], n)  # warm
            rounds = [(send(port, without, n), send(port, with_them, n)) for _ in range(arguments.rounds)]
            shares = [100 * off.seconds / on.seconds for off, on in rounds]
            added = [1000 * (_median_seconds(on) - _median_seconds(off)) for off, on in rounds]
            cost = f"{spread(shares, 0)}% of the requests without examples, adds {spread(added, 1)} ms"
            report.add(f"examples, {n} clients", rounds[0][1], cost)


def _median_seconds(run: Results) -> float:
    seconds: float = median(answer.ended - answer.sent for answer in run.answers)
    return seconds


def long_prompt(folder: Path, settings: dict[str, str], arguments: argparse.Namespace) -> None:
    """How far the gaps of running streams stretch when a long prompt comes in. Raises `LoadFailed`."""
    n, vocab_size = arguments.streams, Tokenizer.load(folder).vocab_size
    own = {"generate_model": str(folder), "generate_slots": str(n + 1), "max_new_tokens": "1024"}
    *prompts, other, long = random_prompts(vocab_size, n + 2, arguments.long)
    streams = [completion(prompt[:16], arguments.stream_tokens) for prompt in prompts]
    table = Table(
        *("streams", "long prompt", "gaps p50 / p95 / p99, ms", "longest gap, ms"),
        *("p99 over the quiet p99", "first token of the long one, ms"),
    )
    with serving(settings | own) as port:
        send(port, streams)  # warm
        quiet = send(port, streams)
        check(quiet)
        started = max(answer.events[0] for answer in quiet.answers)
        at = started + 0.25 * (quiet.seconds - started)
        send(port, [completion(other, 4)])  # warm; another prompt, for beginnings may be kept
        loaded = send(port, [*streams, completion(long, 4, at)])
    check(loaded)
    *answers, long_one = loaded.answers
    # The same part of both runs: from the moment at which the long prompt comes in.
    before = [gap for answer in quiet.answers for gap in gaps(answer, at)]
    after = [gap for answer in answers for gap in gaps(answer, at)]
    if not before or not after:
        raise LoadFailed("the streams had ended when the long prompt came in: give them more tokens")
    ratio = percentile(after, 0.99) / percentile(before, 0.99)
    first = f"{1000 * (long_one.events[0] - long_one.sent):.0f}"
    table.row(n, "no", milliseconds(before), f"{1000 * max(before):.1f}", "", "")
    longest = f"{1000 * max(after):.1f}"
    table.row(n, f"{arguments.long} tokens", milliseconds(after), longest, f"{ratio:.2f}", first)


def completion(prompt: list[int], n_new: int, at: float = 0.0) -> Call:
    """A streamed completion of a prompt of ids, whose length is exact."""
    body = {"model": LONG, "prompt": prompt, "max_tokens": n_new, "temperature": 0, "stream": True}
    return Call("/v1/completions", json.dumps(body), at)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_settings(parser)
    parts = ["closed", "open", "mixed", "examples", "long"]
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=parts)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    add("--requests", type=int, default=64, help="requests of a run, at least two for each client")
    add("--rounds", type=int, default=3, help="of closed loop and bare engine in turn")
    add("--new", type=int, default=32, help="most new tokens of a generation")
    add("--sampled", action="store_true", help=f"closed loop: generations drawn by {SAMPLING}, not greedy")
    add("--rate", type=float, help="requests a second of the open loop")
    add("--streams", type=int, default=32, help="streams that a long prompt joins")
    add("--stream-tokens", type=int, default=96, help="tokens of each of them")
    add("--long", type=int, default=LONG_PROMPT, help="tokens of the long prompt")
    add("--tiny", action="store_true", help="a tiny random model for the long prompt, to see that it works")
    add("--quick", action="store_true", help="1 and 8 clients, 16 requests, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.clients, arguments.requests, arguments.rounds = [1, 8], 16, 1
        arguments.streams, arguments.stream_tokens = 8, 48
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    settings = dict(arguments.settings)
    notes = (
        f"server, load generator and bare engine are three processes on the same {n_cores()} cores",
        "client's CPU: what the load generator took of one of them; server's CPU: all of its threads",
        f"settings: {settings or 'defaults'}; streamed generations of {arguments.new} tokens, beam 4",
        "times are p50 / p95 / p99; first token and whole request count from the sending of the request",
    )
    print(head(command_line("serve", words), "fastapi", "uvicorn", notes=notes))
    with tempfile.TemporaryDirectory() as scratch:
        if set(arguments.parts) - {"long"}:
            endless = make_endless(SHIPPED["generate"], Path(scratch) / "generate")
            shipped_weights({"generate_model": str(endless)} | settings, arguments)
        if "long" in arguments.parts:
            sizes = TINY if arguments.tiny else SMALL
            folder = make_folder(Path(scratch) / LONG, decoder_config(**sizes, max_len=LONG_CONTEXT))
            long_prompt(folder, settings, arguments)


def shipped_weights(settings: dict[str, str], arguments: argparse.Namespace) -> None:
    """The parts that one server does."""
    report = Report()
    with serving(settings) as port:
        if "closed" in arguments.parts:
            closed(port, settings, report, arguments)
        if "open" in arguments.parts:
            open_loop(port, report, arguments)
        if "mixed" in arguments.parts:
            mixed(port, report, arguments)
        if "examples" in arguments.parts:
            examples(port, report, arguments)
    print()


if __name__ == "__main__":
    main()
