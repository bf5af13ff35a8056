"""Beam search over many sentences at once with a KV cache: what `evaluate` translates with.

The same search as `model.decoding.beam_search`, which tests hold it equal to. Beams are rows; the rows of
requests that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.cache import KVCache
from model.decoding import Decoded, normalise, repeated_ngram_tokens
from model.masks import padding_mask
from model.models import Translator, make_cache
from model.nearest import Datastore
from model.sampling import BeamParams, penalise


@dataclass
class _Request:
    """One sentence's beams: new tokens and sums of log-probabilities, best first."""

    index: int
    beams: list[list[int]]
    totals: list[float]
    store: Datastore | None = None
    finished: list[Decoded] = field(default_factory=list)


@dataclass
class _Rows:
    """What the decoder remembers of the rows; row r * num_beams + b is beam b of the r-th live request."""

    cache: KVCache
    memory: KVCache
    memory_mask: Tensor  # (N, 1, 1, S)

    def keep(self, sources: list[int], length: int, *, fewer: bool) -> None:
        """Row i becomes what row sources[i] was; the memory moves only when requests have left."""
        targets = list(range(len(sources)))
        moved = [i for i, source in enumerate(sources) if source != i]
        self.cache.copy_rows([sources[i] for i in moved], [targets[i] for i in moved], length)
        if fewer:
            self.memory.copy_rows(sources, targets, self.memory.max_len)
            self.memory_mask = self.memory_mask[sources]


