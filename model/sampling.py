"""From logits to token ids: what a request may ask for, and one vectorised step over all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from model.constraints import Phrase

_ROWS = 64  # of logits at a time


@dataclass(frozen=True)
class SamplingParams:
    """How one generation draws its tokens. `temperature` 0 is greedy; `top_k` 0 and the ones are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    seed: int | None = None
    top_n_tokens: int = 0
    logprobs: bool = True  # False: nobody reads log-probabilities; 0.0 stands for each


@dataclass(frozen=True)
class BeamParams:
    """How one sentence is translated. A score is divided by the length to the power of `length_penalty`.

    `early_stopping` None: once num_beams hypotheses have ended, a search goes on while a beam's score at its
    present length beats the worst of them; those that have ended come first. The other values are the rules
    of the transformers library, by which hypotheses cut at the maximum length compete with those that ended:
    False otherwise the same, "never" with the score that a beam might have at the maximum length, True no
    longer than until num_beams have ended.

    With `round_trip` those that have ended are put in order once more (`model.round_trip`), by the mean
    log-probability of their tokens plus so much of that of the source's tokens, given them. It goes by the
    rule of None alone. `example_weight` is the most that examples count in choosing a token, where there are
    some (`model.nearest`).
    """

    num_beams: int = 4
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    return_alignment: bool = False
    early_stopping: bool | Literal["never"] | None = None
    required: tuple[Phrase, ...] = ()
    round_trip: float = 0.0
    example_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} is not in 1..num_beams {self.num_beams}"
            )
        if self.round_trip and self.early_stopping is not None:
            raise ValueError("round_trip and early_stopping exclude each other")
        if not 0.0 <= self.example_weight < 1.0:
            raise ValueError(f"example_weight {self.example_weight} is not in [0, 1)")


def chosen_logprobs(head: nn.Module, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """hidden (N, D), token_ids (N,) -> the log-probability of each token by the head, (N,)."""
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(hidden), _ROWS):  # in parts: (N, V) is large
        part = slice(start, start + _ROWS)
        logprobs = head(hidden[part]).float().log_softmax(-1)
        parts.append(logprobs.gather(1, token_ids[part, None])[:, 0])
    return torch.cat(parts)


def penalise(
    logits: Tensor,
    history: Tensor,
    repetition: Tensor,
    frequency: Tensor | None = None,
    presence: Tensor | None = None,
) -> Tensor:
    """Make tokens of the history less likely, out of place.

    logits (B, V); history (B, S), token ids with -1 where there is none; repetition (B,) divides positive
    and multiplies negative logits of every token that occurred (Keskar et al. 2019, section 4.1);
    frequency (B,) is subtracted once per occurrence, presence (B,) once where there is any.
    """
    real = history >= 0
    ids = history.clamp(min=0)
    counts = torch.zeros_like(logits).scatter_add_(1, ids, real.to(logits.dtype))
    if frequency is not None:
        logits = logits - counts * frequency[:, None]
    if presence is not None:
        logits = logits - (counts > 0) * presence[:, None]
    factor = repetition[:, None]
    penalised = torch.where(logits > 0, logits / factor, logits * factor)
    return torch.where(counts > 0, penalised, logits)


def _chunks(logits: Tensor) -> Tensor | None:
    """logits (B, V) as (B, V / C, C), None where V is no multiple of a good C."""
    for size in (256, 128):
        if logits.size(-1) % size == 0:
            return logits.view(logits.size(0), -1, size)
    return None


