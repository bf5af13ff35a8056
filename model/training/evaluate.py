"""`python -m model.training evaluate`: measure a model, print a table, write it into the model's card."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import sacrebleu
import torch

from model.checkpoint import Checkpoint, CheckpointError, load
from model.examples import Examples, find_files, read_files
from model.inference import optimise
from model.kernels import compiled
from model.models import CausalLM, Classifier, MaskedLM, Translator
from model.sampling import BeamParams
from model.training import prepare
from model.training.cloze import cloze_rows, read_cloze
from model.training.failures import copying_rows, everyday_rows, failure_rows, read_copying
from model.training.labelled import Labelled, probabilities, read_labelled, score_labels
from model.training.ngram import NGram, shard_sequences
from model.training.packs import PackError, find_pack
from model.training.scores import (
    DIRECTIONS,
    Corpus,
    Row,
    Translation,
    bleu_tokenizer,
    markdown_table,
    score_causal,
    score_corpus,
    score_masked,
    score_ngram,
    translate_all,
)
from model.training.shards import Document, Shard, held_out

T = TypeVar("T")
PAIR_PACK = "written.en-ko.tsv.xz"
STORIES = "tales.en-ko.tsv.xz"
OWN_PACKS = (  # that come with the code
    "more.en-ko.tsv.xz",
    "more-2.en-ko.tsv.xz",
    "more-3.en-ko.tsv.xz",
    "more-4.en-ko.tsv.xz",
    "more-5.en-ko.tsv.xz",
    "more-6.en-ko.tsv.xz",
    "more-7.en-ko.tsv.xz",
    "more-8.en-ko.tsv.xz",
    "more-9.en-ko.tsv.xz",
    "more-10.en-ko.tsv.xz",
    "more-11.en-ko.tsv.xz",
    "more-12.en-ko.tsv.xz",
    "more-13.en-ko.tsv.xz",
    "more-14.en-ko.tsv.xz",
    "more-15.en-ko.tsv.xz",
    "phrases.en-ko.tsv.xz",
    STORIES,
)
TEXT_PACKS = ("mono.en.txt.xz", "mono.ko.txt.xz")
CARD, HELD = "README.md", "held-out"
START, STOP = "<!-- scores -->", "<!-- /scores -->"
_DOCUMENTS, _SENTENCES = 200, 30  # per language where --limit says nothing, and per document: books are long


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evaluate`."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--data", type=Path, help="folder that holds the packs: their held-out part is measured"
    )
    parser.add_argument(
        "--pairs", type=Path, nargs=2, action="append", default=[], metavar=("SRC", "REF"),
        help="line-parallel files for a translator; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--direction", choices=DIRECTIONS, action="append", default=[],
        help="of each --pairs in turn; left out, both are measured and Korean is recognised",
    )  # fmt: skip
    parser.add_argument(
        "--labelled", type=Path, action="append", default=[], metavar="FILE",
        help="labelled texts for a classifier; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--yardstick", type=Path, metavar="SHARD",
        help="what a language model's training read (RUN/train): a 5-gram model of it is measured too",
    )  # fmt: skip
    parser.add_argument(
        "--yardstick-tokens",
        type=int,
        default=0,
        metavar="N",
        help="count only so many tokens of it; 0 is all",
    )
    parser.add_argument(
        "--copying",
        action="store_true",
        help="do names, numbers, addresses and code come through a translator?",
    )
    parser.add_argument(
        "--everyday", action="store_true", help="a translator's versions of a hundred sentences, to be read"
    )
    parser.add_argument(
        "--cloze",
        action="store_true",
        help="how often a masked model's filling makes sense (texts/cloze.tsv)",
    )
    parser.add_argument(
        "--failures", type=int, default=0, metavar="N",
        help="count a translator's failures on N held-out sentences of all packs in --data",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="examples of each text; 0 is all")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--length-penalty", type=float, help="else the model's own")
    parser.add_argument("--round-trip", type=float, help="what the way back counts; else the model's own")
    parser.add_argument(
        "--examples", type=Path, action="append", default=[], metavar="PLACE",
        help="a file or folder of known translations that a translator, and --cloze, reads, as the service "
        "does, but for pairs that are held out; may be repeated",
    )  # fmt: skip
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, metavar="N")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128, help="beams that are decoded at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quantization", choices=("none", "int8"), default="none", help="int8: as a CPU serves it"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N translations of each text")
    parser.add_argument(
        "--card", action="store_true", help=f"write the table into {CARD} of the model's folder"
    )


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Measure, print, and write the card where asked; returns the exit status."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        report = _report(arguments)
    except (CheckpointError, PackError, OSError, ValueError) as error:
        print(f"evaluate: {error}")
        return 1
    print(report)
    if arguments.card:
        write_card(arguments.model / CARD, report)
    return 0


def _report(arguments: argparse.Namespace) -> str:
    """The table with a line below that says how it was measured."""
    checkpoint = load(arguments.model, arguments.device)
    if arguments.quantization != "none":
        optimise(checkpoint.model, arguments.quantization, compiled())
    started = time.monotonic()
    more: list[list[Row]] = []
    if isinstance(checkpoint.model, Translator):
        examples = _examples(arguments)
        rows, note = _translator_rows(arguments, checkpoint, checkpoint.model, examples)
        more = _failure_tables(arguments, checkpoint, checkpoint.model, examples)
    elif isinstance(checkpoint.model, MaskedLM):
        rows, note = _masked_rows(arguments, checkpoint, checkpoint.model)
        if arguments.cloze:
            examples = _examples(arguments)
            more.append(cloze_rows(checkpoint.model, checkpoint.tokenizer, read_cloze(), examples))
    elif isinstance(checkpoint.model, Classifier):
        rows, note = _classifier_rows(arguments, checkpoint, checkpoint.model)
    else:
        rows, note = _causal_rows(arguments, checkpoint, checkpoint.model)
    found = [table for table in (rows, *more) if table]
    if not found:
        raise ValueError(
            "nothing to measure: give --data, --pairs, --copying or --everyday for a translator, "
            "--cloze for a masked model, --labelled for a classifier"
        )
    seconds = time.monotonic() - started
    tables = "\n\n".join(map(markdown_table, found))
    how = "" if arguments.quantization == "none" else f" in {arguments.quantization}"
    if not rows and isinstance(checkpoint.model, MaskedLM):
        note = "Of each sentence the five best fillings."  # the other is on what is not there
    return f"{tables}\n\n{note} Weights {checkpoint.sha256[:12]}{how}, measured in {seconds:.0f} s.\n"


# --- the three kinds --------------------------------------------------------------------------


def _translator_rows(
    arguments: argparse.Namespace, checkpoint: Checkpoint, model: Translator, examples: Examples | None
) -> tuple[list[Row], str]:
    params = _beam_params(arguments, checkpoint)
    rows = []
    held: dict[str, tuple[Corpus, list[Translation]]] = {}
    for corpus in corpora(arguments):
        language = corpus.direction[-2:]
        translations = translate_all(
            model, checkpoint.tokenizer, corpus.sources, language, params, arguments.rows, examples
        )
        rows.append(score_corpus(corpus, translations))
        _show(corpus, translations[: arguments.show])
        if corpus.name.startswith(HELD):
            empty = Corpus(f"{HELD}, all of these", corpus.direction, [], [])
            whole, all_translations = held.setdefault(corpus.direction, (empty, []))
            whole.references.extend(corpus.references)
            all_translations.extend(translations)
    rows += [score_corpus(*together) for together in held.values()]
    note = (
        f"sacrebleu {sacrebleu.__version__}; BLEU with {bleu_tokenizer('en')} for English and "
        f"{bleu_tokenizer('ko')} for Korean, chrF2; {_search(params)}."
    )
    if examples is not None:
        note += f" With {len(examples)} examples, among them none that is held out."
    return rows, note


def _examples(arguments: argparse.Namespace) -> Examples | None:
    """What the service reads, but for what is measured."""
    places = [
        {languages: [p for p in pairs if not any(map(held_out, p))] for languages, pairs in place.items()}
        for place in read_files(find_files(arguments.examples))
    ]
    return Examples.build(*places) if places else None


def _search(params: BeamParams) -> str:
    named = [f"{params.num_beams} beams", f"length penalty {params.length_penalty:g}"]
    if params.round_trip:
        named.append(f"way back {params.round_trip:g}")
    if params.no_repeat_ngram_size:
        named.append(f"no {params.no_repeat_ngram_size}-gram twice")
    if params.repetition_penalty != 1.0:
        named.append(f"repetition penalty {params.repetition_penalty:g}")
    return ", ".join([*named, f"at most {params.max_new_tokens} tokens"])


def _beam_params(arguments: argparse.Namespace, checkpoint: Checkpoint) -> BeamParams:
    if arguments.no_repeat_ngram_size < 0:
        raise ValueError(f"--no-repeat-ngram-size is {arguments.no_repeat_ngram_size}; 0 is off")
    if arguments.repetition_penalty <= 0:
        raise ValueError(f"--repetition-penalty is {arguments.repetition_penalty:g}; it must be above 0")
    longest = min(arguments.max_new_tokens, checkpoint.config.max_len)
    own, asked = checkpoint.config.length_penalty, arguments.length_penalty
    return BeamParams(
        arguments.beams,
        length_penalty=own if asked is None else asked,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        repetition_penalty=arguments.repetition_penalty,
        max_new_tokens=longest,
        example_weight=checkpoint.config.example_weight if arguments.examples else 0.0,
        round_trip=checkpoint.config.round_trip if arguments.round_trip is None else arguments.round_trip,
    )


def _failure_tables(
    arguments: argparse.Namespace, checkpoint: Checkpoint, model: Translator, examples: Examples | None
) -> list[list[Row]]:
    """What should be copied, and the counts of failures over held-out sentences of every source."""
    params = _beam_params(arguments, checkpoint)

    def translate(texts: Sequence[str], language: str) -> list[Translation]:
        return translate_all(model, checkpoint.tokenizer, texts, language, params, arguments.rows, examples)

    tables = [copying_rows(translate, read_copying())] if arguments.copying else []
    if arguments.everyday:
        tables.append(everyday_rows(translate))
    if arguments.failures:
        packs = sorted(arguments.data.glob("*.en-ko.tsv.xz")) if arguments.data else []
        if not packs:
            raise ValueError("--failures needs --data with packs of pairs")
        tables.append(failure_rows(translate, packs, arguments.failures))
    return tables


def _show(corpus: Corpus, translations: Sequence[Translation]) -> None:
    for source, translation, reference in zip(corpus.sources, translations, corpus.references, strict=False):
        print(f"{source}\n  -> {translation.text}\n  == {reference}")


def _masked_rows(
    arguments: argparse.Namespace, checkpoint: Checkpoint, model: MaskedLM
) -> tuple[list[Row], str]:
    rows = [
        score_masked(model, checkpoint.tokenizer, name, documents)
        for name, documents in held_texts(arguments)
    ]
    note = "Held-out text; 15% of the tokens, every one of them masked; B is the next passage half the time."
    return rows, note


def _causal_rows(
    arguments: argparse.Namespace, checkpoint: Checkpoint, model: CausalLM
) -> tuple[list[Row], str]:
    tokenizer, note, ngram = checkpoint.tokenizer, "Held-out text, in windows of 256 tokens.", None
    if arguments.yardstick:
        shard = Shard(arguments.yardstick)
        ngram = NGram(
            shard_sequences(shard, tokenizer.bos_id, arguments.yardstick_tokens), tokenizer.vocab_size
        )
        counted = min(arguments.yardstick_tokens or len(shard.tokens), len(shard.tokens))
        note += f" The {ngram.n}-gram model (Kneser-Ney) counted {counted} tokens and knows no windows."
    rows = []
    for name, documents in held_texts(arguments):
        row = score_causal(model, tokenizer, name, documents)
        if ngram:
            row[f"{ngram.n}-gram bits per byte"] = score_ngram(ngram, tokenizer, documents)
        rows.append(row)
    return rows, note


def _classifier_rows(
    arguments: argparse.Namespace, checkpoint: Checkpoint, model: Classifier
) -> tuple[list[Row], str]:
    labels = checkpoint.config.labels
    rows = []
    for path in arguments.labelled:
        examples = sample(read_labelled(path), arguments.limit)
        data = Labelled(examples, labels, checkpoint.tokenizer, checkpoint.config.max_len)
        found = probabilities(model, data)
        rows.append(score_labels(path.name.split(".")[0], labels, data, found))
        for example, shares in zip(examples[: arguments.show], found.tolist(), strict=False):
            best = max(range(len(labels)), key=lambda i: shares[i])
            print(f"{labels[best]} {shares[best]:.2f} (is {example.label}): {' / '.join(example.texts)}")
    return rows, "Accuracy, and of each label the share that was recognised, in per cent."


# --- the texts --------------------------------------------------------------------------------


def corpora(arguments: argparse.Namespace) -> Iterator[Corpus]:
    """The pairs of files, then the data folder's development files and held-out pairs by source."""
    if arguments.direction and len(arguments.direction) != len(arguments.pairs):
        raise ValueError(f"{len(arguments.pairs)} --pairs but {len(arguments.direction)} --direction")
    for i, (source, reference) in enumerate(arguments.pairs):
        pairs = read_parallel(source, reference)
        if arguments.direction:
            yield _corpus(source.name, arguments.direction[i], sample(pairs, arguments.limit))
        else:
            yield from _both_ways(source.name, english_first(pairs), arguments.limit)
    if arguments.data is None:
        return
    for english in sorted((arguments.data / "dev").glob("*.eng")):
        yield from _both_ways(
            english.stem, read_parallel(english, english.with_suffix(".kor")), arguments.limit
        )
    for pack in (find_pack(arguments.data, name) for name in (PAIR_PACK, *OWN_PACKS)):
        if pack.exists():
            yield from _held_corpora(pack, arguments.limit)