class BeamTranslator:
    """Translates token ids with one model and one set of parameters."""

    def __init__(self, model: Translator, params: BeamParams, suppress: Iterable[int] = ()) -> None:
        self.model, self.params, self.suppress = model, params, list(suppress)
        self.device = next(model.parameters()).device
        self.eos_id, self.pad_id = model.config.eos_id, model.config.pad_id

    @torch.no_grad()
    def search(
        self,
        sources: Sequence[Sequence[int]],
        prompts: Sequence[int],
        stores: Sequence[Datastore | None] = (),
    ) -> list[list[Decoded]]:
        """Encoder inputs, and the token that each target begins with -> n best of each, best first.

        `stores` has the examples of each, where there are some.
        """
        k = self.params.num_beams
        rows = self._encode(sources)
        live = [
            _Request(i, [[] for _ in range(k)], [0.0, *[-torch.inf] * (k - 1)], store)
            for i, store in enumerate(stores or [None] * len(sources))
        ]
        results: list[list[Decoded]] = [[] for _ in sources]
        tokens = [prompt for prompt in prompts for _ in range(k)]
        for step in range(self.params.max_new_tokens):
            best = self._best(self._logits(rows, tokens, step, live), live, step)
            parents, still = [], []
            for n, request in enumerate(live):
                origins = self._advance(request, best[n])
                if self._done(request):
                    results[request.index] = self._ranked(request)
                else:
                    still.append(request)
                    parents += [n * k + origin for origin in origins]
            fewer, live = len(still) < len(live), still
            if not live:
                break
            rows.keep(parents, step + 1, fewer=fewer)
            tokens = [beam[-1] for request in live for beam in request.beams]
        for request in live:
            results[request.index] = self._ranked(request)
        return results

    def _encode(self, sources: Sequence[Sequence[int]]) -> _Rows:
        """Encode every source once and give each beam its memory."""
        config, n = self.model.config, len(sources) * self.params.num_beams
        width = max(map(len, sources))
        src = torch.full((len(sources), width), self.pad_id)
        for row, source in zip(src, sources, strict=True):
            row[: len(source)] = torch.tensor(list(source))
        src = src.to(self.device)
        encoded, _ = self.model.encode(src)
        memory = make_cache(config, n, width, self.device, encoded.dtype)
        kvs = self.model.decoder.project_memory(encoded)
        k = self.params.num_beams
        memory.write(0, [(key.repeat_interleave(k, 0), value.repeat_interleave(k, 0)) for key, value in kvs])
        cache = make_cache(config, n, self.params.max_new_tokens, self.device, encoded.dtype)
        return _Rows(cache, memory, padding_mask(src.repeat_interleave(k, 0), self.pad_id))

    def _logits(self, rows: _Rows, tokens: list[int], step: int, live: list[_Request]) -> Tensor:
        """One token per row -> next-token logits (N, V), of log-probabilities where there are examples."""
        n, length = len(tokens), step + 1
        positions = torch.full((n, 1), step, device=self.device)
        hidden = self.model.decoder(
            torch.tensor(tokens, device=self.device)[:, None],
            positions,
            None,  # the one query may see all `length` positions
            rows.cache.view(0, positions, length),
            rows.memory.read(0, n, rows.memory.max_len),
            rows.memory_mask,
        )
        logits: Tensor = self.model.head(hidden[:, 0]).float()
        logits[:, self.suppress] = -torch.inf
        k = self.params.num_beams
        for i, request in enumerate(live):
            if request.store is not None:
                own = slice(i * k, (i + 1) * k)
                logits[own] = request.store.mix(logits[own], hidden[own, 0])
        return logits

    def _best(self, logits: Tensor, live: list[_Request], step: int) -> list[list[tuple[float, int, int]]]:
        """Per request the 2k best continuations: (sum of log-probabilities, beam, token), best first."""
        k = self.params.num_beams
        self._guard(logits, [beam for request in live for beam in request.beams], step)
        top = logits.topk(min(2 * k, logits.size(1)))  # no beam can give more than that
        sums = torch.tensor([request.totals for request in live], device=self.device).flatten()
        totals = top.values - logits.logsumexp(1, keepdim=True) + sums[:, None]
        merged = totals.view(len(live), -1).topk(min(2 * k, totals.size(1) * k))
        chosen = top.indices.view(len(live), -1).gather(1, merged.indices)
        beams = merged.indices // totals.size(1)
        columns = (merged.values.tolist(), beams.tolist(), chosen.tolist())
        return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]

    def _guard(self, logits: Tensor, beams: list[list[int]], step: int) -> None:
        """Minimum length and the repetition guards, in place."""
        params = self.params
        if step < params.min_new_tokens:
            logits[:, self.eos_id] = -torch.inf
        if params.repetition_penalty != 1.0 and step:
            history = torch.tensor(beams, device=self.device)
            penalty = torch.full((len(beams),), params.repetition_penalty, device=self.device)
            logits.copy_(penalise(logits, history, penalty))
        for row, beam in zip(logits, beams, strict=True) if params.no_repeat_ngram_size else ():
            row[list(repeated_ngram_tokens(beam, params.no_repeat_ngram_size))] = -torch.inf

    def _advance(self, request: _Request, best: list[tuple[float, int, int]]) -> list[int]:
        """Take one step; returns the beam that each new beam comes from."""
        k = self.params.num_beams
        old, request.beams, request.totals = request.beams, [], []
        origins: list[int] = []
        for rank, (total, beam, token) in enumerate(best):
            if total == -torch.inf:
                break
            if token == self.eos_id:
                if rank < k:
                    score = normalise(total, len(old[beam]) + 1, self.params)
                    request.finished.append(Decoded(old[beam], score, True))
            elif len(origins) < k:
                request.beams.append([*old[beam], token])
                request.totals.append(total)
                origins.append(beam)
        request.finished = sorted(request.finished, key=lambda d: -d.score)[:k]
        for _ in range(k - len(origins) if origins else 0):  # too few continuations: rows that cannot win
            request.beams.append(request.beams[0])
            request.totals.append(-torch.inf)
            origins.append(origins[0])
        return origins

    def _done(self, request: _Request) -> bool:
        if not request.beams:
            return True
        if len(request.finished) < self.params.num_beams:
            return False
        hope = normalise(request.totals[0], len(request.beams[0]), self.params)
        return request.finished[-1].score >= hope

    def _ranked(self, request: _Request) -> list[Decoded]:
        open_ends = [
            Decoded(beam, normalise(total, len(beam), self.params), False)
            for beam, total in zip(request.beams, request.totals, strict=True)
            if total > -torch.inf
        ]
        ranked = [*request.finished, *sorted(open_ends, key=lambda d: -d.score)]
        return ranked[: self.params.num_return_sequences]


def by_length(sources: Sequence[Sequence[int]], max_rows: int) -> Iterator[list[int]]:
    """Indices in batches of neighbours in length, at most `max_rows` each."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for start in range(0, len(order), max_rows):
        yield order[start : start + max_rows]
