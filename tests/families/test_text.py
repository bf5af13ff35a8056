"""Text becomes the ids that the reference library makes of it, from tokenizer.json and from older files."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from model.adopted import AdoptedTokenizer
from model.config import TransformerConfig
from model.families.registry import FAMILIES
from model.families.sentencepiece import SpmError, make_backend, read_spm
from model.families.text import read_tokenizer
from model.tokenizer import TextStream, Tokenizer
from tests.families import tokenizers
from tests.families.conftest import TextPair
from tests.families.texts import varied_texts

Make = Callable[[str], TextPair]
KINDS = list(tokenizers.KINDS)
MASKED = ["bert", "distilbert", "roberta", "xlm-roberta"]
SPM = [name for name, kind in tokenizers.KINDS.items() if kind.spm]


def read(name: str, folder: Path) -> AdoptedTokenizer:
    kind = tokenizers.KINDS[name]
    config = TransformerConfig.from_dict(
        {
            "architecture": kind.architecture,
            "vocab_size": 1000,
            "d_model": 8,
            "n_heads": 2,
            "n_encoder_layers": int(kind.architecture != "causal_lm"),
            "n_decoder_layers": int(kind.architecture != "masked_lm"),
            "start_id": 2,
            "eos_id": 0 if name in ("gpt2", "qwen2", "marian") else 2,
            **dict.fromkeys(("bos_id", "mask_id", "cls_id", "sep_id")),
        }
    )
    return read_tokenizer(folder, config, FAMILIES[kind.family].text)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_ids(text_pair: Make, name: str) -> None:
    """Of 200 texts, alone and together."""
    pair, texts = text_pair(name), varied_texts()
    ours = read(name, pair.newer)
    theirs = [pair.reference(text, add_special_tokens=False)["input_ids"] for text in texts]
    saved = pair.reference if not (pair.newer / "tokenizer.json").exists() else None
    if saved is None:  # what a tokenizer.json says may differ from the files that it was made of
        from tests.families.reference import read_tokenizer as read_reference

        saved = read_reference(tokenizers.KINDS[name].reference, pair.newer)
        theirs = [saved(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ours.encode(text) for text in texts] == theirs
    assert ours.encode_batch(texts) == theirs
    assert len({i for ids in theirs for i in ids}) > 150  # or the comparison says little


@pytest.mark.parametrize("name", [name for name in KINDS if name not in SPM])
def test_the_same_ids_from_the_older_files(text_pair: Make, name: str) -> None:
    pair = text_pair(name)
    ours = read(name, pair.older)
    for text in varied_texts():
        assert ours.encode(text) == pair.reference(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name", SPM)
def test_pieces_are_those_of_sentencepiece(text_pair: Make, name: str) -> None:
    """The library that the file belongs to; the reference's conversion strays where a text ends in spaces."""
    pair = text_pair(name)
    ours = read(name, pair.older)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pair.older / tokenizers.KINDS[name].spm))
    for text in varied_texts():
        wanted = [processor.id_to_piece(i) for i in processor.encode(text)]
        assert [ours._names[i] for i in ours.encode(text)] == wanted, text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("fallback", [False, True])
def test_every_kind_of_sentencepiece(tmp_path: Path, kind: str, fallback: bool) -> None:
    tokenizers.spm(tmp_path / "m.model", kind, byte_fallback=fallback, vocab_size=620)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    backend = make_backend(read_spm(tmp_path / "m.model"))
    for text in varied_texts():
        assert backend.encode(text, add_special_tokens=False).ids == processor.encode(text), text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\xff\x01abc", "runs over the end"),
        (b"\x0a", "a number without an end"),
        (b"\xff" * 20, "a number without an end"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "decode"),
        (b"\x08\x01", "a number where bytes belong"),
    ],
)
def test_a_broken_sentencepiece_model(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "m.model").write_bytes(raw)
    with pytest.raises(SpmError, match=rf"m\.model: not a SentencePiece model: .*{message}"):
        read_spm(tmp_path / "m.model")


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama"])
def test_prompts_begin_alike(text_pair: Make, name: str) -> None:
    pair = text_pair(name)
    ours = read(name, pair.newer)
    for text in varied_texts():
        assert ours.prompt_ids(ours.encode(text)) == (
            pair.reference(text)["input_ids"] or ours.prompt_ids([])
        ), text


def test_a_prompt_begins_with_its_mark(text_pair: Make) -> None:
    ours = read("llama", text_pair("llama").older)
    assert ours.prompt_prefix == [1]
    assert ours.prompt_ids(ours.encode("I go home.")) == [1, *ours.encode("I go home.")]
    assert ours.prompt_ids([]) == [1]


@pytest.mark.parametrize("name", MASKED)
def test_texts_and_pairs_for_encoders(text_pair: Make, name: str) -> None:
    pair, texts = text_pair(name), varied_texts()
    ours = read(name, pair.newer)
    for first, second in pairwise(texts):
        assert ours.text_ids(first) == pair.reference(first)["input_ids"]
        if not second:  # which the reference takes for none
            continue
        ids, segments = ours.pair_ids(first, second)
        theirs = pair.reference(first, second, return_token_type_ids=True)
        assert ids == theirs["input_ids"]
        if name == "bert":
            assert segments == theirs["token_type_ids"]