def likeliest(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of (B, V), the first of equals; by chunks, which a CPU
    does 7 times faster (a GPU would have six more kernels to launch)."""
    chunks = None if logits.is_cuda else _chunks(logits)
    if chunks is None:
        return logits.argmax(-1)
    chunk = chunks.amax(-1).argmax(-1)
    rows = torch.arange(len(logits), device=logits.device)
    return chunk * chunks.size(-1) + chunks[rows, chunk].argmax(-1)


def top_tokens(logits: Tensor, n_best: int) -> tuple[Tensor, Tensor]:
    """The n greatest of each row of (B, V), with their indices, each (B, n), best first.

    The n greatest lie in the n chunks with the greatest maxima.
    """
    n_best = min(n_best, logits.size(-1))
    chunks = _chunks(logits)
    if chunks is None or chunks.size(1) <= n_best:
        values, indices = logits.topk(n_best, dim=-1)
        return values, indices
    chosen = chunks.amax(-1).topk(n_best, dim=-1).indices  # (B, n)
    size = chunks.size(-1)
    candidates = chunks.gather(1, chosen[..., None].expand(-1, -1, size)).flatten(1)  # (B, n * C)
    best = candidates.topk(n_best, dim=-1)
    return best.values, chosen.gather(1, best.indices // size) * size + best.indices % size


def top_k_mask(logits: Tensor, top_k: Tensor) -> Tensor:
    """logits (B, V), top_k (B,) with 0 for off -> bool (B, V), True = may be drawn."""
    size = logits.size(-1)
    wanted = torch.where(top_k > 0, top_k, size).clamp(max=size)
    ordered = logits.sort(dim=-1, descending=True).values
    return logits >= ordered.gather(1, (wanted - 1)[:, None])


def top_p_mask(logits: Tensor, top_p: Tensor) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the fewest tokens whose probability reaches top_p (B,)."""
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = probs.cumsum(-1) - probs
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before < top_p[:, None])


def typical_mask(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2023): tokens whose surprise is nearest the entropy."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.clamp(min=-1e4)).sum(-1, keepdim=True)
    order = (-log_probs - entropy).abs().sort(dim=-1).indices
    ordered = probs.gather(1, order)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before < typical_p[:, None])


@dataclass(frozen=True)
class SamplingRows:
    """The parameters of B rows as tensors (B,), and as flags which work any row needs at all.

    A flag only skips work that would change nothing, so a row's answer never depends on its neighbours.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    typical_p: Tensor
    any_sampling: bool
    any_top_k: bool
    any_top_p: bool
    any_typical: bool
    any_logprobs: bool

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingRows:
        return cls(
            temperature=torch.tensor([p.temperature for p in params], device=device),
            top_k=torch.tensor([p.top_k for p in params], device=device),
            top_p=torch.tensor([p.top_p for p in params], device=device),
            typical_p=torch.tensor([p.typical_p for p in params], device=device),
            any_sampling=any(p.temperature > 0 for p in params),
            any_top_k=any(p.temperature > 0 and p.top_k > 0 for p in params),
            any_top_p=any(p.temperature > 0 and p.top_p < 1 for p in params),
            any_typical=any(p.temperature > 0 and p.typical_p < 1 for p in params),
            any_logprobs=any(p.logprobs or p.top_n_tokens for p in params),
        )

    def at(self, indices: Tensor) -> SamplingRows:
        """Some of the rows."""
        names = ("temperature", "top_k", "top_p", "typical_p")
        return replace(self, **{name: getattr(self, name)[indices] for name in names})


def sample(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    """logits (B, V), one number in [0, 1) per row (B,) -> token ids (B,).

    Greedy where the temperature is 0. Else the inverse of the cumulative distribution, in the order of
    the vocabulary, at the row's own number: a seeded row draws the same whoever its neighbours are.
    """
    best = likeliest(logits)
    if not rows.any_sampling:
        return best
    greedy = rows.temperature <= 0
    scaled = logits.float() / torch.where(greedy, 1.0, rows.temperature)[:, None]
    if rows.any_top_k:
        scaled = scaled.masked_fill(~top_k_mask(scaled, rows.top_k), -torch.inf)
    if rows.any_top_p:
        # top_p 1 keeps all, in spite of rounding: such rows must not feel that a neighbour asked for less.
        keep = top_p_mask(scaled, rows.top_p) | (rows.top_p >= 1)[:, None]
        scaled = scaled.masked_fill(~keep, -torch.inf)
    if rows.any_typical:
        keep = typical_mask(scaled, rows.typical_p) | (rows.typical_p >= 1)[:, None]
        scaled = scaled.masked_fill(~keep, -torch.inf)
    cumulative = scaled.softmax(-1).double().cumsum(-1)
    wanted = uniform.double()[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp(max=logits.size(-1) - 1)
    return torch.where(greedy, best, drawn)
