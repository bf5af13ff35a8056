"""`python -m model.training shortlist`: what each token may become in a translation, by the training pairs.

IBM model 1 (Brown et al. 1993) over the tokens of sentences: how likely a target token is beside a source
token, fitted by expectation maximisation. A token counts once in a sentence; the empty word may become any.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import load_config
from model.shortlist import SHORTLIST_FILE, Ids, Shortlist, Table
from model.tokenizer import Tokenizer
from model.training.translate import TranslateTask

Pair = tuple[NDArray[Any], NDArray[Any]]  # the tokens of a source, and of its translation


class Lexicon(NamedTuple):
    """Links of a source token and a target token, each (L,): how likely, and how often made."""

    source: Ids
    target: Ids
    probability: NDArray[np.float64]
    times: NDArray[np.float64]


def fit_lexicon(pairs: Iterable[Pair], vocab_size: int, rounds: int = 6) -> Lexicon:
    """The links between the tokens of pairs, those of the empty word left out."""
    links, widths = [], []
    narrow: type[np.signedinteger[Any]] = np.int32 if vocab_size * (vocab_size + 1) < 2**31 else np.int64
    for source, target in pairs:
        if len(source) and len(target):
            left = np.append(np.unique(source).astype(np.int64), vocab_size)
            right = np.unique(target).astype(np.int64)
            links.append((right[:, None] + vocab_size * left[None]).ravel().astype(narrow))
            widths.append(np.full(len(right), len(left), dtype=np.int32))
    width = np.concatenate(widths)  # of the links that explain one target token, which lie together
    firsts = np.cumsum(width, dtype=np.int64) - width
    unique, which, found = np.unique(np.concatenate(links), return_inverse=True, return_counts=True)
    del links
    words, becomes = np.divmod(unique.astype(np.int64), vocab_size)
    times: NDArray[Any] = found.astype(np.float64)
    for _ in range(rounds):
        probability = times / np.bincount(words, weights=times)[words]
        share = probability[which]
        share /= np.repeat(np.add.reduceat(share, firsts), width)
        times = np.bincount(which, weights=share, minlength=len(unique))
    probability = times / np.bincount(words, weights=times)[words]
    kept = words < vocab_size
    return Lexicon(words[kept], becomes[kept], probability[kept], times[kept])


def make_table(lexicon: Lexicon, common: Ids, vocab_size: int, likely: float, seen: float) -> Table:
    """What is at least so likely and was seen so often, but for what is common."""
    is_common = np.zeros(vocab_size, dtype=bool)
    is_common[common] = True
    kept = (lexicon.probability >= likely) & (lexicon.times >= seen) & ~is_common[lexicon.target]
    source, target = lexicon.source[kept], lexicon.target[kept]
    order = np.lexsort((target, source))
    starts = np.searchsorted(source[order], np.arange(vocab_size + 1))
    return Table(np.sort(common), target[order], starts.astype(np.int64))


def most_common(sides: Iterable[NDArray[Any]], tokenizer: Tokenizer, n: int) -> Ids:
    """The n most frequent tokens of these texts, with all single bytes and the end; no other special one."""
    times = np.zeros(tokenizer.vocab_size)
    for ids in sides:
        np.add.at(times, ids, 1)
    chosen = set(np.argsort(-times, kind="stable")[:n].tolist())
    chosen |= {i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return np.array(sorted(chosen - (tokenizer.special_ids - {tokenizer.eos_id}) | {tokenizer.eos_id}))


def add_shortlist_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside a recipe."""
    parser.add_argument("--common", type=int, default=4000, help="tokens that any translation may need")
    parser.add_argument("--likely", type=float, default=0.0002, help="least probability of a link")
    parser.add_argument("--seen", type=float, default=0.1, help="least expected number of a link")


def shortlist_command(arguments: argparse.Namespace, task: TranslateTask, tokenizer: Tokenizer) -> str:
    """Write the table into the translator's folder, which has the tokenizer; returns what to say."""
    rng = np.random.default_rng(task.seed)
    chosen = np.flatnonzero(rng.random(len(task.weights)) < task.weights)  # a pair counts once at most
    tables, said = {}, []
    for direction, language in enumerate(("ko", "en")):
        pairs = list(_sides(task, chosen, direction, rng))
        common = most_common((target for _, target in pairs), tokenizer, arguments.common)
        lexicon = fit_lexicon(pairs, tokenizer.vocab_size)
        table = make_table(lexicon, common, tokenizer.vocab_size, arguments.likely, arguments.seen)
        tables[language] = table
        said.append(f"{language}: {len(pairs)} pairs, {len(table.likely)} links")
    Shortlist(tables, load_config(arguments.tokenizer)).save(arguments.tokenizer)
    return f"{'; '.join(said)} -> {arguments.tokenizer / SHORTLIST_FILE}"


def _sides(task: TranslateTask, chosen: Ids, direction: int, rng: np.random.Generator) -> Iterator[Pair]:
    """What the translator learns in a direction (0 to Korean, 1 to English): source and target.

    Sources as people type them (in small letters, without spaces) beside those as they are written, as often
    as it meets them.
    """
    for document in chosen[task.learned[chosen, direction]]:
        first = task.first[document]
        target = task.shard.unit(first + 1 - direction)
        yield task.shard.unit(first + direction), target
        if task.twins[document] and rng.random() < task.noise:
            yield task.shard.unit(first + direction + 2), target
