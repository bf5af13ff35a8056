"""This engine beside transformers and CTranslate2: the same weights, inputs and output lengths, in one run.

    python -m benchmarks.decode                       all of it, about a quarter of an hour
    python -m benchmarks.decode --quick               two minutes: one round, one and eight sequences
    python -m benchmarks.decode --tasks generate --weights shipped --sequences 32 --rounds 5

Every contestant runs in a process of its own, all kept alive; in each round each has one turn, in rotating
order. Ratios are taken within a round, so that what slows the machine down for a while slows all of them.
Peers need `pip install -e .[bench] -c constraints.txt`; without them the engine runs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from app.settings import Settings
from benchmarks.arguments import add_device, check_device, command_line, make_parser
from benchmarks.contestants import ContestantFailed, Outputs, Remote
from benchmarks.convert import CannotConvert
from benchmarks.machine import head, read_bandwidth
from benchmarks.table import Table, spread
from benchmarks.workload import SHIPPED, TINY, Case, decoder_config, make_case, make_folder, translator_config
from model.shortlist import SHORTLIST_FILE

PROMPT = {"generate": 32, "translate": 24}
NEW = {"generate": 128, "translate": 32}


@dataclass
class Score:
    """What one contestant did in one case."""

    seconds: list[float] = field(default_factory=list)
    outputs: Outputs = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A contestant to be started: its name, its kind, what its constructor takes beside the folder."""

    name: str
    kind: str
    options: dict[str, Any]


def agreement(found: Outputs, wanted: Outputs) -> tuple[int, float]:
    """How many outputs are the same, and the share of all tokens that come before the first difference."""
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    before = sum(_common(a, b) for a, b in zip(found, wanted, strict=True))
    return same, before / sum(map(len, wanted))