def _held_corpora(pack: Path, limit: int) -> Iterator[Corpus]:
    by_source: dict[str, list[tuple[str, str]]] = {}
    for label, (english, korean, *_) in prepare.pair_documents([pack], held=True):
        by_source.setdefault(label, []).append((english, korean))
    for source, pairs in sorted(by_source.items()):
        yield from _both_ways(f"{HELD} {source} ({pack.name.partition('.')[0]})", pairs, limit)


def _both_ways(name: str, pairs: Sequence[tuple[str, str]], limit: int) -> Iterator[Corpus]:
    """pairs of (English, Korean)."""
    chosen = sample(pairs, limit)
    yield _corpus(name, "en-ko", chosen)
    yield _corpus(name, "ko-en", [(korean, english) for english, korean in chosen])


def _corpus(name: str, direction: str, pairs: Iterable[tuple[str, str]]) -> Corpus:
    """pairs of (source, reference)."""
    sources, references = (list(side) for side in zip(*pairs, strict=True))
    return Corpus(name, direction, sources, references)


def read_parallel(first: Path, second: Path) -> list[tuple[str, str]]:
    """Line by line. Raises ValueError when the files differ in length or hold nothing."""
    sides = [path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for path in (first, second)]
    if len(sides[0]) != len(sides[1]) or sides == [[""], [""]]:
        raise ValueError(f"{first} has {len(sides[0])} lines, {second} has {len(sides[1])}")
    return [(a.strip(), b.strip()) for a, b in zip(*sides, strict=True)]


