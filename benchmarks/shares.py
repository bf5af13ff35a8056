"""Where the time of a step goes: torch's operations and the kernels by their share, and the rest, Python's.

    python -m benchmarks.shares --task generate --sequences 1 32
    python -m benchmarks.shares --task translate --weights shipped

The lane is driven turn by turn in this process under torch's profiler, which slows it down: the step's time
is taken without it, the shares with it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from app.engine.sequence import Sequence
from benchmarks.arguments import add_device, add_settings, check_device, command_line, make_parser
from benchmarks.contestants import make_sequence
from benchmarks.decode import NEW, PROMPT
from benchmarks.machine import head
from benchmarks.steps import Driver, load_lane
from benchmarks.table import Table
from benchmarks.workload import (
    SHIPPED,
    TINY,
    decoder_config,
    make_case,
    make_endless,
    make_folder,
    translator_config,
)
from model.kernels import Kernels

N_WARM, N_STEPS, N_OPERATIONS = 4, 12, 10
KERNELS = (
    *("run_blocks", "best_outputs", "best_listed", "select_outputs", "int8_linear"),
    *("self_attention", "stored_attention", "best_tokens"),
)


def shares(driver: Driver, sequences: list[Sequence]) -> tuple[float, dict[str, float], float]:
    """Seconds of a step, the share of each operation in a profiled one, and the share outside of them."""
    driver.lane.submit(sequences)
    driver.steps(N_WARM)
    seconds = median(driver.steps(1) for _ in range(N_STEPS))
    activities = [ProfilerActivity.CPU]
    if driver.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        whole = driver.steps(N_STEPS) * N_STEPS
    driver.drop(sequences)
    own: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        device = event.self_device_time_total if driver.device.type == "cuda" else event.self_cpu_time_total
        own[event.key] += device / 1e6 / whole
    return seconds, dict(own), 1.0 - sum(own.values())


def show_kernels(kernels: Kernels | None) -> None:
    """Have the profiler see the calls of kernels, which are none of torch's operations."""
    for name in () if kernels is None else KERNELS:
        if hasattr(kernels, f"_{name}"):  # those of 8 bits are not on every processor
            setattr(kernels, name, record_function(f"kernel {name}")(getattr(kernels, name)))


def make_folder_of(task: str, arguments: argparse.Namespace, scratch: Path) -> Path:
    """The random shape of `benchmarks.decode`, or the shipped weights."""
    tiny: dict[str, object] = TINY if arguments.tiny else {}
    if arguments.weights == "shipped" and not arguments.tiny:
        return make_endless(SHIPPED["generate"], scratch / task) if task == "generate" else SHIPPED[task]
    config = decoder_config(**tiny) if task == "generate" else translator_config(**tiny)
    return make_folder(scratch / task, config)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_device(parser)
    add_settings(parser)
    parser.add_argument("--task", choices=sorted(SHIPPED), default="generate")
    parser.add_argument("--weights", choices=["shapes", "shipped"], default="shapes")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the command works")
    arguments = parser.parse_args(words)
    check_device(arguments.device)
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    task, most = arguments.task, max(arguments.sequences)
    given = dict(arguments.settings)
    settings: dict[str, Any] = {"device": arguments.device, "n_threads": arguments.threads}
    settings |= {"generate_slots": most, "translate_slots": max(8, 4 * most)} | given
    notes = (
        f"{task}, weights: {arguments.weights}; {arguments.threads} threads; settings: {given or 'defaults'}",
    )
    print(head(command_line("shares", words), notes=notes))
    table = Table("sequences", "step, ms", "operations, share of the step", "outside of them")
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder_of(task, arguments, Path(scratch))
        driver = Driver(load_lane(task, folder, settings), arguments.device)
        show_kernels(driver.lane.runner.kernels)
        for n in arguments.sequences:
            case = make_case(task, folder, n, PROMPT[task], NEW[task], text=arguments.weights == "shipped")
            sequences = [make_sequence(case, prompt) for prompt in case.prompts]
            seconds, found, outside = shares(driver, sequences)
            largest = sorted(found.items(), key=lambda pair: -pair[1])[:N_OPERATIONS]
            listed = ", ".join(f"{name.removeprefix('aten::')} {100 * share:.0f}%" for name, share in largest)
            table.row(n, f"{1000 * seconds:.2f}", listed, f"{100 * outside:.0f}%")


if __name__ == "__main__":
    main()
