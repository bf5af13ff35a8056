"""The tokenizer of a foreign checkpoint: tokenizer.json, or the older files turned into one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from model.adopted import AdoptedTokenizer, Alphabet, Manner
from model.config import TransformerConfig
from model.tokenizer import NO_ID, TOKENIZER_FILE

_ROLES = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file. Raises ValueError, naming it."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")  # noqa: TRY004
    return values


def read_tokenizer(folder: Path, config: TransformerConfig) -> AdoptedTokenizer:
    """Raises ValueError, naming the file."""
    path = folder / TOKENIZER_FILE
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    try:
        backend = Backend.from_file(str(path))
        return AdoptedTokenizer(backend, _manner(backend, settings, config))
    except Exception as error:  # the backend raises bare Exception
        raise ValueError(f"{path}: not a tokenizer this project can use: {error}") from None


def _manner(backend: Backend, settings: Mapping[str, Any], config: TransformerConfig) -> Manner:
    vocab = backend.get_vocab(with_added_tokens=True)
    unfit = max(vocab.values()) if vocab else 0
    if unfit >= config.vocab_size:
        raise ValueError(f"token {unfit} is outside the model's vocabulary of {config.vocab_size}")
    names = {role: token_name(settings.get(f"{role}_token")) for role in _ROLES}
    ids: dict[str, Any] = {f"{role}_id": vocab.get(name or "", NO_ID) for role, name in names.items()}
    added = backend.get_added_tokens_decoder()
    known = set(vocab.values())
    special = {i for i, token in added.items() if token.special} | {i for i in ids.values() if i != NO_ID}
    special |= {i for i in range(config.vocab_size) if i not in known} | set(config.eos_ids)
    return Manner(
        alphabet=alphabet_of(backend),
        vocab_size=config.vocab_size,
        special_ids=sorted(special),
        mask_token=names["mask"] or "",
        **(ids | {"eos_id": config.eos_id, "bos_id": NO_ID if config.bos_id is None else config.bos_id}),
    )


def with_prompt_prefix(tokenizer: AdoptedTokenizer) -> AdoptedTokenizer:
    """The same, beginning its prompts as the backend begins a text; an end that it adds is left out."""
    empty = tokenizer.text_ids("")
    prefix = [i for i in empty if i != tokenizer.eos_id or i == tokenizer.bos_id]
    return AdoptedTokenizer(tokenizer.backend, replace(tokenizer.manner, prompt_prefix=prefix))


def token_name(value: Any) -> str | None:
    """A special token, which stands as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def alphabet_of(backend: Backend) -> Alphabet:
    """How pieces spell text, by the decoder that belongs to them. Raises ValueError."""
    kinds = set(_kinds(json.loads(backend.to_str()).get("decoder")))
    if "ByteLevel" in kinds:
        return "bytes"
    if "WordPiece" in kinds:
        return "words"
    if kinds & {"Metaspace", "Replace"}:
        return "spaces"
    raise ValueError(f"a decoder of {', '.join(sorted(kinds)) or 'no kind'} is not supported")


def _kinds(part: Any) -> list[str]:
    if not isinstance(part, dict):
        return []
    inner = [kind for each in part.get("decoders", []) for kind in _kinds(each)]
    return [str(part.get("type")), *inner]
