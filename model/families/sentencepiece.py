"""SentencePiece models as `tokenizers` backends (Kudo and Richardson 2018).

A .model file is one protocol-buffers message. Only the fields that decide how text is cut are read, by a
small reader of the wire format: the format is stable, and a whole library would be needed for nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

_MAX_BYTES = 64 * 2**20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_MARK = "▁"

Value = int | bytes


class SpmError(ValueError):
    """Not a SentencePiece model, or one of a kind that is not supported."""


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary."""

    text: str
    score: float
    kind: int


@dataclass
class Spm:
    """What a file says of cutting text."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def unk_id(self) -> int:
        return next((i for i, piece in enumerate(self.pieces) if piece.kind == UNKNOWN), 0)


def read_spm(path: Path) -> Spm:
    """Raises `SpmError`, naming the file."""
    try:
        spm = _parse(_read(path))
    except (OSError, SpmError, UnicodeDecodeError, struct.error) as error:
        raise SpmError(f"{path}: not a SentencePiece model: {error}") from None
    if spm.model_type not in (_UNIGRAM, _BPE):
        raise SpmError(f"{path}: only unigram and BPE models are supported")
    if not spm.escape_whitespaces:
        raise SpmError(f"{path}: a model that does not mark spaces is not supported")
    return spm


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MAX_BYTES:
        raise SpmError(f"larger than {_MAX_BYTES} bytes")
    return path.read_bytes()


def _parse(data: bytes) -> Spm:
    spm = Spm()
    for number, value in _fields(data):
        if number == 1:
            spm.pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
            spm.model_type = _as_int(trainer.get(3, _UNIGRAM))
            spm.byte_fallback = bool(trainer.get(35, 0))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
            spm.charsmap = _as_bytes(normalizer.get(2, b""))
            spm.add_dummy_prefix = bool(normalizer.get(3, 1))
            spm.remove_extra_whitespaces = bool(normalizer.get(4, 1))
            spm.escape_whitespaces = bool(normalizer.get(5, 1))
    if not spm.pieces:
        raise SpmError("it has no pieces")
    return spm


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))
    return Piece(_as_bytes(fields.get(1, b"")).decode(), score, _as_int(fields.get(3, NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message: their numbers, with whole numbers as such and all else as bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise SpmError(f"wire type {wire} at byte {place}")
        if place + size > len(data):
            raise SpmError(f"a field of {size} bytes at byte {place} runs over the end")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise SpmError(f"a number without an end at byte {place}")


def _as_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise SpmError("a number where bytes belong")
    return value


def _as_int(value: Value) -> int:
    if not isinstance(value, int):
        raise SpmError("bytes where a number belongs")
    return value


def make_backend(spm: Spm, pieces: list[Piece] | None = None, unk_id: int | None = None) -> Backend:
    """A backend that cuts text as SentencePiece does.

    `pieces`, if given, is the vocabulary in another order, with other tokens among it.
    """
    pieces = spm.pieces if pieces is None else pieces
    unk_id = spm.unk_id if unk_id is None else unk_id
    unigram = spm.model_type == _UNIGRAM
    backend = Backend((_unigram if unigram else _bpe)(pieces, unk_id, spm.byte_fallback))
    steps: list[normalizers.Normalizer] = []
    if spm.charsmap:
        steps.append(normalizers.Precompiled(spm.charsmap))
    if spm.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        scheme = "always" if spm.add_dummy_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_MARK, prepend_scheme=scheme, split=unigram or not spm.byte_fallback
        )
    else:  # every space counts, one before the text besides
        steps += [normalizers.Prepend(_MARK)] if spm.add_dummy_prefix else []
        steps += [normalizers.Replace(" ", _MARK)]
    backend.normalizer = normalizers.Sequence(steps) if steps else None
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _unigram(pieces: list[Piece], unk_id: int, byte_fallback: bool) -> models.Model:
    # What cannot be typed must not be found in a text either.
    least = min((piece.score for piece in pieces), default=0.0)
    scores = [
        (piece.text, least - 100.0 if piece.kind in (CONTROL, UNUSED, BYTE) else piece.score)
        for piece in pieces
    ]
    return models.Unigram(scores, unk_id=unk_id, byte_fallback=byte_fallback)


def _bpe(pieces: list[Piece], unk_id: int, byte_fallback: bool) -> models.Model:
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    whole = {piece.text: piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    merges = [
        (-score, vocab[text], text[:cut], text[cut:])
        for text, score in whole.items()
        for cut in range(1, len(text))
        if text[:cut] in whole and text[cut:] in whole
    ]
    return models.BPE(
        vocab,
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=pieces[unk_id].text,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
