"""Which tokens a translation may be made of: a lexical shortlist (Jean et al. 2015; Senellart et al. 2018).

Most of a vocabulary cannot occur in the translation of a given sentence. A table says what each token of a
source may become; with the tokens that any translation may need that is a part of the vocabulary, and the
widest product of a decoder's step shrinks to it. `model.training.shortlist` makes the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import TransformerConfig
from model.tokenizer import TOKENIZER_FILE
from model.weights import files_sha256, replace_file

SHORTLIST_FILE = "shortlist.safetensors"
_DIGEST = "tokenizer_sha256"
Ids = NDArray[np.int64]


class Table(NamedTuple):
    """For one target language: what any translation may need (C,), and what each source token may become.

    Token s of V has likely[starts[s] : starts[s + 1]], starts (V + 1,).
    """

    common: Ids
    likely: Ids
    starts: Ids


class Shortlist:
    """Tables by target language."""

    def __init__(self, tables: Mapping[str, Table], config: TransformerConfig) -> None:
        """Raises ValueError where a table does not fit the model, or would let no translation end."""
        vocab_size = config.vocab_size
        for language, table in tables.items():
            if language not in config.languages:
                raise ValueError(f"the model has no language {language}")
            if any(part.ndim != 1 for part in table) or len(table.starts) != vocab_size + 1:
                raise ValueError(f"the table for {language} does not fit a vocabulary of {vocab_size}")
            begins, ends = table.starts[:-1], table.starts[1:]
            if begins[0] != 0 or ends[-1] != len(table.likely) or (begins > ends).any():
                raise ValueError(f"{language}.starts are no beginnings of parts of {language}.likely")
            ids = np.concatenate((table.common, table.likely))
            if config.eos_id not in table.common:
                raise ValueError(f"{language}.common lacks the end token, {config.eos_id}")
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"the table for {language} has ids that are not in 0..{vocab_size - 1}")
        self.tables = dict(tables)

    def ids(
        self,
        source: Iterable[int],
        language: str,
        suppressed: Sequence[int] = (),
        also: Sequence[int] = (),
    ) -> Tensor:
        """What a source may become beside what is common: (n,), rising; but for what is suppressed.

        Its own tokens are among it, because names and code are copied, and so is what shall be there also.
        """
        common, likely, starts = self.tables[language]
        chosen = np.zeros(len(starts) - 1, dtype=bool)
        for token in source:
            chosen[likely[starts[token] : starts[token + 1]]] = True
            chosen[token] = True
        chosen[list(also)] = True
        chosen[common] = False
        chosen[list(suppressed)] = False
        return torch.from_numpy(np.flatnonzero(chosen))

    def common(self, language: str, suppressed: Sequence[int] = ()) -> Tensor:
        """What any translation may need, but for what is suppressed: (n,), rising."""
        return torch.from_numpy(np.setdiff1d(self.tables[language].common, suppressed))

    def save(self, folder: Path) -> None:
        """Write it beside a model's tokenizer. Raises ValueError for ids that 16 bits do not hold."""
        tensors: dict[str, Tensor] = {}
        for language, table in self.tables.items():
            if len(table.starts) > 2**16 + 1:
                raise ValueError(f"ids of {len(table.starts) - 1} tokens do not fit 16 bits")
            tensors[f"{language}.common"] = torch.from_numpy(table.common.astype(np.uint16))
            tensors[f"{language}.likely"] = torch.from_numpy(table.likely.astype(np.uint16))
            tensors[f"{language}.starts"] = torch.from_numpy(table.starts.astype(np.int32))
        made_for = {_DIGEST: files_sha256([folder / TOKENIZER_FILE])}
        replace_file(folder / SHORTLIST_FILE, lambda part: save_file(tensors, part, metadata=made_for))

    @classmethod
    def load(cls, folder: Path, config: TransformerConfig) -> Shortlist | None:
        """What lies beside a model's weights, if anything does. Raises ValueError, naming the file.

        Ids mean something to one tokenizer alone: it must be the one that was there when they were written.
        """
        path = folder / SHORTLIST_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                made_for = (file.metadata() or {}).get(_DIGEST)
                names = sorted(file.keys())
                stored = {name: _whole_numbers(name, file.get_tensor(name)) for name in names}
            _check_tokenizer(folder, made_for)
            languages = sorted({name.partition(".")[0] for name in names})
            tables = {
                name: Table(*(stored[f"{name}.{part}"] for part in Table._fields)) for name in languages
            }
            return cls(tables, config)
        except KeyError as error:
            raise ValueError(f"{path}: no tensor {error}") from None
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _whole_numbers(name: str, tensor: Tensor) -> Ids:
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} holds no whole numbers")
    numbers: Ids = tensor.numpy().astype(np.int64)
    return numbers


def _check_tokenizer(folder: Path, sha256: str | None) -> None:
    if sha256 != (found := files_sha256([folder / TOKENIZER_FILE])):
        made_for = f"one of sha256 {sha256[:12]}" if sha256 else "an unknown one"
        raise ValueError(f"made for another tokenizer, {made_for}; {TOKENIZER_FILE} has {found[:12]}")
