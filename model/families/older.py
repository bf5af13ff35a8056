"""Backends made from the files that tokenizers had before tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from model.families.sentencepiece import CONTROL, UNKNOWN, Piece, make_backend, read_spm

Settings = Mapping[str, Any]


class Made(NamedTuple):
    """A backend, and the ids of pieces where they are not its own."""

    backend: Backend
    vocabulary: dict[str, int] | None = None


_UNKNOWN = "[UNK]"

Maker = Callable[[Path, Settings], Made]

# Languages whose tokens follow the pieces of a vocabulary that does not list them, in their order.
_FIFTY = """
    ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV
    my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID
    ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA
    ur_PK xh_ZA gl_ES sl_SI
"""
_HUNDRED = """
    af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi
    hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns
    oc or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh
    zu
"""

# Words with their space, runs of digits and of other signs, as the byte-level vocabularies were learned.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wordpiece(folder: Path, settings: Settings) -> Made:
    """From vocab.txt, a piece a line."""
    vocab = {token: i for i, token in enumerate(_lines(folder / "vocab.txt"))}
    backend = Backend(models.WordPiece(vocab, unk_token=_UNKNOWN))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _around(backend, vocab, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    backend.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab])
    return Made(backend)


def bytes_of_words(folder: Path, settings: Settings) -> Made:
    """From vocab.json and merges.txt: bytes, merged within words."""
    backend = _byte_level(folder)
    spaced = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.add_special_tokens([t for t in ("<|endoftext|>",) if backend.token_to_id(t) is not None])
    return Made(backend)


def bytes_with_marks(folder: Path, settings: Settings) -> Made:
    """The same with begin, end and mask tokens."""
    backend = bytes_of_words(folder, settings).backend
    vocab = backend.get_vocab()
    names = [t for t in ("<s>", "<pad>", "</s>", "<unk>") if t in vocab]
    backend.add_special_tokens([*names, AddedToken("<mask>", lstrip=True, normalized=False)])
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", vocab["</s>"]),
        ("<s>", vocab["<s>"]),
        add_prefix_space=bool(settings.get("add_prefix_space")),
    )
    return Made(backend)


def bytes_of_runs(folder: Path, settings: Settings) -> Made:
    """From the same files: composed characters, digits one by one, line breaks apart."""
    backend = _byte_level(folder)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _add_listed(backend, settings)
    return Made(backend)


def sentencepiece_decoder(folder: Path, settings: Settings) -> Made:
    """From tokenizer.model; the text begins with <s>."""
    spm = read_spm(folder / "tokenizer.model")
    backend = make_backend(spm)
    backend.add_special_tokens([p.text for p in spm.pieces if p.kind in (CONTROL, UNKNOWN)])
    _add_listed(backend, settings)
    if settings.get("add_bos_token", True):
        _around(backend, backend.get_vocab(), "<s> $A", "<s> $A <s> $B")
    return Made(backend)


def sentencepiece_encoder(folder: Path, settings: Settings) -> Made:
    """From sentencepiece.bpe.model: the ids of its pieces move to make room for four others."""
    backend = _shifted(folder / "sentencepiece.bpe.model", [])
    _around(backend, backend.get_vocab(), "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return Made(backend)


def sentencepiece_of_fifty(folder: Path, settings: Settings) -> Made:
    """The same, with the tokens of fifty languages behind the pieces."""
    return Made(_shifted(folder / "sentencepiece.bpe.model", _FIFTY.split()))


def sentencepiece_beside_words(folder: Path, settings: Settings) -> Made:
    """From sentencepiece.bpe.model and vocab.json: pieces have ids of their own, languages behind them.

    One that is read from a tokenizer.json would list the languages there.
    """
    path = folder / "sentencepiece.bpe.model"
    if not (folder / "vocab.json").is_file():  # a vocabulary like those of the encoders, languages listed
        return Made(_shifted(path, _listed(settings)))
    vocabulary = _vocabulary(folder / "vocab.json")
    n_words = len(vocabulary)
    languages = {f"__{code}__": n_words + i for i, code in enumerate(_HUNDRED.split())}
    return Made(make_backend(read_spm(path)), vocabulary | languages)


def sentencepiece_of_source(folder: Path, settings: Settings) -> Made:
    """From source.spm and vocab.json: pieces of both languages have ids of their own."""
    return Made(make_backend(read_spm(folder / "source.spm")), _vocabulary(folder / "vocab.json"))


def _byte_level(folder: Path) -> Backend:
    names = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    backend = Backend(models.BPE.from_file(*names))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _shifted(path: Path, languages: Sequence[str]) -> Backend:
    spm = read_spm(path)
    first = [Piece(t, 0.0, CONTROL) for t in ("<s>", "<pad>", "</s>")] + [Piece("<unk>", 0.0, UNKNOWN)]
    last = [Piece(token, 0.0, CONTROL) for token in (*languages, "<mask>")]
    backend = make_backend(spm, [*first, *spm.pieces[3:], *last], unk_id=3)
    marks = [piece.text for piece in first] + list(languages)
    backend.add_special_tokens([*marks, AddedToken("<mask>", lstrip=True, normalized=False)])
    return backend


def _around(backend: Backend, vocab: Mapping[str, int], single: str, pair: str) -> None:
    names = {word.partition(":")[0] for word in pair.split()} - {"$A", "$B"}
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, vocab[name]) for name in sorted(names)]
    )


def _listed(settings: Settings) -> list[str]:
    """The further special tokens that the settings list, in the order of their ids."""
    names = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    return [name for name in names if isinstance(name, str)]


def _add_listed(backend: Backend, settings: Settings) -> None:
    """Tokens that the settings list with their ids, which are next behind the pieces."""
    listed = settings.get("added_tokens_decoder") or {}
    for token_id, token in sorted(listed.items(), key=lambda item: int(item[0])):
        added = AddedToken(token["content"], special=token.get("special", False), normalized=False)
        (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])
        if backend.token_to_id(token["content"]) != int(token_id):
            raise ValueError(f"added_tokens_decoder: {token['content']!r} has not the id {token_id}")


def _vocabulary(path: Path) -> dict[str, int]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not all(type(i) is int and i >= 0 for i in values.values()):
        raise ValueError(f"{path}: not an object of token ids")
    return values


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
