"""Tiny tokenizers of every kind, trained here, in the files that each family's own would have."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.families.texts import corpus

END = ["<|endoftext|>"]
MARKS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def bytes_of_words(folder: Path, special: list[str], composed: bool = False) -> None:
    """vocab.json and merges.txt."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC() if composed else None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer=trainer)
    backend.model.save(str(folder))


def wordpiece(folder: Path) -> None:
    """vocab.txt."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text.lower() for text in corpus()], trainer=trainer)
    backend.model.save(str(folder))


def spm(path: Path, kind: str, texts: list[str] | None = None, **options: Any) -> None:
    """A .model file."""
    lines = path.with_suffix(".txt")
    lines.write_text("\n".join(text.replace("\n", " ") for text in texts or corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=options.pop("vocab_size", 480),
        model_type=kind,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    lines.unlink()
    path.with_suffix(".vocab").unlink()
    if path.suffix != ".model":
        path.with_suffix(".model").rename(path)


def pieces(path: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def marian(folder: Path) -> None:
    """source.spm, target.spm, and the ids of the pieces of both."""
    half = len(corpus()) // 2
    spm(folder / "source.spm", "unigram", corpus()[:half], vocab_size=300)
    spm(folder / "target.spm", "unigram", corpus()[half:], vocab_size=300)
    both = [*pieces(folder / "source.spm"), *pieces(folder / "target.spm")]
    words = [p for p in dict.fromkeys(both) if p not in ("<s>", "</s>", "<unk>")]
    ids = {piece: i for i, piece in enumerate(["</s>", "<unk>", *words, "<pad>"])}
    write_json(folder / "vocab.json", ids)
    write_json(folder / "tokenizer_config.json", {"source_lang": "en", "target_lang": "ko"})


def m2m100(folder: Path) -> None:
    """sentencepiece.bpe.model, and ids in another order."""
    spm(folder / "sentencepiece.bpe.model", "bpe")
    words = pieces(folder / "sentencepiece.bpe.model")[3:]
    ids = {piece: i for i, piece in enumerate([*MARKS[:4], *sorted(words)])}
    write_json(folder / "vocab.json", ids)


def llama(folder: Path) -> None:
    """tokenizer.model, with bytes for what is unknown and every space kept."""
    spm(
        folder / "tokenizer.model",
        "bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def nllb(folder: Path) -> None:
    """sentencepiece.bpe.model, and languages that the settings list."""
    spm(folder / "sentencepiece.bpe.model", "bpe")
    languages = ["ace_Arab", "eng_Latn", "kor_Hang", "zho_Hans", "zho_Hant"]
    write_json(folder / "tokenizer_config.json", {"additional_special_tokens": languages})


@dataclass(frozen=True)
class Kind:
    """How to make the older files, and the class of the reference that reads them."""

    make: Callable[[Path], None]
    reference: str
    family: str
    architecture: str
    spm: str = ""  # the file that the library of the same name would read


KINDS = {
    "gpt2": Kind(lambda f: bytes_of_words(f, END), "GPT2Tokenizer", "gpt2", "causal_lm"),
    "qwen2": Kind(
        lambda f: bytes_of_words(f, ["<|endoftext|>"], True), "Qwen2Tokenizer", "qwen2", "causal_lm"
    ),
    "llama": Kind(llama, "LlamaTokenizer", "llama", "causal_lm", "tokenizer.model"),
    "bert": Kind(wordpiece, "BertTokenizer", "bert", "masked_lm"),
    "distilbert": Kind(wordpiece, "DistilBertTokenizer", "distilbert", "masked_lm"),
    "roberta": Kind(lambda f: bytes_of_words(f, MARKS), "RobertaTokenizer", "roberta", "masked_lm"),
    "xlm-roberta": Kind(
        lambda f: spm(f / "sentencepiece.bpe.model", "unigram"),
        "XLMRobertaTokenizer",
        "xlm-roberta",
        "masked_lm",
        "sentencepiece.bpe.model",
    ),
    "mbart50": Kind(
        lambda f: spm(f / "sentencepiece.bpe.model", "unigram"),
        "MBart50Tokenizer",
        "mbart",
        "translator",
        "sentencepiece.bpe.model",
    ),
    "nllb": Kind(nllb, "NllbTokenizer", "m2m_100", "translator", "sentencepiece.bpe.model"),
    "m2m100": Kind(m2m100, "M2M100Tokenizer", "m2m_100", "translator"),
    "marian": Kind(marian, "MarianTokenizer", "marian", "translator"),
}
