"""Sentences with one mask and every word that makes sense there: does a masked model find one?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.examples import Examples
from model.models import MaskedLM
from model.nearest_words import fillable, find_votes
from model.tokenizer import MASK, Tokenizer
from model.training.packs import TEXTS, PackError
from model.training.scores import Row, percent

CLOZE = TEXTS / "cloze.tsv"


class Cloze(NamedTuple):
    """A sentence with one mask; answers in small letters."""

    language: str
    text: str
    answers: frozenset[str]


def read_cloze(path: Path = CLOZE) -> list[Cloze]:
    """language TAB text TAB answers, parted by bars. Raises `PackError` on a line of another form."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        language, text, answers = [*line.split("\t"), "", "", ""][:3]
        words = frozenset(answer.casefold() for answer in answers.split("|") if answer)
        if language not in ("en", "ko") or text.count(MASK) != 1 or not words:
            raise PackError(f"{path}:{number}: not a language, a text with one {MASK}, and answers")
        found.append(Cloze(language, text, words))
    return found


@torch.no_grad()
def cloze_rows(
    model: MaskedLM, tokenizer: Tokenizer, sentences: Sequence[Cloze], examples: Examples | None = None
) -> list[Row]:
    """Per language: of how many sentences the best filling is an answer, and one of the five best.

    Fillings are such as the service gives: begun with a space where the mask has one before it. With
    `examples` once more, after the words that stand there in known sentences.
    """
    device = next(model.parameters()).device
    allowed = {spaced: fillable(tokenizer, spaced) for spaced in (False, True)}
    hits: dict[str, list[tuple[bool, bool]]] = {}

    def note(name: str, probs: Tensor, answers: frozenset[str]) -> None:
        words = [tokenizer.token_text(i).strip().casefold() for i in probs.topk(5).indices.tolist()]
        hits.setdefault(name, []).append((words[0] in answers, any(word in answers for word in words)))

    for language, text, answers in sentences:
        ids, (spaced,) = tokenizer.masked_ids(text)
        slot = torch.tensor([[ids.index(tokenizer.mask_id)]], device=device)
        token_ids = torch.tensor([ids], device=device)
        hidden = model.encode(token_ids, torch.zeros_like(token_ids))[0, slot[0]]
        logits = model.mlm_head(hidden)[0].cpu().masked_fill(~allowed[spaced], -torch.inf)
        probs = logits.softmax(-1)
        note(language, probs, answers)
        if examples is not None:
            (votes,) = find_votes(examples, text, tokenizer, model.config, model.config.example_weight)
            note(f"{language}, with examples", votes.mix(probs) if votes else probs, answers)
    return [
        {
            "sentences with one mask": language,
            "n": str(len(found)),
            "best makes sense": percent(sum(first for first, _ in found), len(found)),
            "one of five does": percent(sum(some for _, some in found), len(found)),
        }
        for language, found in sorted(hits.items())
    ]
