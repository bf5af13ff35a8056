"""Tokenizers that others trained, behind the face of our own.

`tokenizer.json` says how text becomes pieces; a `Manner` says the rest: what the pieces spell, which tokens
are special, how a prompt or a source begins, which languages there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from model.tokenizer import NO_ID, TOKENIZER_FILE, Piece, Tokenizer, byte_alphabet, check_text

MANNER_FILE = "manner.json"

Alphabet = Literal["bytes", "spaces", "words"]
LanguagePlace = Literal["none", "source", "target"]


class MannerError(ValueError):
    """A manner that does not fit its tokenizer; the message names what is wrong."""


@dataclass(frozen=True)
class Manner:
    """What a tokenizer.json leaves open.

    `alphabet`: pieces are bytes in printable stand-ins; text with ▁ for a space and <0x0A> for a byte; or
    words, of which ## goes on with the one before. `vocabulary`: ids by piece, where they are not the
    backend's own. `languages`: codes with their tokens, NO_ID where a language has none;
    `language_place`: whose token stands before a source.
    """

    alphabet: Alphabet
    vocab_size: int
    special_ids: list[int]
    eos_id: int
    bos_id: int = NO_ID
    pad_id: int = NO_ID
    unk_id: int = NO_ID
    mask_id: int = NO_ID
    cls_id: int = NO_ID
    sep_id: int = NO_ID
    mask_token: str = ""
    prompt_prefix: list[int] = field(default_factory=list)
    vocabulary: dict[str, int] | None = None
    languages: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    language_place: LanguagePlace = "none"
    start_ids: list[int] = field(default_factory=list)  # what a translation begins with
    forces_language: bool = False  # ... and then the token of its language

    def __post_init__(self) -> None:
        if self.alphabet not in get_args(Alphabet) or self.language_place not in get_args(LanguagePlace):
            raise MannerError(f"alphabet {self.alphabet!r}, language_place {self.language_place!r}")
        ids = [getattr(self, f.name) for f in fields(self) if f.name.endswith("_id")]
        ids += [*self.special_ids, *self.prompt_prefix, *self.start_ids, *self.languages.values()]
        ids += [] if self.vocabulary is None else self.vocabulary.values()
        if not all(isinstance(i, int) and NO_ID <= i < self.vocab_size for i in ids):
            raise MannerError(f"a token id is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manner:
        """The inverse of `asdict`. Raises `MannerError`."""
        try:
            return cls(**values)
        except TypeError as error:
            raise MannerError(str(error)) from None


class AdoptedTokenizer(Tokenizer):
    """Text to ids and back by a tokenizer of another making. Text that looks special is ordinary text."""

    parts_words = False

    def __init__(self, backend: Backend, manner: Manner) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.manner = backend, manner
        self.vocab_size, self.mask_token = manner.vocab_size, manner.mask_token
        self.pad_id, self.bos_id, self.eos_id = manner.pad_id, manner.bos_id, manner.eos_id
        self.mask_id, self.cls_id, self.sep_id = manner.mask_id, manner.cls_id, manner.sep_id
        self.languages, self.tags = manner.languages, {}
        self.special_ids = frozenset(manner.special_ids)
        self.token_bytes(0)  # builds the table, which needs a vocabulary that fits

    @classmethod
    def read(cls, folder: Path) -> AdoptedTokenizer:
        """What `files` wrote. Raises OSError or ValueError, naming the file."""
        path = folder / MANNER_FILE
        raw = (folder / TOKENIZER_FILE).read_bytes()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(Backend.from_buffer(raw), Manner.from_dict(values))
        except OSError:
            raise
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"{path}: {error}") from None

    def files(self) -> dict[str, str]:
        """Contents by name of file: what `read` reads."""
        return super().files() | {MANNER_FILE: json.dumps(asdict(self.manner), ensure_ascii=False)}

    @property
    def sources(self) -> list[str]:
        """The languages that can be translated from."""
        return self.manner.sources

    @property
    def targets(self) -> list[str]:
        """The languages that can be translated to."""
        return self.manner.targets

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added. Raises `TextError` on a lone surrogate."""
        check_text(text)
        return self._ids(self.backend.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        return [self._ids(e) for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> list[Piece]:
        """The pieces of a text with their character offsets; pieces of one character share its offsets."""
        check_text(text)
        return self._pieces(text, self.backend.encode(text, add_special_tokens=False))

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """What a generation begins with: never nothing, even of an empty text."""
        ids = [*self.manner.prompt_prefix, *text_ids]
        return ids or [self.eos_id if self.bos_id == NO_ID else self.bos_id]

    @property
    def prompt_prefix(self) -> list[int]:
        """The tokens that stand before every prompt."""
        return self.manner.prompt_prefix

    def text_ids(self, text: str) -> list[int]:
        """A text as an encoder reads it, with what stands around it."""
        check_text(text)
        return self._ids(self.backend.encode(text))

    def pair_ids(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Two texts as an encoder reads them, and the segment of each token."""
        check_text(first)
        check_text(second)
        encoding = self.backend.encode(first, second)
        return self._ids(encoding), encoding.type_ids

    def masked_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """`text_ids` of a text with the mask token written literally, and per mask: was there a space?"""
        check_text(text)
        *before, _ = text.split(self.mask_token)
        return self._ids(self._masking.encode(text)), [part.endswith(" ") for part in before]

    def masked_pieces(self, text: str) -> list[Piece]:
        """The pieces of such a text, nothing added, with their offsets."""
        check_text(text)
        return self._pieces(text, self._masking.encode(text, add_special_tokens=False))

    def source_ids(
        self, text_ids: Sequence[int], tgt_lang: str, tag: str = "", src_lang: str | None = None
    ) -> list[int]:
        """The translator's encoder input: the language where one is told, text, end."""
        place = self.manner.language_place
        language = tgt_lang if place == "target" else src_lang if place == "source" else None
        told = self.languages.get(language or "", NO_ID)
        return [*([] if told == NO_ID else [told]), *text_ids, self.eos_id]

    def target_ids(self, tgt_lang: str) -> list[int]:
        """What a translation begins with: the first is given, those that follow are forced."""
        forced = [self.languages[tgt_lang]] if self.manner.forces_language else []
        return [*self.manner.start_ids, *forced]

    def token_text(self, token_id: int) -> str:
        """One token for display: a special token by its name, half a character as U+FFFD."""
        if token_id in self.special_ids:
            return self._names.get(token_id, "")
        return self._bytes[token_id].decode("utf-8", errors="replace")

    def _ids(self, encoding: Encoding) -> list[int]:
        if self.manner.vocabulary is None:
            ids: list[int] = encoding.ids
            return ids
        return [self.manner.vocabulary.get(token, self.manner.unk_id) for token in encoding.tokens]

    def _pieces(self, text: str, encoding: Encoding) -> list[Piece]:
        pairs = zip(self._ids(encoding), encoding.offsets, strict=True)
        return [Piece(i, text[start:stop], start, stop) for i, (start, stop) in pairs]

    @cached_property
    def _masking(self) -> Backend:
        """The backend, but for the mask token, which counts where it is written."""
        values = json.loads(self.backend.to_str())
        for token in values["added_tokens"]:
            if token["content"] == self.mask_token:
                token["special"] = False
        backend = Backend.from_str(json.dumps(values))
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _names(self) -> dict[int, str]:
        own = self.manner.vocabulary or self.backend.get_vocab(with_added_tokens=True)
        return {token_id: token for token, token_id in own.items()}

    @cached_property
    def _bytes(self) -> list[bytes]:
        spell = {"bytes": _spell_bytes, "spaces": _spell_spaces, "words": _spell_word}[self.manner.alphabet]
        added = {i for i, token in self.backend.get_added_tokens_decoder().items() if not token.special}
        table = [b""] * self.vocab_size
        for token_id, token in self._names.items():
            if token_id < self.vocab_size and token_id not in self.special_ids:
                plain = self.manner.vocabulary is None and token_id in added
                table[token_id] = token.encode() if plain else spell(token)
        return table


_ALPHABET = byte_alphabet()


def _spell_bytes(token: str) -> bytes:
    return b"".join(
        bytes([_ALPHABET[character]]) if character in _ALPHABET else character.encode() for character in token
    )


def _spell_spaces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _spell_word(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()
