"""How the time of a step grows with rows, context and vocabulary, and memory with context.

    python -m benchmarks.growth                       two minutes on two cores
    python -m benchmarks.growth --parts context --device cuda
    python -m benchmarks.growth --quick               half a minute

Random weights, 256 wide, 6 layers; the engine's own lane, turn by turn. Memory: two processes fill every row
of their caches, one with few rows and one with many; what the second holds more is divided by its tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.arguments import add_device, add_settings, check_device, command_line, make_parser
from benchmarks.machine import head
from benchmarks.steps import Driver, load_lane
from benchmarks.table import Table, spread
from benchmarks.workload import TINY, decoder_config, make_folder, random_prompts
from model.config import TransformerConfig

SIZES: dict[str, object] = {"d_model": 256, "n_heads": 4, "d_ff": 1024, "n_decoder_layers": 6}
VOCABULARY, CONTEXT = 16_000, 64


def cache_bytes_per_token(config: TransformerConfig, itemsize: int) -> int:
    """The formula: a key and a value for each layer and each key/value head."""
    return 2 * config.n_decoder_layers * config.kv_heads * config.head_dim * itemsize


def step_times(
    config: TransformerConfig, points: Iterable[tuple[int, int]], arguments: argparse.Namespace
) -> list[list[float]]:
    """For each (rows, context tokens) the seconds of a step, once a round."""
    points = list(points)
    settings = own_settings(arguments) | {"generate_slots": max(rows for rows, _ in points)}
    with tempfile.TemporaryDirectory() as scratch:
        lane = load_lane("generate", make_folder(Path(scratch) / "model", config), settings)
    driver = Driver(lane, arguments.device)
    found = []
    for rows, context in points:
        prompts = random_prompts(config.vocab_size, rows, context)
        found.append(driver.step_seconds(prompts, arguments.steps, arguments.rounds))
    return found


def own_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the lane is made with."""
    given = dict(arguments.settings)
    return {"device": arguments.device, "n_threads": arguments.threads, **given}


def report(axis: str, values: list[int], rows: list[int], times: list[list[float]]) -> None:
    """A table along one axis."""
    table = Table(axis, "step, ms", "per token, ms", "step to the first one")
    first = median(times[0])
    for value, n, seconds in zip(values, rows, times, strict=True):
        per_token = f"{1000 * median(seconds) / n:.3f}"
        step = spread([1000 * s for s in seconds], 3)
        table.row(value, step, per_token, f"{median(seconds) / first:.2f}")
    print()


def measure_rows(sizes: dict[str, object], arguments: argparse.Namespace) -> None:
    """Time against the number of rows, at a short context."""
    rows = arguments.rows
    times = step_times(decoder_config(**sizes), [(n, CONTEXT) for n in rows], arguments)
    report("rows", rows, rows, times)


def measure_context(sizes: dict[str, object], arguments: argparse.Namespace) -> None:
    """Time against the length of the context, at a few rows."""
    longest = max(arguments.contexts)
    margin = 8 + arguments.steps * arguments.rounds
    config = decoder_config(**(sizes | {"max_len": longest + margin}))
    times = step_times(config, [(4, length) for length in arguments.contexts], arguments)
    report("context in tokens, 4 rows", arguments.contexts, [4] * len(times), times)


def measure_vocabulary(sizes: dict[str, object], arguments: argparse.Namespace) -> None:
    """Time against the size of the vocabulary, at a few rows and a short context."""
    times = []
    for vocab_size in arguments.vocabularies:
        config = decoder_config(**(sizes | {"vocab_size": vocab_size}))
        times += step_times(config, [(4, CONTEXT)], arguments)
    report("vocabulary, 4 rows", arguments.vocabularies, [4] * len(times), times)


def measure_memory(sizes: dict[str, object], arguments: argparse.Namespace) -> None:
    """What a token of context takes, beside the formula."""
    few, many = 1, 1 + arguments.memory_rows
    config = decoder_config(**(sizes | {"max_len": arguments.memory_context}))
    settings = own_settings(arguments) | {"prefill_tokens": arguments.memory_context}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "model", config)
        small, large = (held_bytes(folder, config, settings, n) for n in (few, many))
    n_tokens = arguments.memory_rows * arguments.memory_context
    formula = cache_bytes_per_token(config, 2 if arguments.device == "cuda" else 4)
    table = Table("context", "rows", "held more, MiB", "bytes a token", "formula", "ratio")
    measured = (large - small) / n_tokens
    held = f"{(large - small) / 2**20:.1f}"
    table.row(
        arguments.memory_context,
        f"{few} and {many}",
        held,
        f"{measured:.0f}",
        formula,
        f"{measured / formula:.3f}",
    )
    print()


def held_bytes(folder: Path, config: TransformerConfig, settings: dict[str, Any], n_rows: int) -> int:
    """What a process holds that has filled all its rows: resident, or allocated on the GPU."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, folder, config, settings | {"generate_slots": n_rows}, n_rows)
    process = context.Process(target=_fill_and_tell, args=arguments)
    process.start()
    theirs.close()
    try:
        return int(ours.recv())
    finally:
        process.join()


def _fill_and_tell(
    pipe: Connection, folder: Path, config: TransformerConfig, settings: dict[str, Any], n_rows: int
) -> None:
    driver = Driver(load_lane("generate", folder, settings), settings["device"])
    prompts = random_prompts(config.vocab_size, n_rows, config.max_len - 4)
    sequences, _ = driver.fill(prompts, 4)
    pipe.send(torch.cuda.memory_allocated() if settings["device"] == "cuda" else resident_bytes())
    driver.drop(sequences)


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


PARTS = {
    "rows": measure_rows,
    "context": measure_context,
    "vocabulary": measure_vocabulary,
    "memory": measure_memory,
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_device(parser)
    add_settings(parser)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--contexts", type=int, nargs="+", default=[64, 256, 1024, 2048, 4000])
    add("--vocabularies", type=int, nargs="+", default=[1000, 4000, 16_000, 32_000, 64_000])
    add("--memory-rows", type=int, default=32)
    add("--memory-context", type=int, default=1024)
    add("--steps", type=int, default=16, help="steps of a round")
    add("--rounds", type=int, default=3)
    add("--tiny", action="store_true", help="a tiny model, to see that the command works")
    add("--quick", action="store_true", help="few points, one round")
    arguments = parser.parse_args(words)
    check_device(arguments.device)
    if arguments.quick or arguments.tiny:
        arguments.rows, arguments.contexts, arguments.vocabularies = [1, 8], [64, 256], [1000, 4000]
        arguments.rounds, arguments.steps, arguments.memory_rows = 1, 4, 16
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    sizes: dict[str, object] = {"vocab_size": VOCABULARY, **SIZES}
    if arguments.tiny:
        sizes = TINY | {"n_decoder_layers": 2}
    notes = (
        f"{arguments.threads} threads; settings: {dict(arguments.settings) or 'defaults'}",
        f"{arguments.rounds} rounds of {arguments.steps} steps: median (least to greatest)",
        f"where not said otherwise: {', '.join(f'{k} {v}' for k, v in sizes.items())}, context {CONTEXT}",
    )
    print(head(command_line("growth", words), notes=notes))
    measures = dict(
        zip(PARTS, (measure_rows, measure_context, measure_vocabulary, measure_memory), strict=True)
    )
    for part in arguments.parts:
        print(f"**{part}**\n")
        measures[part](sizes, arguments)


if __name__ == "__main__":
    main()
