"""Drawing tokens where the logits are: the end of a step of few shapes, over static buffers.

What a step needs to know of a row stays on the device from step to step: its parameters, the tokens that it
has read, and the one that it drew last, which is what it reads next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from model.sampling import SamplingParams, SamplingRows, likeliest, penalise, sample
from model.transfer import to_device

UNKNOWN = -1  # in place of a token that the host has not seen yet


class Level(IntEnum):
    """How much work drawing is: less than a row's level would be wrong, more changes nothing for it."""

    GREEDY = 0
    DRAWN = 1  # by temperature, or after penalties
    FILTERED = 2  # by top_k and top_p, too


def level_of(params: SamplingParams) -> Level | None:
    """The least level that serves a row; None where the step's logits must be seen to by the host."""
    sampled = params.temperature > 0
    if params.logit_bias or params.top_n_tokens or (sampled and params.typical_p < 1):
        return None
    if sampled and (params.top_k > 0 or params.top_p < 1):
        return Level.FILTERED
    return Level.DRAWN if sampled or has_penalties(params) else Level.GREEDY


def has_penalties(params: SamplingParams) -> bool:
    """Does what a row may say hang on what it has read?"""
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class RowRules:
    """What one row draws by; it may end once it reads a token at the position `may_end` or behind it."""

    params: SamplingParams
    may_end: int

    @property
    def numbers(self) -> tuple[float, ...]:
        p = self.params
        penalties = p.repetition_penalty, p.frequency_penalty, p.presence_penalty
        return p.temperature, p.top_k, p.top_p, *penalties, self.may_end


class Drawing:
    """The static buffers for `n_slots` rows, and the operations over them.

    Equal to `model.sampling.sample` after the same penalties, number for number on one kind of device.
    Between a CPU and a GPU sums differ in their last bits: there a seed gives the same tokens, but where the
    number drawn, or two logits, fall into that difference.
    """

    def __init__(self, n_slots: int, max_len: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=device)
        # float32 holds whole numbers up to 16 million: no position and no top_k is beyond that.
        self._rules = torch.ones(7, n_slots, device=device)
        self._histories = torch.zeros(n_slots, max_len, dtype=torch.long, device=device)
        # Token ids, and log-probabilities in the bits of float64: one copy brings both to the host.
        self.results = torch.zeros(2, n_slots, dtype=torch.long, device=device)
        self._tokens, self._logprobs = self.results[0], self.results[1].view(torch.float64)

    def set_rules(self, rules: Sequence[RowRules]) -> None:
        """What rows 0 .. B draw by from now on."""
        numbers = to_device([row.numbers for row in rules], self._rules.device, torch.float32)
        self._rules[:, : len(rules)].copy_(numbers.T)

    def set_history(self, row: int, token_ids: Sequence[int]) -> None:
        """The tokens that a row has read, and reads next."""
        self._histories[row, : len(token_ids)] = to_device(token_ids, self._histories.device, torch.long)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Rows become what others are; no row is both. A history may reach beyond what the cache holds."""
        self._tokens[targets] = self._tokens[sources]
        self._histories[targets] = self._histories[sources]

    # Within a step

    def read(self, token_ids: Tensor, positions: Tensor, level: Level) -> Tensor:
        """Token ids (B,), of which some are `UNKNOWN` -> those that are read at `positions` (B,)."""
        n_rows = token_ids.size(0)
        known = torch.where(token_ids == UNKNOWN, self._tokens[:n_rows], token_ids)
        if level > Level.GREEDY:  # else nobody looks into them
            self._histories[torch.arange(n_rows, device=known.device), positions] = known
        return known

    def draw(self, logits: Tensor, positions: Tensor, uniform: Tensor, length: int, level: Level) -> None:
        """logits (B, V), the positions read and one number in [0, 1) per row (B,) -> into the results.

        `length` positions of the histories are looked at. Log-probabilities are those after the penalties; a
        row that holds no numbers has NaN.
        """
        n_rows = logits.size(0)
        rules = self._rules[:, :n_rows]
        repetition, frequency, presence, may_end = rules[3:]
        if level > Level.GREEDY:
            past = torch.arange(length, device=logits.device) <= positions[:, None]
            history = torch.where(past, self._histories[:n_rows, :length], -1)
            logits = penalise(logits, history, repetition, frequency, presence)
        too_early = (positions < may_end)[:, None]
        ends = logits[:, self._eos_ids]
        logits = logits.index_copy(1, self._eos_ids, torch.where(too_early, -torch.inf, ends))
        drawn = self._sample(logits, rules, uniform, level)
        self._tokens[:n_rows] = drawn
        self._logprobs[:n_rows] = logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)

    def _sample(self, logits: Tensor, rules: Tensor, uniform: Tensor, level: Level) -> Tensor:
        if level is Level.GREEDY:
            return likeliest(logits)
        filtered = level is Level.FILTERED
        rows = SamplingRows(
            temperature=rules[0],
            top_k=rules[1].long() if filtered else rules[1],
            top_p=rules[2],
            typical_p=rules[2],
            any_sampling=True,
            any_top_k=filtered,
            any_top_p=filtered,
            any_typical=False,
            any_logprobs=True,
        )
        return sample(logits, rows, uniform)