def _common(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def entries(task: str, folder: Path, arguments: argparse.Namespace) -> Iterator[Entry]:
    """This engine in its settings, the first of them the one that the ratios are of; then the peers."""
    device, n_threads = arguments.device, arguments.threads
    rows = max(arguments.sequences)
    slots = {"generate_slots": rows, "translate_slots": 4 * rows if task == "translate" else 32}
    slots["prefix_tokens"] = 0  # the rounds repeat their prompts
    for name, own in arguments.engines:
        settings = {"device": device, "n_threads": n_threads, **slots, **own}
        yield Entry(name, "engine", {"task": task, "settings": settings})
    if "transformers" in arguments.peers:
        dtype = "float32" if device == "cpu" else "bfloat16"
        options = {"device": device, "dtype": dtype, "n_threads": n_threads, "compile_too": arguments.compile}
        yield Entry(f"transformers {dtype}", "transformers", options)
    if "ctranslate2" in arguments.peers:
        for kind in ("float32", "int8") if device == "cpu" else ("float16",):
            options = {"device": device, "compute_type": kind, "n_threads": n_threads}
            yield Entry(f"CTranslate2 {kind}", "ctranslate2", options)
        if device == "cpu" and task == "translate" and (folder / SHORTLIST_FILE).is_file():
            # Its list is that of a whole batch, not of a sentence.
            yield Entry("CTranslate2 int8, same shortlist", "ctranslate2", options | {"use_map": True})


@contextlib.contextmanager
def started(folder: Path, wanted: list[Entry]) -> Iterator[list[Remote]]:
    """The contestants' processes; all ended at the end.

    A peer that cannot hold the weights (Marian and Pegasus have no rotary positions) is left out.
    """
    running: list[Remote] = []
    try:
        for entry in wanted:
            try:
                running.append(Remote(entry.name, entry.kind, folder, entry.options))
            except ContestantFailed as error:
                reason = str(error).strip().rpartition("\n")[2]
                if CannotConvert.__name__ not in reason:
                    raise
                print(f"left out: {entry.name}: {reason}", file=sys.stderr, flush=True)
        yield running
    finally:
        for remote in running:
            remote.close()


def measure(case: Case, contestants: list[Remote], rounds: int) -> dict[str, Score]:
    """Interleaved rounds; a contestant that fails is left out with a word on why."""
    scores: dict[str, Score] = {}
    for remote in contestants:
        try:
            scores[remote.name] = Score(note=remote.prepare(case))
        except ContestantFailed as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
    ready = [remote for remote in contestants if remote.name in scores]
    for number in range(rounds):
        turn = number % len(ready)
        for remote in ready[turn:] + ready[:turn]:
            outputs, seconds = remote.run(case)
            scores[remote.name].seconds.append(seconds)
            scores[remote.name].outputs = outputs
    return scores


def report(
    table: Table, labels: tuple[str, str], case: Case, scores: dict[str, Score], own: list[str]
) -> None:
    """A row a contestant; the ratio is that of the engine's first setting to it, the agreement with each."""
    for name, score in scores.items():
        speeds = [case.n_tokens / seconds for seconds in score.seconds]
        ratio = ""
        if name != own[0]:
            pairs = zip(score.seconds, scores[own[0]].seconds, strict=True)
            ratio = spread([theirs / ours for theirs, ours in pairs])
        agrees = [alike(score, scores[other]) if other != name else "" for other in own]
        table.row(*labels, len(case.prompts), name, spread(speeds, 0), ratio, *agrees, score.note)


def alike(score: Score, other: Score) -> str:
    """How far two contestants said the same."""
    same, share = agreement(score.outputs, other.outputs)
    return f"{same} of {len(other.outputs)}, {100 * share:.1f}%"


def compare(task: str, weights: str, folder: Path, table: Table, arguments: argparse.Namespace) -> None:
    """All numbers of sequences for one folder."""
    with started(folder, list(entries(task, folder, arguments))) as contestants:
        for n in arguments.sequences:
            new = arguments.new or NEW[task]
            case = make_case(task, folder, n, PROMPT[task], new, text=weights == "shipped")
            scores = measure(case, contestants, arguments.rounds)
            report(table, (task, weights), case, scores, [name for name, _ in arguments.engines])


def engine_argument(text: str) -> tuple[str, dict[str, str]]:
    """`name:setting=value,setting=value` -> the name and the settings."""
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    unknown = [key for key, _, _ in pairs if key not in Settings.model_fields]
    if not name or unknown or not all(middle for _, middle, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text}: not name:setting=value,... ({', '.join(unknown)} unknown)")
    return name, {key: value for key, _, value in pairs}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_device(parser)
    cuda = torch.cuda.is_available()
    peers = [name for name in ("transformers", "ctranslate2") if find_spec(name)]
    add = parser.add_argument
    add("--tasks", nargs="+", choices=sorted(SHIPPED), default=sorted(SHIPPED))
    add("--weights", nargs="+", choices=["shapes", "shipped"], default=["shapes", "shipped"])
    add("--sequences", type=int, nargs="+", default=[1, 8, 32])
    add("--rounds", type=int, default=3)
    add("--new", type=int, help="new tokens a sequence, in place of 128 (generate) and 32 (translate)")
    add("--peers", nargs="*", choices=["transformers", "ctranslate2"], default=peers)
    add(
        "--engines",
        nargs="+",
        type=engine_argument,
        default=[("engine", {})],
        metavar="NAME:SETTING=VALUE,...",
        help="settings in which this engine takes part; the ratios are of the first",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="try transformers compiled, too: minutes of compilation on a CPU",
    )
    add("--tiny", action="store_true", help="tiny random models, to see that the command works")
    add("--quick", action="store_true", help="one round, 1 and 8 sequences, 32 and 16 new tokens")
    arguments = parser.parse_args(words)
    check_device(arguments.device)
    if arguments.quick:
        arguments.rounds, arguments.sequences, arguments.new = 1, [1, 8], arguments.new or 16
    return arguments


def make_folders(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, str, Path]]:
    """(task, which weights, folder) of all that is to be measured."""
    tiny: dict[str, object] = TINY if arguments.tiny else {}
    makers = {"generate": decoder_config, "translate": translator_config}
    for task in arguments.tasks:
        for weights in arguments.weights:
            random = weights == "shapes"
            yield (
                task,
                weights,
                make_folder(scratch / task, makers[task](**tiny)) if random else SHIPPED[task],
            )


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    notes = [f"{arguments.threads} threads each, {arguments.rounds} rounds: median (least to greatest)"]
    if arguments.device == "cpu":
        bandwidth = read_bandwidth(arguments.threads, *([2**22] if arguments.tiny else []))
        notes.append(f"memory read bandwidth: {bandwidth / 1e9:.1f} GB/s")
    notes += [f"{name}: {own or 'default settings'}" for name, own in arguments.engines]
    print(head(command_line("decode", words), "transformers", "ctranslate2", notes=tuple(notes)))
    own = [name for name, _ in arguments.engines]
    same = [f"same as {name}" for name in own]
    table = Table("task", "weights", "sequences", "who", "tokens/s", f"{own[0]} over it", *same, "note")
    with tempfile.TemporaryDirectory() as scratch:
        for task, weights, folder in make_folders(arguments, Path(scratch)):
            compare(task, weights, folder, table, arguments)


if __name__ == "__main__":
    main()
