"""`python -m model.training back-translate`: text in one language becomes pairs to learn from.

A translator writes the other side of each sentence (Sennrich et al. 2016). The written side is what a model
should learn to say; so the pairs are named after it, `back-ko` or `back-en`, are learned in that direction
only, and their sources carry a tag (Caswell et al. 2019).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from model.checkpoint import CheckpointError, load
from model.models import Translator
from model.sampling import BeamParams
from model.training import prepare
from model.training.packs import PackError, Pair, clean_pair
from model.training.scores import Translation, has_loop, translate_all

OTHER = {"en": "ko", "ko": "en"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_back_translate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `back-translate`."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the translator")
    parser.add_argument("--text", type=Path, required=True, help="document pack; what is held out stays out")
    parser.add_argument("--language", choices=sorted(OTHER), required=True, help="that of the text")
    parser.add_argument("--out", type=Path, required=True, help="pair pack to write, or to go on with: *.tsv")
    parser.add_argument("--share", type=float, default=1.0, help="of the documents, by hash")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="sentences read in all; 0 is all")
    parser.add_argument("--min-chars", type=int, default=10)
    parser.add_argument("--max-chars", type=int, default=200)
    parser.add_argument(
        "--keep", type=float, default=1.0, metavar="SHARE",
        help="of each chunk's sound pairs those that the translator is surest of, by the token",
    )  # fmt: skip
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=256, help="beams that are decoded at once")
    parser.add_argument("--chunk", type=int, default=4096, help="sentences between two savings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")


def back_translate_command(arguments: argparse.Namespace) -> int:
    """Translate, keep what is sound, save; returns the exit status."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        kept, read = _run(arguments)
    except (CheckpointError, PackError, OSError, ValueError) as error:
        print(f"back-translate: {error}")
        return 1
    print(f"{kept} pairs of {read} sentences -> {arguments.out}")
    return 0


def _run(arguments: argparse.Namespace) -> tuple[int, int]:
    checkpoint = load(arguments.model, arguments.device, _DTYPES[arguments.dtype])
    if not isinstance(checkpoint.model, Translator):
        raise CheckpointError(f"{arguments.model}: not a translator")
    room = min(arguments.max_new_tokens, checkpoint.config.max_len)
    params = BeamParams(arguments.beams, max_new_tokens=room)
    if not 0 < arguments.keep <= 1:
        raise ValueError(f"--keep {arguments.keep:g}: a share above 0, at most 1")
    target = OTHER[arguments.language]
    output = Output(arguments.out)
    texts = sentences(arguments.text, arguments.share, arguments.min_chars, arguments.max_chars)
    texts = islice(texts, output.read, arguments.limit or None)
    with tqdm(initial=output.read, total=arguments.limit or None, mininterval=5, unit="sentence") as bar:
        while chunk := list(islice(texts, arguments.chunk)):
            translations = translate_all(
                checkpoint.model, checkpoint.tokenizer, chunk, target, params, arguments.rows
            )
            found = sound_pairs(chunk, translations, arguments.language)
            output.add(surest(list(found), arguments.keep), len(chunk))
            bar.update(len(chunk))
    return output.kept, output.read


def sentences(pack: Path, share: float, min_chars: int, max_chars: int) -> Iterator[str]:
    """The sentences of a document pack that may train, those of a length worth having."""
    for _, units in prepare.passages([pack], held=False, share=share):
        for unit in units:
            text = unit.strip()
            if min_chars <= len(text) <= max_chars and "\t" not in text:
                yield text


def sound_pairs(
    texts: Iterable[str], translations: Iterable[Translation], language: str
) -> Iterator[tuple[Pair, float]]:
    """Pairs whose written side came to an end, without loops, in the right script and at a fitting length.

    Each with the score of its translation.
    """
    for text, translation in zip(texts, translations, strict=True):
        written = " ".join(translation.text.split())
        en, ko = (text, written) if language == "en" else (written, text)
        pair = Pair(f"back-{language}", en, ko)
        whole = translation.ended and not translation.cut and not has_loop(written)
        if whole and clean_pair(pair):
            yield pair, translation.score


def surest(pairs: Sequence[tuple[Pair, float]], share: float) -> list[Pair]:
    """The share of the pairs with the best scores, in the order in which they came.

    What a translator is unsure of it mostly makes up, names above all.
    """
    ranked = sorted(range(len(pairs)), key=lambda i: -pairs[i][1])
    return [pairs[i][0] for i in sorted(ranked[: round(share * len(pairs))])]


class Output:
    """A pack that grows, and beside it how far it goes, so that a killed run goes on where it was saved."""

    def __init__(self, path: Path) -> None:
        if path.suffix != ".tsv":
            raise ValueError(f"{path}: the pack is written as .tsv; compress it afterwards")
        self.path, self.progress = path, path.with_name(f"{path.name}.progress.json")
        self.read = self.kept = self.size = 0
        if self.progress.exists():
            state = json.loads(self.progress.read_text(encoding="utf-8"))
            self.read, self.kept, self.size = state["read"], state["kept"], state["bytes"]
        elif path.exists():
            raise ValueError(f"{path}: is there already, without {self.progress.name}; nothing overwritten")
        with path.open("ab") as file:
            if file.tell() < self.size:
                raise ValueError(f"{path}: shorter than {self.progress.name} says")
            file.truncate(self.size)  # what was written after the last saving comes again

    def add(self, pairs: Iterable[Pair], n_read: int) -> None:
        """Append pairs that came of `n_read` sentences, and save."""
        lines = ["\t".join(pair) + "\n" for pair in pairs]
        with self.path.open("ab") as file:
            file.write("".join(lines).encode())
            self.size = file.tell()
        self.read, self.kept = self.read + n_read, self.kept + len(lines)
        part = self.progress.with_suffix(".part")
        part.write_text(json.dumps({"read": self.read, "kept": self.kept, "bytes": self.size}) + "\n")
        part.replace(self.progress)
