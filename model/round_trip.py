"""Reranking by the way back: which of a translator's hypotheses would give the source again?

Beam search looks for the likeliest translation, and small models lose words or take them in another sense
where that reads well. The same model, asked the other way round, notices: hypotheses are ordered by the mean
log-probability of their tokens plus a share of that of the source's tokens, given the hypothesis (Yee et al.
2019, "Simple and Effective Noisy Channel Modeling for Neural Machine Translation", without a language model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from model.config import TransformerConfig
from model.models import Translator
from model.sampling import BeamParams, chosen_logprobs
from model.transfer import padded

# Tokens of a text. Of a word the way back says which translation means nothing else, not which is usual:
# "Hello" would be what is said on the telephone.
_FEWEST = 4
# Hypotheses of a text that are asked, the best of the search: further ones are hardly ever right.
MOST_ASKED = 3

T = TypeVar("T")
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
Pair = tuple[Sequence[int], Sequence[int]]  # an encoder's input, and what was made of it


def ways_back(config: TransformerConfig) -> dict[int, int]:
    """The token of each language, and that of the one it came from; empty where that is not certain."""
    tokens = list(config.languages.values())
    return dict(zip(tokens, reversed(tokens), strict=True)) if len(tokens) == 2 else {}


def can_return(config: TransformerConfig, source: Sequence[int], hypotheses: Sequence[Sequence[int]]) -> bool:
    """Is a source of the form tag, target language, text, end, the text no mere word or two, all readable?"""
    longest = max(map(len, hypotheses), default=0) + 3
    known = len(source) >= _FEWEST + 3 and source[1] in ways_back(config)
    return known and max(longest, len(source)) <= config.max_len


def best_first(
    hypotheses: Sequence[T], found: Sequence[tuple[float, int]], returned: Sequence[float], params: BeamParams
) -> list[T]:
    """Hypotheses in order by both ways; `found` has of each its search's score, and its number of tokens.

    Those that were not asked, for which `returned` has no number any more, come last. As they are where a
    number is none.
    """
    try:
        scores = [
            score * n_tokens ** (params.length_penalty - 1) + params.round_trip * back
            for (score, n_tokens), back in zip(found, returned, strict=False)
        ]
    except OverflowError:
        return list(hypotheses)
    if not all(map(math.isfinite, scores)):
        return list(hypotheses)
    asked = [hypotheses[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
    return [*asked, *hypotheses[len(scores) :]]


@torch.no_grad()
def return_logprobs(model: Translator, pairs: Sequence[Pair], decode: Decode | None = None) -> list[float]:
    """Per pair the mean log-probability of the source's tokens, the end among them, given the hypothesis.

    Pairs must be such as `can_return` says. `decode` may take the place of `Translator.decode`.
    """
    decode = decode or model.decode
    back, config = ways_back(model.config), model.config
    device = model.embeddings.tokens.weight.device
    src, tgt = [], []
    for (tag, language, *text, end), hypothesis in pairs:
        src.append([tag, back[language], *hypothesis, end])
        tgt.append([back[language], *text, end])
    inputs = padded(tgt, config.pad_id, device)
    hidden = decode(inputs[:, :-1], *model.encode(padded(src, config.pad_id, device)))
    labels = inputs[:, 1:]
    real = labels != config.pad_id
    logprobs = torch.zeros(labels.shape, device=device)
    logprobs[real] = chosen_logprobs(model.head, hidden[real], labels[real])
    means: list[float] = (logprobs.sum(1) / real.sum(1)).tolist()
    return means
