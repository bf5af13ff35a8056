"""How near the engine comes to what the machine can do: bytes that must move, products that must be formed.

    python -m benchmarks.roofline                     on a GPU: shipped sizes and a 7B shape, some minutes
    python -m benchmarks.roofline --shapes shipped    without the large one
    python -m benchmarks.roofline --device cpu        shipped sizes, against the read bandwidth of the memory

Decoding: a step must read every weight once, and each row's keys and values. These bytes over the time of the
engine's own step, as a share of the copy bandwidth (CPU: read bandwidth) measured in the same run.
Prefill and encoder: the multiplications and additions of their matrix products over the time from submission
to the answer, as a share of what one large matrix product reaches in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from app.engine.batch import BatchItem
from app.engine.decode import make_decode_lane
from benchmarks.arguments import add_device, add_settings, check_device, command_line, make_parser
from benchmarks.growth import cache_bytes_per_token
from benchmarks.machine import head, read_bandwidth
from benchmarks.steps import QUEUE, Driver, load_lane
from benchmarks.table import Table, spread
from benchmarks.workload import (
    SHIPPED,
    TINY,
    decoder_config,
    filler_tokenizer,
    make_endless,
    make_folder,
    random_prompts,
)
from model.checkpoint import Checkpoint, load_config
from model.config import TransformerConfig
from model.inference import optimise
from model.models import build_model
from model.quantize import Int8Linear

PROMPT = 128
ENCODER = Path("weights/fill-mask")
# Llama-2-7B's sizes, in this project's parts that suit it.
LARGE: dict[str, object] = {
    "vocab_size": 32_000,
    "d_model": 4096,
    "n_heads": 32,
    "d_ff": 11_008,
    "n_decoder_layers": 32,
    "max_len": 1024,
    "norm": "rms",
    "activation": "silu",
    "gated": True,
    "bias": False,
}


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches: bytes and operations a second."""

    bandwidth: float
    operations: float


def measure_peaks(device: str, dtype: torch.dtype, n_threads: int, size: int) -> Peaks:
    """Copy bandwidth of a GPU or read bandwidth of a CPU's memory, and one product of `size` x `size`."""
    if device == "cpu":
        bandwidth = read_bandwidth(n_threads)
    else:
        source = torch.empty(2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        # Each byte is read and written.
        bandwidth = 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return Peaks(bandwidth, 2 * size**3 / best_seconds(lambda: a @ a, device))


def best_seconds(work: Callable[[], object], device: str, rounds: int = 10) -> float:
    """The least of some runs, after one that is not counted."""
    best = float("inf")
    for number in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - started)
    return best


def layer_weights(config: TransformerConfig) -> int:
    """Weights of all matrices of the blocks (a decoder's without cross-attention, or an encoder's)."""
    d_model, d_kv = config.d_model, config.kv_heads * config.head_dim
    d_heads = config.n_heads * config.head_dim
    attention = 2 * d_model * d_heads + 2 * d_model * d_kv
    feed_forward = (3 if config.gated else 2) * d_model * config.d_ff
    return (config.n_encoder_layers + config.n_decoder_layers) * (attention + feed_forward)


def step_bytes(config: TransformerConfig, rows: int, context: float, weight: int, cache: int) -> float:
    """Bytes that a step must move, a weight taking `weight` of them and a number in the cache `cache`.

    All matrices and the output embedding, the keys and values of every row's context; norms, biases and
    activations are left out.
    """
    weights = layer_weights(config) + config.vocab_size * config.d_model
    return weights * weight + rows * context * cache_bytes_per_token(config, cache)


def pass_operations(config: TransformerConfig, rows: int, length: int, *, causal: bool) -> float:
    """Multiplications and additions of a pass over rows x length tokens, its attention included."""
    n_layers = config.n_encoder_layers + config.n_decoder_layers
    scores = 2 * 2 * length * length * config.n_heads * config.head_dim * (0.5 if causal else 1.0)
    return rows * (2 * layer_weights(config) * length + n_layers * scores)


@dataclass(frozen=True)
class Setup:
    """One model, and how to make its lane for so many rows."""

    name: str
    config: TransformerConfig
    make_lane: Callable[[int], Any]


