"""Tensors only: a model, its cache, and the steps over them. No policy.

A runner works on rows; who owns a row, and when it ends, is the scheduler's and the lane's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.block import WeightsTap
from model.checkpoint import Checkpoint
from model.config import TransformerConfig
from model.masks import length_mask, position_mask
from model.models import CausalLM, Classifier, MaskedLM, Translator, make_cache
from model.sampling import SamplingRows, penalise, sample
from model.tokenizer import Tokenizer

_BUCKET = 32  # what is read of the cache is rounded up to this, so that few shapes occur


@dataclass
class Guards:
    """What rows may not do in this step. Histories are the tokens that the penalties count."""

    banned: list[tuple[int, int]] = field(default_factory=list)  # (row, token)
    histories: dict[int, list[int]] = field(default_factory=dict)
    repetition: dict[int, float] = field(default_factory=dict)
    frequency: dict[int, float] = field(default_factory=dict)
    presence: dict[int, float] = field(default_factory=dict)
    bias: list[tuple[int, int, float]] = field(default_factory=list)  # (row, token, added to its logit)
    forced: dict[int, int] = field(default_factory=dict)  # rows with the one token that may follow

    def penalty(
        self, row: int, history: list[int], repetition: float, frequency: float = 0.0, presence: float = 0.0
    ) -> None:
        """Note a row's penalties, if it has any."""
        if history and (repetition != 1.0 or frequency != 0.0 or presence != 0.0):
            self.histories[row] = history
            self.repetition[row], self.frequency[row] = repetition, frequency
            self.presence[row] = presence


