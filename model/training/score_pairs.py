"""`python -m model.training score-pairs`: a first translator reads the pairs, and absurd ones go.

A pair's score is its dual conditional cross-entropy (Junczys-Dowmunt 2018): with the nats per token of each
side given the other, their mean plus their difference. A pair that says the same twice is cheap both ways.
"""

from __future__ import annotations

import argparse
import lzma
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.checkpoint import CheckpointError, load
from model.models import Translator
from model.tokenizer import Tokenizer
from model.training.batches import pad
from model.training.packs import PackError, Pair, pairs_and_ends
from model.training.scores import Row, markdown_table, percent
from model.training.translate import source_tag
from model.training.translate_batch import by_length


def add_score_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `score-pairs`."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the translator")
    parser.add_argument("--pairs", type=Path, required=True, help="pack of pairs")
    parser.add_argument("--out", type=Path, required=True, help="pack of those that stay, *.tsv or *.tsv.xz")
    parser.add_argument("--max-score", type=float, default=6.5, help="nats a token; pairs over it go")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="pairs read; 0 is all")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the N worst pairs of each chunk"
    )
    parser.add_argument("--rows", type=int, default=64, help="pairs that are read at once")
    parser.add_argument("--chunk", type=int, default=4096, help="pairs that are sorted by length together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")


def score_pairs_command(arguments: argparse.Namespace) -> int:
    """Score, write what stays, print what went by source; returns the exit status."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        report = _run(arguments)
    except (CheckpointError, PackError, OSError, ValueError) as error:
        print(f"score-pairs: {error}")
        return 1
    print(report)
    return 0


def _run(arguments: argparse.Namespace) -> str:
    checkpoint = load(arguments.model, arguments.device)
    model = checkpoint.model
    if not isinstance(model, Translator):
        raise CheckpointError(f"{arguments.model}: not a translator")
    pairs = islice(_numbered(arguments.pairs), arguments.limit or None)
    read, kept = Counter[str](), Counter[str]()
    last: int | None = None  # the document of the pair that was written last
    with _writer(arguments.out) as file, tqdm(mininterval=5, unit="pair") as bar:
        while numbered := list(islice(pairs, arguments.chunk)):
            chunk = [pair for _, pair in numbered]
            scores = pair_scores(model, checkpoint.tokenizer, chunk, arguments.rows)
            for (document, pair), score in zip(numbered, scores, strict=True):
                read[pair.source] += 1
                if score <= arguments.max_score:
                    kept[pair.source] += 1
                    file.write("\n" * (last not in (None, document)) + "\t".join(pair) + "\n")
                    last = document
            for i in sorted(range(len(chunk)), key=lambda i: -scores[i])[: arguments.show]:
                bar.write(f"{scores[i]:.2f}  {'  |  '.join(chunk[i])}")
            bar.update(len(chunk))
    rows: list[Row] = [
        {
            "source": source,
            "pairs": str(count),
            "kept": str(kept[source]),
            "%": percent(kept[source], count),
        }
        for source, count in read.most_common()
    ]
    return markdown_table(rows) if rows else f"{arguments.pairs}: no pairs"


def _numbered(path: Path) -> Iterator[tuple[int, Pair]]:
    """The pairs of a pack, each with the number of its document."""
    document = 0
    for pair in pairs_and_ends(path):
        if pair is None:
            document += 1
        else:
            yield document, pair


def pair_scores(
    model: Translator, tokenizer: Tokenizer, pairs: Sequence[Pair], max_rows: int = 64
) -> list[float]:
    """The score of each pair; infinite for one that is empty on a side or longer than the model reads."""
    texts = {"en": tokenizer.encode_batch([p.en for p in pairs])}
    texts["ko"] = tokenizer.encode_batch([p.ko for p in pairs])
    costs = {}
    for language, other in (("ko", "en"), ("en", "ko")):
        sources = [
            tokenizer.source_ids(ids, language, source_tag(pair.source))
            for ids, pair in zip(texts[other], pairs, strict=True)
        ]
        costs[language] = target_costs(model, tokenizer, sources, texts[language], language, max_rows)
    return [
        (a + b) / 2 + abs(a - b) if max(a, b) < torch.inf else torch.inf
        for a, b in zip(costs["ko"], costs["en"], strict=True)
    ]


@torch.no_grad()
def target_costs(
    model: Translator,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    language: str,
    max_rows: int,
) -> list[float]:
    """Mean nats per token of each target, its end included, given its source."""
    device = next(model.parameters()).device
    costs = [torch.inf] * len(sources)
    longest = model.config.max_len
    fitting = [i for i, s in enumerate(sources) if targets[i] and 3 < len(s) <= longest > len(targets[i])]
    for batch in by_length([sources[i] for i in fitting], max_rows):
        rows = [fitting[i] for i in batch]
        src = _padded([sources[i] for i in rows], tokenizer, device)
        tgt = _padded([[tokenizer.languages[language], *targets[i]] for i in rows], tokenizer, device)
        labels = _padded([[*targets[i], tokenizer.eos_id] for i in rows], tokenizer, device)
        logits = model(src, tgt).float().transpose(1, 2)  # (B, V, T)
        nats = F.cross_entropy(logits, labels, ignore_index=tokenizer.pad_id, reduction="none").sum(1)
        for i, cost in zip(rows, nats.tolist(), strict=True):
            costs[i] = cost / (len(targets[i]) + 1)
    return costs


def _padded(rows: Sequence[Sequence[int]], tokenizer: Tokenizer, device: torch.device) -> Tensor:
    return torch.from_numpy(pad(rows, tokenizer.pad_id)).to(device)


def _writer(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "wt", encoding="utf-8", newline="\n")
    return path.open("w", encoding="utf-8", newline="\n")