def english_first(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same pairs with the side that holds more Hangul second."""
    hangul = [sum("가" <= c <= "힣" for pair in pairs for c in pair[side]) for side in (0, 1)]
    return [(b, a) for a, b in pairs] if hangul[0] > hangul[1] else pairs


def held_texts(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Document]]]:
    """The beginnings of each language's held-out documents, its held-out everyday sentences and stories."""
    if arguments.data is None:
        return
    for pack in (arguments.data / name for name in TEXT_PACKS):
        if pack.exists():
            beginnings = [(label, units[:_SENTENCES]) for label, units in prepare.passages([pack], held=True)]
            yield pack.name.split(".txt")[0], sample(beginnings, arguments.limit or _DOCUMENTS)
    pack = arguments.data / PAIR_PACK
    if pack.exists():
        pairs = [units for _, units in prepare.pair_documents([pack], held=True)]
        for side, name in enumerate(("sentences.en", "sentences.ko")):
            yield name, [(name, [pair[side]]) for pair in sample(pairs, arguments.limit)]
    pack = find_pack(arguments.data, STORIES)
    if pack.exists():
        stories = list(prepare.stories(pack, held=True))
        for name in dict.fromkeys(name for name, _ in stories):
            yield name, sample([story for story in stories if story[0] == name], arguments.limit)


def sample(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly spread; 0 takes all."""
    if not limit or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


# --- the card ---------------------------------------------------------------------------------

_SECTION = re.compile(f"{re.escape(START)}.*?(?:{re.escape(STOP)}|{re.escape(START)})", re.DOTALL)


def write_card(path: Path, report: str) -> None:
    """Replace what stands between the marks in a card; without marks, add them at its end."""
    section = f"{START}\n{report.rstrip()}\n{STOP}"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: section, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    path.write_text(text, encoding="utf-8")
