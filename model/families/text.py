"""The tokenizer of a foreign checkpoint: tokenizer.json, or the older files turned into one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model.adopted import AdoptedTokenizer, Alphabet, Manner
from model.config import TransformerConfig
from model.families.family import Text
from model.families.older import Made
from model.languages import UNCODED, UNDETERMINED
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


def read_tokenizer(folder: Path, config: TransformerConfig, text: Text) -> AdoptedTokenizer:
    """The tokenizer of a folder, which must fit the configuration. Raises ValueError, naming the file."""
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    if settings.get("legacy_behaviour"):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: legacy_behaviour: true is not supported")
    named = settings.get("tokenizer_class")
    if named in text.refused:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: tokenizer_class: {named!r} is not supported")
    path = folder / TOKENIZER_FILE
    try:
        made = Made(Backend.from_file(str(path))) if path.is_file() else _make(folder, settings, text)
        manner = _manner(made, settings, config, text)
        _guard(made, manner)
        tokenizer = AdoptedTokenizer(made.backend, manner)
    except Exception as error:  # the backend raises bare Exception
        raise ValueError(f"{path}: not a tokenizer this project can use: {error}") from None
    _check_encoder(tokenizer, config, path)
    return _with_prefix(tokenizer) if config.architecture == "causal_lm" else tokenizer


def _check_encoder(tokenizer: AdoptedTokenizer, config: TransformerConfig, path: Path) -> None:
    """An encoder's text stands between tokens, and a mask must be there to be filled."""
    if config.architecture not in ("masked_lm", "classifier"):
        return
    if len(tokenizer.text_ids("")) < 2:
        raise ValueError(f"{path}: it puts no tokens around a text (post_processor)")
    if config.architecture == "masked_lm" and config.mlm_head and not tokenizer.mask_token:
        raise ValueError(f"{path}: there is no mask token")


def _make(folder: Path, settings: Mapping[str, Any], text: Text) -> Made:
    try:
        return text.older(folder, settings)
    except FileNotFoundError as error:
        raise ValueError(f"no such file, nor the older {Path(error.filename).name}") from None


def _manner(made: Made, settings: Mapping[str, Any], config: TransformerConfig, text: Text) -> Manner:
    backend = made.backend
    vocab = made.vocabulary or backend.get_vocab(with_added_tokens=True)
    last = max(vocab.values(), default=0)
    if last >= config.vocab_size:
        raise ValueError(f"token {last} is outside the model's vocabulary of {config.vocab_size}")
    names = {role: token_name(settings.get(f"{role}_token")) or text.tokens.get(role) for role in _ROLES}
    ids: dict[str, Any] = {f"{role}_id": vocab.get(name or "", NO_ID) for role, name in names.items()}
    ids["eos_id"] = ids["eos_id"] if config.architecture == "masked_lm" else config.eos_id
    languages = _languages(vocab, text.language)
    added = [] if made.vocabulary else backend.get_added_tokens_decoder().items()
    special = {i for i, token in added if token.special} | set(ids.values()) | set(languages.values())
    special |= set(range(config.vocab_size)) - set(vocab.values()) | set(config.eos_ids)
    sources, targets = _directions(languages, settings)
    return Manner(
        alphabet=alphabet_of(backend),
        vocab_size=config.vocab_size,
        special_ids=sorted(special - {NO_ID}),
        mask_token=names["mask"] if ids["mask_id"] != NO_ID and names["mask"] else "",
        vocabulary=made.vocabulary,
        languages=languages | {code: NO_ID for code in (*sources, *targets) if code not in languages},
        sources=sources if config.architecture == "translator" else [],
        targets=targets if config.architecture == "translator" else [],
        language_place=text.language_place,
        start_ids=[] if config.start_id is None else [config.start_id],
        forces_language=text.forces_language,
        **ids,
    )


def _guard(made: Made, manner: Manner) -> None:
    """Let nobody type a special token where the model itself would find it in a text, as unigrams would.

    The first character of what looks like one becomes a word of its own.
    """
    if not isinstance(made.backend.model, models.Unigram):
        return
    vocab = made.vocabulary or made.backend.get_vocab(with_added_tokens=True)
    special = set(manner.special_ids)
    names = sorted(name for name, i in vocab.items() if i in special and len(name) > 1)
    if names:
        pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        before = made.backend.pre_tokenizer
        made.backend.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def _languages(vocab: Mapping[str, int], pattern: str) -> dict[str, int]:
    """The tokens of languages by code, in the order of their ids."""
    if not pattern:
        return {}
    found = {token_id: re.fullmatch(pattern, token) for token, token_id in vocab.items()}
    return {next(filter(None, match.groups())): i for i, match in sorted(found.items()) if match is not None}


def _directions(languages: dict[str, int], settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The languages that can be translated from, and to.

    A model without tokens of languages has one of each, which its settings name.
    """
    source, target = (token_name(settings.get(f"{side}_lang")) for side in ("source", "target"))
    if not languages:
        return [source or UNDETERMINED], [target or UNCODED]
    return [source] if source else list(languages), list(languages)


def _with_prefix(tokenizer: AdoptedTokenizer) -> AdoptedTokenizer:
    """The same, beginning its prompts as the backend begins a text; an end that it adds is left out."""
    around = tokenizer.text_ids("")
    prefix = [i for i in around if i != tokenizer.eos_id or i == tokenizer.bos_id]
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