def report_steps(setup: Setup, peaks: Peaks, table: Table, arguments: argparse.Namespace) -> None:
    """A row for each number of sequences."""
    driver = Driver(setup.make_lane(max(rows_of(setup, arguments))), arguments.device)
    weight, cache = number_bytes(driver.lane)
    for rows in rows_of(setup, arguments):
        prompts = random_prompts(setup.config.vocab_size, rows, arguments.prompt)
        seconds = driver.step_seconds(prompts, arguments.steps, arguments.rounds)
        context = arguments.prompt + 3 + arguments.steps * arguments.rounds / 2
        moved = step_bytes(setup.config, rows, context, weight, cache)
        table.row(
            f"{setup.name}, weights of {weight} bytes",
            rows,
            spread([1e6 * s for s in seconds], 0),
            f"{rows / median(seconds):.0f}",
            f"{moved / 1e6:.1f}",
            f"{moved / median(seconds) / 1e9:.1f}",
            spread([100 * moved / s / peaks.bandwidth for s in seconds], 1),
        )


def report_prefill(setup: Setup, peaks: Peaks, table: Table, arguments: argparse.Namespace) -> None:
    """Prompts from submission to their first tokens, less the steps."""
    rows, length = arguments.batch, arguments.length
    driver = Driver(setup.make_lane(rows), arguments.device)
    found = []
    for number in range(arguments.rounds + 1):
        sequences, seconds = driver.fill(random_prompts(setup.config.vocab_size, rows, length, number), 12)
        step = driver.steps(8)
        driver.drop(sequences)
        # One step gave the first tokens; a lane that looks ahead had launched another behind it.
        n_steps = 2 if driver.lane.launch_ahead else 1
        if number:
            found.append(seconds - n_steps * step)
    report_pass(f"{setup.name}, prefill", setup.config, found, peaks, table, arguments, causal=True)


