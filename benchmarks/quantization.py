"""What 8 bits cost in quality: chrF of translations, and the first choice of fill-mask, beside float32.

What a shortlist costs beside that: chrF of translations by the whole engine in 8 bits, with it and without.

    python -m benchmarks.quantization --data folder/with/dev --limit 200

The folder holds line by line `NAME.eng` beside `NAME.kor`. int8 stays the default of a CPU as long as chrF
lies within 0.3 of float32's and fill-mask's first choice is the same in 98 of 100.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from app.engine.runner import MaskedRunner, Wish
from app.engine.sequence import Sequence
from benchmarks.contestants import Engine
from benchmarks.machine import head
from benchmarks.table import Table
from benchmarks.workload import SHIPPED
from model.checkpoint import Checkpoint, load, load_config
from model.inference import Quantization, optimise
from model.kernels import compiled
from model.models import Translator
from model.sampling import BeamParams
from model.tokenizer import Tokenizer
from model.training.evaluate import read_parallel, sample
from model.training.scores import Corpus, Translation, score_corpus, translate_all

_KINDS: tuple[Quantization, ...] = ("none", "int8")
_FILL_MASK = Path("weights/fill-mask")
_QUEUE = {"n_threads": 1, "max_queue_items": 10_000, "max_queue_tokens": 10_000_000}  # all at once


def loaded(folder: Path, kind: Quantization) -> Checkpoint:
    """A folder's model as the service runs it."""
    checkpoint = load(folder)
    optimise(checkpoint.model, kind, compiled())  # as the service does
    return checkpoint


def corpora(data: Path, limit: int) -> Iterator[Corpus]:
    """Both directions of every pair of files; at most `limit` sentences of each, evenly spread."""
    for english in sorted(data.rglob("*.eng")):
        pairs = sample(read_parallel(english, english.with_suffix(".kor")), limit)
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        yield Corpus(english.stem, "en-ko", ours, theirs)
        yield Corpus(english.stem, "ko-en", theirs, ours)


def compare_translations(data: Path, limit: int, beams: int) -> None:
    """chrF and BLEU in both number formats, and how many translations are the same."""
    checkpoints = [loaded(SHIPPED["translate"], kind) for kind in _KINDS]
    table = Table("text", "direction", "n", "chrF float32", "chrF int8", "BLEU float32", "BLEU int8", "same")
    own = checkpoints[0].config
    params = BeamParams(
        beams, max_new_tokens=96, length_penalty=own.length_penalty, round_trip=own.round_trip
    )
    for corpus in corpora(data, limit):
        language, said = corpus.direction[-2:], []
        for checkpoint in checkpoints:
            assert isinstance(checkpoint.model, Translator)
            said.append(
                translate_all(checkpoint.model, checkpoint.tokenizer, corpus.sources, language, params)
            )
        plain, eight = (score_corpus(corpus, each) for each in said)
        same = sum(a.text == b.text for a, b in zip(*said, strict=True))
        scores = plain["chrF"], eight["chrF"], plain["BLEU"], eight["BLEU"]
        table.row(
            corpus.name, corpus.direction, len(corpus.sources), *scores, f"{100 * same / len(said[0]):.0f}%"
        )


@torch.inference_mode()
def compare_fillings(data: Path, limit: int) -> None:
    """The first choice for one masked token in the middle of each sentence."""
    runners = [MaskedRunner(loaded(_FILL_MASK, kind)) for kind in _KINDS]
    tokenizer = runners[0].tokenizer
    table = Table("text", "language", "n", "same first choice")
    for corpus in corpora(data, limit):
        same = n = 0
        for text in corpus.sources:
            ids = tokenizer.encode(text)[:100]
            if len(ids) < 3:
                continue
            masked = [tokenizer.cls_id, *ids, tokenizer.sep_id]
            slot = len(masked) // 2
            masked[slot] = tokenizer.mask_id
            first = []
            for runner in runners:
                hidden = runner.encode([masked], [[0] * len(masked)])
                first.append(runner.fill(hidden[0, slot, None], [Wish(None, 1)])[0][0][0])
            n += 1
            same += first[0] == first[1]
        table.row(corpus.name, corpus.direction[:2], n, f"{100 * same / max(n, 1):.1f}%")


def compare_shortlist(data: Path, limit: int, beams: int) -> None:
    """chrF and BLEU of the engine in 8 bits, choosing among all tokens and among a shortlist's."""
    folder = SHIPPED["translate"]
    config, tokenizer = load_config(folder), Tokenizer.load(folder)
    chosen = BeamParams(
        beams, max_new_tokens=96, length_penalty=config.length_penalty, round_trip=config.round_trip
    )
    room = config.max_len - len(tokenizer.source_ids([], "ko"))
    engines = [
        Engine(folder, "translate", {"quantization": "int8", "use_shortlist": use, **_QUEUE})
        for use in (False, True)
    ]
    table = Table("text", "direction", "n", "chrF all", "chrF listed", "BLEU all", "BLEU listed", "same")
    for corpus in corpora(data, limit):
        language, said = corpus.direction[-2:], []
        for engine in engines:
            sources = [tokenizer.source_ids(tokenizer.encode(t)[:room], language) for t in corpus.sources]
            results = engine.results("translate", [Sequence(source, chosen) for source in sources])
            said.append([Translation(tokenizer.decode(r[0].token_ids).strip(), True, False) for r in results])
        whole, listed = (score_corpus(corpus, each) for each in said)
        same = sum(a.text == b.text for a, b in zip(*said, strict=True))
        scores = whole["chrF"], listed["chrF"], whole["BLEU"], listed["BLEU"]
        n = len(corpus.sources)
        table.row(corpus.name, corpus.direction, n, *scores, f"{100 * same / n:.0f}%")
    for engine in engines:
        engine.close()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with NAME.eng and NAME.kor")
    parser.add_argument("--limit", type=int, default=200, help="sentences of each text and direction; 0: all")
    parser.add_argument("--beams", type=int, default=4)
    arguments = parser.parse_args(words)
    if not list(arguments.data.rglob("*.eng")):
        sys.exit(f"{arguments.data}: holds no NAME.eng")
    command = " ".join(["python -m benchmarks.quantization", *(sys.argv[1:] if words is None else words)])
    print(head(command, "sacrebleu"))
    compare_fillings(arguments.data, arguments.limit)
    print()
    compare_translations(arguments.data, arguments.limit, arguments.beams)
    print()
    compare_shortlist(arguments.data, arguments.limit, arguments.beams)


if __name__ == "__main__":
    main()
