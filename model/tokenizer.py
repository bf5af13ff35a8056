"""One subword tokenizer for English and Korean that loses nothing, and its incremental inverse.

Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): every piece is a run of UTF-8 bytes, so any
Unicode text decodes back to itself.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

TOKENIZER_FILE = "tokenizer.json"
NO_ID = -1  # of a token that a vocabulary has not got

PAD, BOS, EOS, MASK, CLS, SEP = "<pad>", "<s>", "</s>", "[MASK]", "[CLS]", "[SEP]"
LANGUAGES = ("en", "ko")
# What kind of text a translation example comes from; in use the tag is always "everyday".
TAGS = ("everyday", "docs", "back")
SPECIAL_TOKENS = (
    *(PAD, BOS, EOS, MASK, CLS, SEP),
    *(f"<2{language}>" for language in LANGUAGES),
    *(f"<tag:{tag}>" for tag in TAGS),
)

# Digits stand alone, so that numbers are copied digit by digit; Hangul and other letters part, so that
# a particle after a Latin name is a piece of its own.
_PIECES = (
    r"'(?:[sdmtSDMT]|ll|LL|re|RE|ve|VE)(?!\p{L})"
    r"| ?\p{Hangul}+"
    r"| ?[\p{L}\p{M}&&[^\p{Hangul}]]+"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)


class TextError(ValueError):
    """A text that cannot be encoded; the message says where."""


@dataclass(frozen=True)
class Piece:
    """A token of a text, with the characters [start, stop) it came from."""

    id: int
    text: str
    start: int
    stop: int


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in a byte-level vocabulary, as `tokenizers` spells it.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and on.
    """
    printable = [b for b in range(256) if 0x21 <= b <= 0x7E or (b >= 0xA1 and b != 0xAD)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to ids and back. Text that looks like a special token is ordinary text."""

    # What fills a mask begins with a space exactly where one was typed.
    parts_words = True

    def __init__(self, backend: Backend) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.mask_token = MASK
        self.pad_id, self.bos_id, self.eos_id = (self._id(token) for token in (PAD, BOS, EOS))
        self.mask_id, self.cls_id, self.sep_id = (self._id(token) for token in (MASK, CLS, SEP))
        self.languages = {language: self._id(f"<2{language}>") for language in LANGUAGES}
        self.tags = {tag: self._id(f"<tag:{tag}>") for tag in TAGS}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_ids = frozenset(added) - self.special_ids  # of `extended`

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read tokenizer.json, or the folder that holds it. Raises OSError or ValueError, naming the file."""
        path = Path(path)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        raw = path.read_bytes()
        try:
            tokenizer = cls(Backend.from_buffer(raw))
            tokenizer.token_bytes(tokenizer.pad_id)  # builds the table, which needs a vocabulary of bytes
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"{path}: not a tokenizer this project can use: {error}") from None
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn `vocab_size` pieces, special tokens included, from texts."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return cls(backend)

    def extended(self, words: Iterable[str]) -> Tokenizer:
        """One more piece for each word that is none yet, with the space before it where it has one.

        Ids go on from the last. They are found in a text before anything else: at each place the longest,
        whatever comes after it.
        """
        backend = Backend.from_str(self.backend.to_str())
        backend.add_tokens([AddedToken(word, normalized=False) for word in words])
        return Tokenizer(backend)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json into a folder."""
        for name, text in self.files().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """Contents by name of file: what `load` reads."""
        return {TOKENIZER_FILE: self.backend.to_str()}  # unindented: half the bytes

    @property
    def sources(self) -> list[str]:
        """The languages that can be translated from."""
        return list(self.languages)

    @property
    def targets(self) -> list[str]:
        """The languages that can be translated to."""
        return list(self.languages)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added. Raises `TextError` on a lone surrogate."""
        check_text(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> list[Piece]:
        """The pieces of a text with their character offsets; pieces of one character share its offsets."""
        check_text(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [Piece(i, text[start:stop], start, stop) for i, (start, stop) in pairs]

    def encode_masked(self, text: str) -> tuple[list[int], list[bool]]:
        """The ids of a text in which the mask token is written literally, and per mask: was there a space?

        The space before a mask belongs to the masked word, as in RoBERTa, because a piece carries the
        space before it.
        """
        ids: list[int] = []
        spaced: list[bool] = []
        *before, last = text.split(self.mask_token)
        for part in before:
            spaced.append(part.endswith(" "))
            ids += [*self.encode(part.removesuffix(" ")), self.mask_id]
        return ids + self.encode(last), spaced

    def masked_pieces(self, text: str) -> list[Piece]:
        """The pieces of such a text with their offsets."""
        pieces: list[Piece] = []
        *before, last = text.split(self.mask_token)
        start = 0
        for part in before:
            kept = part.removesuffix(" ")
            pieces += _shift(self.encode_with_offsets(kept), start)
            mask_start, start = start + len(kept), start + len(part) + len(self.mask_token)
            pieces.append(Piece(self.mask_id, text[mask_start:start], mask_start, start))
        return pieces + _shift(self.encode_with_offsets(last), start)

    def may_fill(self, token_id: int, spaced: bool | None) -> bool:
        """Can a token fill a mask? It must be whole, visible characters.

        `spaced` says whether it begins with a space; None is either.
        """
        if not self.parts_words:  # what may stand there is the model's affair
            return True
        text = self.token_text(token_id)
        if token_id in self.special_ids or "\ufffd" in text or not text.strip():
            return False
        return spaced is None or text.startswith(" ") == spaced

    @cached_property
    def fillers(self) -> dict[bool | None, frozenset[int]]:
        """All tokens that can fill a mask, by what `may_fill` calls `spaced`."""
        every = frozenset(i for i in range(self.vocab_size) if self.may_fill(i, None))
        if not self.parts_words:
            return dict.fromkeys((None, True, False), every)
        after_space = frozenset(i for i in every if self.may_fill(i, True))
        return {None: every, True: after_space, False: every - after_space}

    @property
    def prompt_prefix(self) -> list[int]:
        """The tokens that stand before every prompt."""
        return [self.bos_id]

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """What a generation begins with: the prefix, then the text."""
        return [*self.prompt_prefix, *text_ids]

    def text_ids(self, text: str) -> list[int]:
        """A text as an encoder reads it."""
        return [self.cls_id, *self.encode(text), self.sep_id]

    def masked_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """`encode_masked` as an encoder reads it."""
        ids, spaced = self.encode_masked(text)
        return [self.cls_id, *ids, self.sep_id], spaced

    def pair_ids(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Two texts as an encoder reads them, and the segment of each token."""
        left = self.text_ids(first)
        # In running text a space stands before a sentence that follows, and a piece carries that space.
        follower = f" {second.lstrip()}" if second.strip() else second
        right = [*self.encode(follower), self.sep_id]
        return left + right, [0] * len(left) + [1] * len(right)

    def source_ids(
        self,
        text_ids: Sequence[int],
        tgt_lang: str,
        tag: str = "everyday",
        src_lang: str | None = None,
    ) -> list[int]:
        """The translator's encoder input: tag, target language, text, end. The source needs no telling."""
        return [self.tags[tag], self.languages[tgt_lang], *text_ids, self.eos_id]

    def target_ids(self, tgt_lang: str) -> list[int]:
        """What a translation begins with: the first is given, those that follow are forced."""
        return [self.languages[tgt_lang]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and bytes that are no UTF-8 give nothing."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="ignore")

    def token_text(self, token_id: int) -> str:
        """One token for display: a special token by its name, half a character as U+FFFD."""
        if token_id in self.special_ids:
            return str(self.backend.id_to_token(token_id))
        return self._bytes[token_id].decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, empty for a special one."""
        return self._bytes[token_id]

    @cached_property
    def digit_ids(self) -> frozenset[int]:
        """The tokens that digits are made of."""
        return frozenset(token_id for digit in range(10) for token_id in self.encode(str(digit)))

    @cached_property
    def _bytes(self) -> list[bytes]:
        alphabet = byte_alphabet()
        table = [b""] * self.vocab_size
        for token, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            if token_id not in self.special_ids:
                table[token_id] = bytes(alphabet[character] for character in token)
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            if not added.special:
                table[token_id] = added.content.encode()  # as it is written
        return table

    def _id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the vocabulary has no {token}")
        return int(token_id)


class TextStream:
    """Turns ids into text one by one, never emitting half a character.

    The pieces joined equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, often "" in the midst of a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """The rest: nothing but what a broken end leaves, which is dropped."""
        return self._decoder.decode(b"", final=True)


def check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"lone surrogate at character {error.start}") from None


def _shift(pieces: list[Piece], by: int) -> list[Piece]:
    return [Piece(piece.id, piece.text, piece.start + by, piece.stop + by) for piece in pieces]


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text that each id adds, as `TextStream` would give it."""
    stream = TextStream(tokenizer)
    return (stream.push(token_id) for token_id in ids)
