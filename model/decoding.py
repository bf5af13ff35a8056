"""Decoding, simple and slow: the oracle that tests compare the serving engine with.

Nothing is cached and nothing is shared: every step reads every prefix from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.masks import causal_mask
from model.models import CausalLM, Translator
from model.nearest import Datastore
from model.sampling import BeamParams, penalise

# (prefixes, the request that each belongs to) -> next-token logits (rows, V)
Scorer = Callable[[list[list[int]], list[int]], Tensor]


@dataclass(frozen=True)
class Decoded:
    """A hypothesis: its new tokens without the end token, and its normalised log-probability."""

    token_ids: list[int]
    score: float
    finished: bool


@dataclass
class _Beam:
    tokens: list[int]
    score: float = 0.0  # the sum of log-probabilities


@dataclass
class _Search:
    """One request's live beams and finished hypotheses."""

    live: list[_Beam]
    finished: list[Decoded] = field(default_factory=list)
    done: bool = False


def translator_scorer(
    model: Translator,
    sources: Sequence[Sequence[int]],
    stores: Sequence[Datastore | None] = (),
    suppress: Iterable[int] = (),
) -> Scorer:
    """Next-token logits of target prefixes, each row reading its own request's source alone.

    With `stores` those of its examples are mixed in, after what is suppressed.
    """
    memories = [model.encode(torch.tensor([list(source)])) for source in sources]
    banned = list(suppress)

    def score_one(prefix: list[int], request: int) -> Tensor:
        hidden = model.decode(torch.tensor([prefix]), *memories[request])[:, -1]
        logits: Tensor = model.head(hidden)
        logits[:, banned] = -torch.inf
        store = stores[request] if stores else None
        return logits if store is None else store.mix(logits, hidden)

    def score(prefixes: list[list[int]], requests: list[int]) -> Tensor:
        return torch.cat([score_one(*each) for each in zip(prefixes, requests, strict=True)])

    return score


def causal_scorer(model: CausalLM) -> Scorer:
    """Next-token logits of prefixes that begin with their prompts."""

    def score(prefixes: list[list[int]], _: list[int]) -> Tensor:
        rows = [model(torch.tensor([prefix]), causal_mask(len(prefix)))[:, -1] for prefix in prefixes]
        return torch.cat(rows)

    return score


@torch.no_grad()
def greedy(
    score: Scorer, prompt: Sequence[int], eos_id: int, max_new_tokens: int, suppress: Iterable[int] = ()
) -> list[int]:
    """The most likely token again and again, until the end token (which is left out) or the limit."""
    tokens = list(prompt)
    banned = list(suppress)
    for _ in range(max_new_tokens):
        logits = score([tokens], [0])[0]
        logits[banned] = -torch.inf
        token = int(logits.argmax())
        if token == eos_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@torch.no_grad()
def beam_search(
    score: Scorer,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    params: BeamParams,
    suppress: Iterable[int] = (),
) -> list[list[Decoded]]:
    """For each prompt its `num_return_sequences` best hypotheses, best first (Wu et al. 2016, section 7).

    Every step ranks the 2k best continuations of k beams; an end token among the first k finishes a
    hypothesis, the k best others live on. A search ends when k have finished and no live beam's score, at
    its present length, beats the worst of them, or at the maximum length.
    """
    searches = [_Search([_Beam(list(prompt))]) for prompt in prompts]
    banned = list(suppress)
    for step in range(params.max_new_tokens):
        rows = [(i, beam) for i, s in enumerate(searches) if not s.done for beam in s.live]
        if not rows:
            break
        logits = score([beam.tokens for _, beam in rows], [i for i, _ in rows])
        logits[:, banned] = -torch.inf
        if step < params.min_new_tokens:
            logits[:, eos_id] = -torch.inf
        for (i, beam), row in zip(rows, logits, strict=True):
            row.copy_(_guard(row, beam.tokens[len(prompts[i]) :], params))
        log_probs = logits.log_softmax(-1)
        for i, search in enumerate(searches):
            own = [n for n, (owner, _) in enumerate(rows) if owner == i]
            if own:
                _advance(search, log_probs[own], len(prompts[i]), eos_id, params)
    return [_ranked(search, len(prompt), params) for search, prompt in zip(searches, prompts, strict=True)]


def _advance(search: _Search, log_probs: Tensor, n_prompt: int, eos_id: int, params: BeamParams) -> None:
    """One step of one request: log_probs (its live beams, V)."""
    totals = log_probs + torch.tensor([beam.score for beam in search.live])[:, None]
    n_best = min(2 * params.num_beams, totals.numel())
    best = totals.flatten().topk(n_best)
    parents = search.live
    search.live = []
    n_new = len(parents[0].tokens) - n_prompt + 1
    cut = params.early_stopping is not None and n_new == params.max_new_tokens
    for rank, (total, flat) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        parent, token = divmod(flat, totals.size(1))
        new = parents[parent].tokens[n_prompt:]
        if total == -torch.inf:
            break
        if token == eos_id:
            if rank < params.num_beams:
                search.finished.append(Decoded(new, normalise(total, n_new, params), True))
        elif len(search.live) < params.num_beams:
            if cut and rank < params.num_beams:
                search.finished.append(Decoded([*new, token], normalise(total, n_new, params), False))
            search.live.append(_Beam([*parents[parent].tokens, token], total))
    if cut and search.finished:
        search.live = []
    search.finished = sorted(search.finished, key=lambda d: -d.score)[: params.num_beams]
    search.done = not search.live or (
        len(search.finished) == params.num_beams
        and may_stop(search.finished[-1].score, search.live[0].score, n_new, params)
    )


def may_stop(worst: float, best_total: float, n_steps: int, params: BeamParams) -> bool:
    """Can no live beam, the best of which has this sum, improve on the worst of enough that have ended?"""
    if params.early_stopping is True:
        return True
    longest = params.early_stopping == "never" and params.length_penalty > 0
    return worst >= normalise(best_total, params.max_new_tokens if longest else n_steps, params)


def _ranked(search: _Search, n_prompt: int, params: BeamParams) -> list[Decoded]:
    """Finished hypotheses first; a search that ran out of length is filled up with unfinished ones."""
    open_ends = [
        Decoded(b.tokens[n_prompt:], normalise(b.score, len(b.tokens) - n_prompt, params), False)
        for b in search.live
    ]
    return [*search.finished, *sorted(open_ends, key=lambda d: -d.score)][: params.num_return_sequences]


def normalise(total: float, length: int, params: BeamParams) -> float:
    """A sum of log-probabilities over length to the power of the length penalty."""
    return float(total / max(1, length) ** params.length_penalty)


def _guard(logits: Tensor, new: list[int], params: BeamParams) -> Tensor:
    """Apply the repetition guards to one row (V,)."""
    if params.repetition_penalty != 1.0 and new:
        history = torch.tensor([new])
        logits = penalise(logits[None], history, torch.tensor([params.repetition_penalty]))[0]
    for token in repeated_ngram_tokens(new, params.no_repeat_ngram_size):
        logits[token] = -torch.inf
    return logits


def repeated_ngram_tokens(tokens: Sequence[int], size: int) -> set[int]:
    """The tokens that would complete an n-gram of this size a second time (Paulus et al. 2018)."""
    if size < 1 or len(tokens) < size:
        return set()
    tail = tuple(tokens[len(tokens) - size + 1 :])
    ngrams = zip(*(tokens[i:] for i in range(size)), strict=False)
    return {ngram[-1] for ngram in ngrams if ngram[:-1] == tail}
