"""`python -m model.convert FOLDER OUT`: a published model in this project's own layout."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

from model.checkpoint import CheckpointError, Folder, save

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}


def convert(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write what a folder holds to another, as `load` reads it, in the numbers that it is stored in.

    Raises `CheckpointError`.
    """
    folder = Folder(source)
    tokenizer = folder.tokenizer()
    dtype = dtype or _DTYPES[stored_dtype(folder)]
    save(target, folder.model("cpu", dtype), tokenizer, dtype)


def stored_dtype(folder: Folder) -> str:
    """The number format that most of the weights are stored in."""
    counts: Counter[str] = Counter()
    for tensor in folder.stored.values():
        counts[_STORED.get(tensor.dtype, "float32")] += tensor.n_numbers
    return counts.most_common(1)[0][0]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m model.convert", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint of a published model")
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="by default as stored")
    chosen = parser.parse_args(arguments)
    if chosen.out.exists():
        sys.exit(f"{chosen.out}: is there already")
    try:
        convert(chosen.folder, chosen.out, _DTYPES.get(chosen.dtype))
    except CheckpointError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
