"""Tokenised text on disk, memory-mapped: written once, read by every run.

A shard is a list of documents; a document is a list of units (a sentence, or one side of a pair); a unit
is a run of token ids. On disk: tokens.bin (uint16), units.npy and docs.npy (offsets), labels.npy (a small
number per document, its meaning in meta.json).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer

Document = tuple[str, list[str]]  # a label, and the texts of the units
_BATCH = 2000


class Shard:
    """A memory-mapped shard. Raises OSError or ValueError, naming the folder, when it is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.label_names: list[str] = meta["labels"]
        self.left_out: list[str] = meta.get("left out", [])
        self.made_of: dict[str, int] = meta.get("made of", {})
        self.units: NDArray[np.int64] = np.load(folder / "units.npy", mmap_mode="r")
        self.docs: NDArray[np.int64] = np.load(folder / "docs.npy", mmap_mode="r")
        self.labels: NDArray[np.uint8] = np.load(folder / "labels.npy", mmap_mode="r")
        file = folder / "tokens.bin"
        if file.stat().st_size:
            self.tokens: NDArray[np.uint16] = np.memmap(file, dtype=np.uint16, mode="r")
        else:  # which cannot be mapped
            self.tokens = np.zeros(0, dtype=np.uint16)
        if len(self.tokens) != self.units[-1] or len(self.units) - 1 != self.docs[-1]:
            raise ValueError(f"{folder}: tokens.bin and its offsets do not fit together; write it again")

    def __reduce__(self) -> tuple[type[Shard], tuple[Path]]:
        """Another process maps the same files, and copies nothing."""
        return Shard, (self.folder,)

    def __len__(self) -> int:
        return len(self.docs) - 1

    def unit(self, index: int) -> NDArray[np.uint16]:
        """The token ids of unit `index` of the whole shard."""
        return self.tokens[self.units[index] : self.units[index + 1]]

    def document(self, index: int) -> list[NDArray[np.uint16]]:
        """The units of a document."""
        return [self.unit(u) for u in range(self.docs[index], self.docs[index + 1])]


def write_shard(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    wanted: Callable[[str], bool] = lambda _: True,
    made_of: Mapping[str, int] | None = None,
) -> Shard:
    """Tokenise documents, those with a wanted label, into a shard, which remembers the other labels.

    `made_of` is what it should still be made of when somebody comes back to it: the caller's to compare.

    meta.json comes last, so that a half-written shard is none.
    """
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"vocabulary of {tokenizer.vocab_size} does not fit 16 bits")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    names: dict[str, int] = {}
    left_out: dict[str, None] = {}

    def chosen() -> Iterator[Document]:
        for label, texts in documents:
            if wanted(label):
                yield label, texts
            else:
                left_out[label] = None

    labels, docs, units, total = [], [0], [0], 0
    with (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(chosen()):
            encoded = iter(tokenizer.encode_batch([text for _, texts in batch for text in texts]))
            for label, texts in batch:
                labels.append(names.setdefault(label, len(names)))
                for ids in islice(encoded, len(texts)):
                    file.write(np.asarray(ids, dtype=np.uint16).tobytes())
                    total += len(ids)
                    units.append(total)
                docs.append(len(units) - 1)
    np.save(folder / "units.npy", np.asarray(units, dtype=np.int64))
    np.save(folder / "docs.npy", np.asarray(docs, dtype=np.int64))
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.uint8))
    meta = {
        "labels": list(names),
        "left out": list(left_out),
        "made of": dict(made_of or {}),
        "tokens": total,
        "documents": len(labels),
    }
    (folder / "meta.part").write_text(json.dumps(meta, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "meta.part").replace(folder / "meta.json")
    return Shard(folder)


def held_out(text: str, share: float = 0.02) -> bool:
    """Does a text belong to the slice that never trains? By its hash: the same in every run and pack."""
    normal = "".join(c for c in text.casefold() if c.isalnum())
    digest = hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _batches(documents: Iterable[Document]) -> Iterator[Sequence[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