class DecodeRunner:
    """One decode step over the first rows of a cache; what generation and translation share."""

    def __init__(self, checkpoint: Checkpoint, n_slots: int, max_len: int) -> None:
        model = checkpoint.model
        assert isinstance(model, CausalLM | Translator)
        self.model: CausalLM | Translator = model
        self.config, self.model_name = checkpoint.config, checkpoint.name
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.n_slots, self.max_len = n_slots, max_len
        self.cache = make_cache(checkpoint.config, n_slots, max_len, self.device, self.dtype)
        self.suppressed = _suppressed(checkpoint.tokenizer, checkpoint.config).to(self.device)

    def step(self, first: int, token_ids: list[int], positions: list[int]) -> Tensor:
        """Rows first .. first + B: each reads its next token at its position -> logits (B, V), float32.

        Repeating a step writes the same cache entries again, so a failed one can be tried again.
        """
        ids = torch.tensor(token_ids, device=self.device)[:, None]
        places = torch.tensor(positions, device=self.device)[:, None]
        length = min(self.max_len, -(-(max(positions) + 1) // _BUCKET) * _BUCKET)
        hidden = self._decode(first, ids, places, length)
        logits: Tensor = self.model.head(hidden[:, -1]).float()
        return logits.masked_fill_(self.suppressed, -torch.inf)

    def _decode(self, first: int, ids: Tensor, positions: Tensor, length: int) -> Tensor:
        view = self.cache.view(first, positions, length)
        hidden: Tensor = self.model.decoder(ids, positions, position_mask(positions, length), view)
        return hidden

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy rows (source, target) up to `length` positions."""
        self.cache.copy_rows([source for source, _ in moves], [target for _, target in moves], length)

    def wipe(self, rows: Sequence[int]) -> None:
        """Forget what rows hold. NaN in them would reach their next owner: 0 x NaN is NaN, masked or not."""
        self.cache.k[:, list(rows)] = 0
        self.cache.v[:, list(rows)] = 0

    def responds(self) -> bool:
        """Does the device still answer?"""
        return responds(self.device)

    def guard(self, logits: Tensor, guards: Guards) -> Tensor:
        """Apply penalties, then biases, then bans, then what is forced, to logits (B, V)."""
        if guards.histories:
            rows = sorted(guards.histories)
            history = _padded([guards.histories[row] for row in rows], -1, self.device)
            repetition, frequency, presence = (
                torch.tensor([amount[row] for row in rows], device=self.device)
                for amount in (guards.repetition, guards.frequency, guards.presence)
            )
            logits[rows] = penalise(logits[rows], history, repetition, frequency, presence)
        if guards.bias:
            rows_, tokens, amounts = zip(*guards.bias, strict=True)
            logits[list(rows_), list(tokens)] += torch.tensor(amounts, device=self.device)
        if guards.banned:
            rows_, tokens = zip(*guards.banned, strict=True)
            logits[list(rows_), list(tokens)] = -torch.inf
        for row, token in guards.forced.items():
            logits[row] = -torch.inf
            logits[row, token] = 0.0
        return logits


class Drawn(NamedTuple):
    """What one step drew for a row: the token, its log-probability, the likeliest tokens beside it."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class GenerateRunner(DecodeRunner):
    """Prefill and draw, for a model that has only a decoder."""

    model: CausalLM

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts into rows from `first` on; padding is written too, and never read."""
        ids = _padded(prompts, 0, self.device)
        positions = torch.arange(ids.size(1), device=self.device).expand_as(ids)
        self._decode(first, ids, positions, ids.size(1))

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float | None]:
        """The log-probability of each token of a prompt given those before it; none for the first."""
        ids = torch.tensor([list(prompt)], device=self.device)
        hidden = self.model.hidden(ids)[0]
        out: list[float | None] = [None]
        for start in range(0, len(prompt) - 1, 64):  # in parts: (T, V) of a long prompt is large
            part = hidden[start : min(start + 64, len(prompt) - 1)]
            logprobs = self.model.head(part).float().log_softmax(-1)
            wanted = ids[0, start + 1 : start + 1 + len(part), None]
            out += logprobs.gather(1, wanted).squeeze(1).tolist()
        return out

    def draw(self, logits: Tensor, rows: SamplingRows, uniform: list[float], n_top: int) -> list[Drawn]:
        """Draw a token per row of guarded logits (B, V); log-probabilities are those after the guards.

        `uniform` holds a number in [0, 1) per row. A row that holds no numbers has NaN for its logprob.
        """
        token_ids = sample(logits, rows, torch.tensor(uniform, dtype=torch.float64, device=self.device))
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
        top: list[list[tuple[int, float]]] = [[] for _ in uniform]
        if n_top:
            best = logprobs.topk(min(n_top, logits.size(1)), dim=-1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top = [list(zip(ids, values, strict=True)) for ids, values in pairs]
        return list(map(Drawn, token_ids.tolist(), chosen.tolist(), top))


class TranslateRunner(DecodeRunner):
    """Encode, and rank continuations, for a model with encoder and decoder."""

    model: Translator

    def __init__(self, checkpoint: Checkpoint, n_slots: int, max_len: int) -> None:
        super().__init__(checkpoint, n_slots, max_len)
        self.memory = make_cache(checkpoint.config, n_slots, max_len, self.device, self.dtype)
        self.memory_lengths = torch.zeros(n_slots, dtype=torch.long, device=self.device)

    def encode(self, first: int, sources: Sequence[Sequence[int]], n_rows: Sequence[int]) -> None:
        """Encode sources (B of them) and give source i's memory to its n_rows[i] rows, from `first` on."""
        src = _padded(sources, self.model.config.pad_id, self.device)
        memory, _ = self.model.encode(src)
        repeats = torch.tensor(n_rows, device=self.device)
        pairs = self.model.decoder.project_memory(memory)
        self.memory.write(
            first, [(k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)) for k, v in pairs]
        )
        lengths = torch.tensor([len(source) for source in sources], device=self.device)
        self.memory_lengths[first : first + sum(n_rows)] = lengths.repeat_interleave(repeats)

    def _decode(self, first: int, ids: Tensor, positions: Tensor, length: int) -> Tensor:
        lengths = self.memory_lengths[first : first + ids.size(0)]
        size = min(self.max_len, -(-int(lengths.max()) // _BUCKET) * _BUCKET)
        hidden: Tensor = self.model.decoder(
            ids,
            positions,
            position_mask(positions, length),
            self.cache.view(first, positions, length),
            self.memory.read(first, ids.size(0), size),
            length_mask(lengths, size),
        )
        return hidden

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy rows with their memories."""
        super().move(moves, length)
        sources, targets = [source for source, _ in moves], [target for _, target in moves]
        if moves:
            self.memory.copy_rows(sources, targets, int(self.memory_lengths[sources].max()))
            self.memory_lengths[targets] = self.memory_lengths[sources]

    def copy_beams(self, copies: Sequence[tuple[int, int]], length: int) -> None:
        """Copy rows within their groups, where the memory is the same anyway."""
        super().move(copies, length)

    def wipe(self, rows: Sequence[int]) -> None:
        """Forget what rows hold, with their memories."""
        super().wipe(rows)
        self.memory.k[:, list(rows)] = 0
        self.memory.v[:, list(rows)] = 0

    def rank(self, logits: Tensor, n_best: int) -> list[list[tuple[int, float]]]:
        """The n best continuations of each row of guarded logits (B, V), with log-probabilities.

        Those of a row where everything is banned have -inf, those of one that holds no numbers NaN.
        """
        best = logits.topk(min(n_best, logits.size(1)), dim=-1)
        logprobs = best.values - logits.logsumexp(-1, keepdim=True)
        logprobs.masked_fill_(best.values == -torch.inf, -torch.inf)
        pairs = zip(best.indices.tolist(), logprobs.tolist(), strict=True)
        return [list(zip(ids, values, strict=True)) for ids, values in pairs]

    def score(
        self, logits: Tensor, tokens: Mapping[int, Sequence[int]]
    ) -> dict[int, list[tuple[int, float]]]:
        """Some tokens of some rows of guarded logits (B, V), with log-probabilities, by row."""
        pairs = [(row, token) for row, each in tokens.items() for token in each]
        if not pairs:
            return {}
        rows, ids = (torch.tensor(each, device=self.device) for each in zip(*pairs, strict=True))
        logprobs = (logits[rows, ids] - logits[rows].logsumexp(-1)).tolist()
        found: dict[int, list[tuple[int, float]]] = {row: [] for row in tokens}
        for (row, token), logprob in zip(pairs, logprobs, strict=True):
            found[row].append((token, logprob))
        return found

    def align(self, source: Sequence[int], target: Sequence[int]) -> list[list[float]]:
        """Cross-attention of the last layer, the mean over its heads: a row per target token, (T, S).

        The row of a token is that of the step which produced it.
        """
        src = torch.tensor([list(source)], device=self.device)
        tgt = torch.tensor([list(target)], device=self.device)
        memory, mask = self.model.encode(src)
        with WeightsTap(self.model.decoder) as tap:
            self.model.decode(tgt, memory, mask)
        *_, name = (n for n in tap.weights if n.endswith("cross_attention"))
        weights: list[list[float]] = tap.weights[name][0][0].mean(0).float().tolist()
        return weights


class MaskedRunner:
    """One pass of an encoder with its two heads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert isinstance(checkpoint.model, MaskedLM)
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.device = next(self.model.parameters()).device
        self.allowed = {
            None: _fillable(self.tokenizer, None).to(self.device),
            "space": _fillable(self.tokenizer, True).to(self.device),
            "no_space": _fillable(self.tokenizer, False).to(self.device),
        }
        self.n_allowed = {name: int(mask.sum()) for name, mask in self.allowed.items()}

    def encode(self, token_ids: Sequence[Sequence[int]], segment_ids: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids -> hidden states (B, S, D)."""
        ids = _padded(token_ids, self.model.config.pad_id, self.device)
        return self.model.encode(ids, _padded(segment_ids, 0, self.device))

    def fill(
        self, hidden: Tensor, allowed: str | None, top_k: int, targets: Sequence[int] | None
    ) -> list[tuple[int, float]]:
        """hidden (D,) of one mask -> token ids with probabilities among the allowed, best first."""
        logits = self.model.mlm_head(hidden).float().masked_fill(~self.allowed[allowed], -torch.inf)
        probs = logits.softmax(-1)
        if targets is not None:
            picked = probs[list(targets)].tolist()
            return sorted(zip(targets, picked, strict=True), key=lambda pair: -pair[1])[:top_k]
        best = probs.topk(min(top_k, self.n_allowed[allowed]))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def follows(self, hidden: Tensor) -> list[float]:
        """hidden (B, S, D) -> the probability, per row, that B follows A."""
        probs: list[float] = self.model.nsp_head(hidden).float().softmax(-1)[:, 1].tolist()
        return probs

    def responds(self) -> bool:
        """Does the device still answer?"""
        return responds(self.device)


class ClassifyRunner:
    """One pass of a classifier."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert isinstance(checkpoint.model, Classifier)
        self.model = checkpoint.model
        self.device = next(self.model.parameters()).device

    def classify(
        self, token_ids: Sequence[Sequence[int]], segment_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Rows of ids -> logits (B, labels)."""
        ids = _padded(token_ids, self.model.config.pad_id, self.device)
        logits: list[list[float]] = self.model(ids, _padded(segment_ids, 0, self.device)).float().tolist()
        return logits

    def responds(self) -> bool:
        """Does the device still answer?"""
        return responds(self.device)


def responds(device: torch.device) -> bool:
    """Does a device still answer? After some faults of a GPU all that a process asks of it fails."""
    try:
        return bool(torch.zeros(1, device=device).item() == 0)
    except torch.OutOfMemoryError:
        return True
    except Exception:
        return False


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


def _suppressed(tokenizer: Tokenizer, config: TransformerConfig) -> Tensor:
    """(V,) True for what must never be generated: every special token but the ends."""
    mask = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    mask[sorted(tokenizer.special_ids - set(config.eos_ids))] = True
    return mask


def _fillable(tokenizer: Tokenizer, spaced: bool | None) -> Tensor:
    """(V,) True for what can fill a mask: whole, visible characters, begun with a space or not."""

    if not tokenizer.parts_words:  # what may stand there is the model's affair
        return torch.ones(tokenizer.vocab_size, dtype=torch.bool)

    def fits(token_id: int) -> bool:
        text = tokenizer.token_text(token_id)
        if token_id in tokenizer.special_ids or "\ufffd" in text or not text.strip():
            return False
        return spaced is None or text.startswith(" ") == spaced

    return torch.tensor([fits(token_id) for token_id in range(tokenizer.vocab_size)])