@pytest.mark.parametrize("name", MASKED)
def test_masks(text_pair: Make, name: str) -> None:
    """The mask token counts where it is written, with the white space that belongs to it."""
    pair = text_pair(name)
    ours = read(name, pair.newer)
    mask = ours.mask_token
    for text in (
        f"I go {mask}.",
        f"{mask} go home",
        f"I{mask}go",
        f"a  {mask} {mask}, b",
        f"나는 {mask}에 간다",
    ):
        ids, spaced = ours.masked_ids(text)
        assert ids == pair.reference(text)["input_ids"]
        assert ids.count(ours.mask_id) == len(spaced) == text.count(mask)
        assert [piece.id for piece in ours.masked_pieces(text)] == ids[1:-1]
    assert ours.masked_ids(f"a {mask}b{mask}")[1] == [True, False]
    assert ours.mask_id not in ours.encode(f"I go {mask}.")  # but there only


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_cannot_be_typed(text_pair: Make, name: str) -> None:
    ours = read(name, text_pair(name).newer)
    for token_id in ours.special_ids:
        if ours.token_text(token_id) not in ("", "<unk>", "[UNK]"):
            assert token_id not in ours.encode(f"a {ours.token_text(token_id)} b")


@pytest.mark.parametrize(
    "name", [name for name in KINDS if tokenizers.KINDS[name].architecture != "masked_lm"]
)
def test_text_comes_back(text_pair: Make, name: str) -> None:
    """Piece by piece as a whole; the library's way but for the space before the first word."""
    pair = text_pair(name)
    ours = read(name, pair.newer)
    for text in varied_texts():
        ids = ours.encode(text)
        stream = TextStream(ours)
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)
        if not {ours.manner.unk_id} & set(ids):
            assert ours.decode(ids).strip() == pair.reference.decode(ids).strip(), text


def test_languages_and_what_a_translation_begins_with(text_pair: Make) -> None:
    """Sources and first tokens are those of the reference's own recipe for each."""
    text = "I go home."
    for name, src, tgt in (
        ("nllb", "eng_Latn", "kor_Hang"),
        ("m2m100", "en", "ko"),
        ("mbart50", "en_XX", "ko_KR"),
    ):
        pair = text_pair(name)
        ours = read(name, pair.newer)
        pair.reference.src_lang = src
        assert ours.source_ids(ours.encode(text), tgt, src_lang=src) == pair.reference(text)["input_ids"]
        token = f"__{tgt}__" if name == "m2m100" else tgt
        assert ours.target_ids(tgt) == [2, pair.reference.convert_tokens_to_ids(token)]
        assert {src, tgt} <= set(ours.sources) == set(ours.targets) == set(ours.languages)
    ours = read("marian", text_pair("marian").older)
    theirs = text_pair("marian").reference
    assert ours.source_ids(ours.encode(text), "ko", src_lang="en") == theirs(text)["input_ids"]
    assert (ours.sources, ours.targets, ours.target_ids("ko")) == (["en"], ["ko"], [2])
    assert len(read("m2m100", text_pair("m2m100").older).languages) == 100
    assert len(read("mbart50", text_pair("mbart50").older).languages) == 52


def test_a_language_in_the_source(text_pair: Make, tmp_path: Path) -> None:
    """A model with several targets is told which by a token before the text."""
    folder = Path(shutil.copytree(text_pair("marian").older, tmp_path / "m"))
    ids: dict[str, int] = json.loads((folder / "vocab.json").read_text())
    n_ids = len(ids)
    (folder / "vocab.json").write_text(json.dumps(ids | {">>kor<<": n_ids, ">>jpn<<": n_ids + 1}))
    ours = read("marian", folder)
    assert (ours.sources, ours.targets) == (["en"], ["kor", "jpn"])
    assert ours.source_ids([5], "jpn", src_lang="en") == [n_ids + 1, 5, 0]
    assert ours.encode(">>kor<< a") != [n_ids, *ours.encode("a")]


def test_a_tokenizer_of_another_manner(text_pair: Make, tmp_path: Path) -> None:
    """The first mBART tells the language behind the text, in the same files."""
    folder = Path(shutil.copytree(text_pair("mbart50").newer, tmp_path / "m"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MBartTokenizer"}')
    with pytest.raises(ValueError, match="tokenizer_class: 'MBartTokenizer' is not supported"):
        read("mbart50", folder)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_reads_the_same(text_pair: Make, tmp_path: Path, name: str) -> None:
    ours = read(name, text_pair(name).newer)
    ours.save(tmp_path)
    again = AdoptedTokenizer.read(tmp_path)
    assert again.manner == ours.manner
    assert isinstance(again, Tokenizer)
    for text in varied_texts()[:60]:
        assert again.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer\.json: not a tokenizer"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: not a JSON object"),
        ({"tokenizer_config.json": '{"legacy_behaviour": true}'}, "legacy_behaviour: true is not supported"),
        ({"tokenizer.json": None}, r"tokenizer\.json: .*nor the older"),
        ({"tokenizer_config.json": '{"mask_token": "<none>"}'}, r"tokenizer\.json: there is no mask token"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(
    text_pair: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(text_pair("bert").newer, tmp_path / "t"))
    for name, text in change.items():
        (folder / name).unlink(missing_ok=True) if text is None else (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read("bert", folder)