def report_encoder(
    folder: Path, peaks: Peaks, table: Table, settings: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """A batch of fill-mask items from submission to their answers."""
    rows, length = arguments.batch, arguments.length
    config = load_config(folder)
    lane = load_lane("fill-mask", folder, settings | {"max_batch_tokens": rows * length})
    driver = Driver(lane, arguments.device)
    found = []
    for number in range(arguments.rounds + 1):
        prompts = random_prompts(config.vocab_size, rows, length, number)
        seconds = driver.batch([_masked(prompt, config) for prompt in prompts])
        if number:
            found.append(seconds)
    report_pass(f"{folder.name}, encoder", config, found, peaks, table, arguments, causal=False)


def report_pass(
    name: str,
    config: TransformerConfig,
    seconds: list[float],
    peaks: Peaks,
    table: Table,
    arguments: argparse.Namespace,
    *,
    causal: bool,
) -> None:
    """A row for a pass over a batch."""
    operations = pass_operations(config, arguments.batch, arguments.length, causal=causal)
    table.row(
        name,
        f"{arguments.batch} x {arguments.length}",
        spread([1e3 * s for s in seconds], 2),
        f"{operations / 1e9:.1f}",
        f"{operations / median(seconds) / 1e12:.3f}",
        spread([100 * operations / s / peaks.operations for s in seconds], 1),
    )


def _masked(prompt: list[int], config: TransformerConfig) -> BatchItem:
    assert config.mask_id is not None
    return BatchItem(
        token_ids=[config.mask_id, *prompt[1:]],
        segment_ids=[0] * len(prompt),
        task="fill-mask",
        top_k=1,
        targets=[None],
        allowed=[None],
    )


def rows_of(setup: Setup, arguments: argparse.Namespace) -> list[int]:
    """The numbers of sequences: as asked for, else one and as many as the cache of such a model allows."""
    many = 32 if setup.config.d_model > 2048 else 64
    return arguments.sequences or [1, many]


def number_bytes(lane: Any) -> tuple[int, int]:
    """What a weight of a matrix takes in the lane's model, and a number in its cache."""
    model = lane.runner.model
    number: int = next(model.parameters()).element_size()
    int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    return (1 if int8 else number), number


def folder_setup(name: str, folder: Path, settings: dict[str, Any]) -> Setup:
    """A folder through the service's own way of loading."""
    budget = {"prefill_tokens": 1_000_000}

    def make_lane(rows: int) -> Any:
        return load_lane("generate", folder, settings | budget | {"generate_slots": rows})

    return Setup(name, load_config(folder), make_lane)


def large_setup(device: str, changes: dict[str, object]) -> Setup:
    """The 7B shape, made on the device: on disk it would be 13 GB."""
    config = decoder_config(**(LARGE | changes))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = build_model(config)
    finally:
        torch.set_default_dtype(default)
    model.to(device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
    optimise(model)  # as the service does
    tokenizer = filler_tokenizer(config.vocab_size)
    checkpoint = Checkpoint(model, tokenizer, config, "7b-shape", "")

    def make_lane(rows: int) -> Any:
        return make_decode_lane("generate", checkpoint, n_slots=rows, prefill_tokens=1_000_000, **QUEUE)

    return Setup("7B shape", config, make_lane)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_device(parser)
    add_settings(parser)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=["shipped", "7b"], help="7b: on a GPU only")
    add("--sequences", type=int, nargs="+", help="of decoding; 1 and 64, with the 7B shape 1 and 32")
    add("--prompt", type=int, default=PROMPT)
    add("--batch", type=int, help="rows of prefill and encoder")
    add("--length", type=int, default=256, help="tokens of each")
    add("--steps", type=int, default=32, help="steps of a round")
    add("--rounds", type=int, default=5)
    add("--tiny", action="store_true", help="tiny models, to see that the command works")
    arguments = parser.parse_args(words)
    check_device(arguments.device)
    cuda = arguments.device == "cuda"
    arguments.shapes = arguments.shapes or (["shipped", "7b"] if cuda else ["shipped"])
    if "7b" in arguments.shapes and not (cuda or arguments.tiny):
        parser.error("--shapes 7b needs a GPU: --device cuda")
    arguments.batch = arguments.batch or (32 if cuda else 8)
    if arguments.tiny:
        arguments.prompt, arguments.batch, arguments.length, arguments.steps, arguments.rounds = (
            8,
            2,
            16,
            2,
            2,
        )
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    given = dict(arguments.settings)
    settings = {"device": arguments.device, "n_threads": arguments.threads, **given}
    cuda = arguments.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    peaks = measure_peaks(arguments.device, dtype, arguments.threads, 8192 if cuda else 1024)
    kind = "copy bandwidth of the GPU" if cuda else f"read bandwidth, {arguments.threads} threads"
    notes = (
        f"{kind}: {peaks.bandwidth / 1e9:.1f} GB/s",
        f"one large product, {dtype}: {peaks.operations / 1e12:.3f} TFLOP/s",
        f"settings: {given or 'defaults'}; rounds: {arguments.rounds}, median (least to greatest)",
    )
    print(head(command_line("roofline", words), notes=notes))
    with tempfile.TemporaryDirectory() as scratch:
        run(Path(scratch), settings, peaks, arguments)


def run(scratch: Path, settings: dict[str, Any], peaks: Peaks, arguments: argparse.Namespace) -> None:
    """Both tables."""
    setups = [*make_setups(scratch, settings, arguments)]
    table = Table(
        *("decoding", "sequences", "step, µs", "tokens/s", "MB that must move", "GB/s", "% of the bandwidth")
    )
    for setup in setups:
        report_steps(setup, peaks, table, arguments)
    print()
    table = Table("pass", "rows x tokens", "time, ms", "GFLOP", "TFLOP/s", "% of one large product")
    for setup in setups:
        report_prefill(setup, peaks, table, arguments)
    if "shipped" in arguments.shapes and ENCODER.is_dir():
        report_encoder(ENCODER, peaks, table, settings, arguments)


def make_setups(scratch: Path, settings: dict[str, Any], arguments: argparse.Namespace) -> Iterator[Setup]:
    """The models that are measured."""
    if "shipped" in arguments.shapes and arguments.tiny:
        folder = make_folder(scratch / "generate", decoder_config(**TINY, n_decoder_layers=2))
        yield folder_setup("tiny generate", folder, settings)
    elif "shipped" in arguments.shapes:
        folder = make_endless(SHIPPED["generate"], scratch / "generate")
        yield folder_setup("shipped generate", folder, settings)
    if "7b" in arguments.shapes:
        yield large_setup(arguments.device, TINY | {"n_decoder_layers": 2} if arguments.tiny else {})


if __name__ == "__main__":
    main()
