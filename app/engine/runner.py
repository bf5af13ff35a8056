"""Tensors only: a model, its cache, and the steps over them. No policy.

A runner works on rows; who owns a row, and when it ends, is the scheduler's and the lane's business.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.engine.drawing import Drawing, Level
from app.engine.graphs import Flight, Launcher, StaticStep, make_launcher
from model.block import WeightsTap
from model.cache import KVCache
from model.checkpoint import Checkpoint
from model.config import TransformerConfig
from model.inference import kernels_of, quantization_of
from model.kernel_blocks import KernelDecoder
from model.masks import Mask, MaskParts, RowSpans, length_mask, position_mask, split_by_length
from model.models import CausalLM, Classifier, MaskedLM, Translator, make_cache
from model.nearest import Datastore, ExampleIds, read_examples
from model.nearest_words import Votes, fillable
from model.quantize import Int8Linear, KernelInt8Linear, Selected
from model.round_trip import return_logprobs
from model.sampling import SamplingRows, chosen_logprobs, penalise, sample, top_tokens
from model.tokenizer import Tokenizer
from model.transfer import padded, to_device

Candidates = list[tuple[int, float]]  # tokens with their log-probabilities

_MASKS = 32  # whose logits are held at a time
_EXACT = 64  # fillings of a mask that are ranked by float32
_MOST_LISTED = 2048  # tokens of a sentence's own list: 1 MB of packed weights in 512 dimensions
BLOCK_TOKENS = 32  # what is kept of prompts comes in blocks of so many tokens
# Another call of the attention kernel takes about as long as reading so many more positions.
_PART_COST = 256


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
    allowed: dict[int, list[int]] = field(default_factory=dict)  # rows with those of which one may follow

    @property
    def only_ban(self) -> bool:
        """Is nothing changed but what is impossible?"""
        return not (self.histories or self.bias or self.forced or self.allowed)

    def of(self, rows: Sequence[int]) -> Guards:
        """Those of some rows alone, numbered as they stand here."""
        place = {row: n for n, row in enumerate(rows)}
        histories = {place[row]: history for row, history in self.histories.items() if row in place}
        repetition, frequency, presence = (
            {place[row]: amount for row, amount in amounts.items() if row in place}
            for amounts in (self.repetition, self.frequency, self.presence)
        )
        return Guards(
            [(place[row], token) for row, token in self.banned if row in place],
            histories,
            repetition,
            frequency,
            presence,
            [(place[row], token, amount) for row, token, amount in self.bias if row in place],
            {place[row]: token for row, token in self.forced.items() if row in place},
            {place[row]: tokens for row, tokens in self.allowed.items() if row in place},
        )

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
        suppressed = sorted(_suppressed(checkpoint.tokenizer, checkpoint.config))
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=self.device)
        self._suppressed_ids = suppressed
        self._banned_everywhere = [(-1, token) for token in suppressed]
        self.static: StaticStep | None = None
        self.kernels = kernels_of(model)
        # Kernels are told what single queries read by its first and last position.
        self.spans = self.kernels is not None

    def make_static(self, launcher: Launcher | None = None) -> None:
        """From now on steps run over static buffers; on a GPU as CUDA graphs, which are captured here."""
        launcher = launcher or make_launcher(self.device)
        sizes = self.n_slots, self.max_len, self.config.vocab_size
        # Weakly, so that no circle keeps a model's memory when the last who held it lets go.
        own = weakref.WeakMethod(self._compute)

        def compute(*inputs: Any) -> Tensor:
            method = own()
            assert method is not None
            return method(*inputs)

        self.static = StaticStep(compute, *sizes, self.device, launcher, self._make_drawing())
        if launcher.captures:
            self.static.capture()

    @property
    def shortlist_languages(self) -> tuple[str, ...]:
        """The languages into which it chooses among a shortlist's tokens."""
        return ()

    def _make_drawing(self) -> Drawing | None:
        """What a static step does with its logits, if it draws from them."""
        return None

    def step(self, first: int, token_ids: list[int], positions: list[int], *, part: bool = False) -> Tensor:
        """Rows first .. first + B: each reads its next token at its position -> logits (B, V), float32.

        Repeating a step writes the same cache entries again, so a failed one can be tried again; in parts,
        which must be called so: else rows behind it count as free, and the static step writes into some.
        """
        if self.static is not None and not part:
            return self.static.run(token_ids, positions, self._memory_lengths(len(token_ids)))
        return self._project(self._read(first, token_ids, positions))

    def _read(self, first: int, token_ids: list[int], positions: list[int]) -> Tensor:
        """What the decoder makes of each row's next token, (B, 1, D)."""
        ids, places = torch.tensor([token_ids, positions], device=self.device).unsqueeze(-1)
        lengths = [position + 1 for position in positions]
        if self.config.window and not self.spans:  # which the decoder narrows, layer by layer
            mask: Mask | None = position_mask(places, max(lengths))
        else:
            mask = self._length_mask(lengths)
        return self._decode(first, ids, places, max(lengths), mask)

    def _project(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.head(hidden[:, -1]).float()
        return logits.index_fill_(1, self.suppressed, -torch.inf)

    def _compute(self, token_ids: Tensor, positions: Tensor, memory_lengths: Tensor, length: int) -> Tensor:
        """A step of the first rows, every shape of which follows from their number and `length`."""
        places = positions[:, None]
        return self._project(
            self._decode(0, token_ids[:, None], places, length, self._static_mask(places, length))
        )

    def _static_mask(self, places: Tensor, length: int) -> Mask:
        if self.spans:
            return RowSpans(places[:, 0])
        mask = position_mask(places, length)
        return mask if self.config.window else self._to_add(mask)

    def _memory_lengths(self, n_rows: int) -> list[int]:
        return [0] * n_rows

    def _length_mask(self, lengths: list[int]) -> Mask | None:
        """What rows of one query may read: the first so many of what they hold.

        For torch in the numbers that attention adds, which are made here once a step and not once a layer.
        """
        if self.spans:
            return RowSpans(torch.tensor(lengths) - 1)
        parts = split_by_length(lengths, _PART_COST)
        masks = tuple((*part, self._added(lengths[part[0] : part[1]])) for part in parts)
        return masks[0][3] if len(masks) == 1 else MaskParts(masks)

    def _added(self, lengths: list[int]) -> Tensor | None:
        size = max(lengths)
        if min(lengths) == size:  # all see everything
            return None
        return self._to_add(length_mask(torch.tensor(lengths, device=self.device), size))

    def _to_add(self, mask: Tensor) -> Tensor:
        """A mask in the numbers that attention adds; a boolean one it would turn into them in every layer."""
        return torch.zeros(mask.shape, device=self.device, dtype=self.dtype).masked_fill_(~mask, -torch.inf)

    def _decode(self, first: int, ids: Tensor, positions: Tensor, length: int, mask: Mask | None) -> Tensor:
        view = self.cache.view(first, positions, length)
        hidden: Tensor = self.model.decoder(ids, positions, mask, view)
        return hidden

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy rows (source, target) up to `length` positions."""
        self.cache.copy_rows([source for source, _ in moves], [target for _, target in moves], length)

    def let_go(self, first: int) -> None:
        """Rows from `first` on are free: drop what they have beside the cache."""

    def wipe(self, rows: Sequence[int]) -> None:
        """Forget what rows hold. NaN in them would reach their next owner: 0 x NaN is NaN, masked or not."""
        _zero(self.cache, rows)

    def responds(self) -> bool:
        """Does the device still answer?"""
        return responds(self.device)

    def guard(self, logits: Tensor, guards: Guards) -> Tensor:
        """Apply penalties, then biases, then bans, then what is allowed or forced, to logits (B, V)."""
        if guards.histories:
            rows = sorted(guards.histories)
            history = padded([guards.histories[row] for row in rows], -1, self.device)
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
        for row, allowed in guards.allowed.items():
            kept = logits[row, allowed]
            logits[row] = -torch.inf
            logits[row, allowed] = kept
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

    def __init__(self, checkpoint: Checkpoint, n_slots: int, max_len: int, n_blocks: int = 0) -> None:
        """`n_blocks` of BLOCK_TOKENS tokens keep the beginnings of prompts."""
        super().__init__(checkpoint, n_slots, max_len)
        self.pool = make_cache(checkpoint.config, n_blocks, BLOCK_TOKENS, self.device, self.dtype)
        # Noise in the last place, as of attention over another width, may tip a number that is rounded.
        self.rounds = quantization_of(self.model) == "int8"
        self.reads_together = isinstance(self.model.decoder, KernelDecoder)

    def _make_drawing(self) -> Drawing:
        return Drawing(self.n_slots, self.max_len, self.config.eos_ids, self.device)

    def launch(
        self, token_ids: list[int], positions: list[int], uniform: list[float], level: Level
    ) -> Flight:
        """A static step of the first B rows, which are all that are active, to what it draws for each.

        As `StaticStep.launch`; what rows draw by must have been set in `drawing`.
        """
        assert self.static is not None
        return self.static.launch(token_ids, positions, uniform, level)

    @property
    def drawing(self) -> Drawing | None:
        """What static steps draw with; None where steps are not static."""
        return None if self.static is None else self.static.drawing

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy rows with what is drawn from them."""
        super().move(moves, length)
        if self.drawing is not None and moves:
            sources, targets = to_device([*zip(*moves, strict=True)], self.device)
            self.drawing.move(sources, targets)

    def read(self, rows: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Tokens of prompts, each at its position of its row, in one call of a kernel.

        Where `reads_together`. To the last bit as if each were read alone, by a step. What stands before a
        token in its row has been read, or is among them.
        """
        ids, places = torch.tensor([token_ids, positions]).unsqueeze(-1)
        self.model.decoder(ids, places, RowSpans(places[:, 0], rows=torch.tensor(rows)), self.cache.whole())

    def prefill(self, first: int, prompts: Sequence[Sequence[int]], start: int = 0) -> None:
        """Read parts of prompts, which stand at `start`, into rows from `first` on.

        Padding is written too, and never read.
        """
        ids = padded(prompts, 0, self.device)
        length = start + ids.size(1)
        positions = torch.arange(start, length, device=self.device).expand_as(ids)
        self._decode(first, ids, positions, length, position_mask(positions, length))

    def reuse(self, row: int, blocks: Sequence[int]) -> None:
        """Begin a row with what the pool's blocks hold."""
        for n, block in enumerate(blocks):
            self.cache.take_block(self.pool, block, row, n * BLOCK_TOKENS)

    def keep(self, row: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Fill the pool's blocks from a row: (block, first position)."""
        for block, start in blocks:
            self.cache.give_block(self.pool, block, row, start)

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float | None]:
        """The log-probability of each token of a prompt given those before it; none for the first."""
        ids = torch.tensor([list(prompt)], device=self.device)
        hidden = self.model.hidden(ids)[0]
        out: list[float | None] = [None]
        return out + chosen_logprobs(self.model.head, hidden[:-1], ids[0, 1:]).tolist()

    def draw(self, logits: Tensor, rows: SamplingRows, uniform: list[float], n_top: int) -> list[Drawn]:
        """Draw a token per row of guarded logits (B, V); log-probabilities are those after the guards.

        `uniform` holds a number in [0, 1) per row. A row that holds no numbers has NaN for its logprob.
        """
        numbers = torch.tensor(uniform, dtype=torch.float64, device=self.device)
        top: list[list[tuple[int, float]]] = [[] for _ in uniform]
        if self.kernels is not None:
            by = rows.temperature, rows.top_k, rows.top_p, numbers
            token_ids, chosen = self.kernels.draw_tokens(logits, *by, logprobs=rows.any_logprobs)
            if rows.any_typical:  # which the kernel does not know: these rows, and no others, go torch's way
                typical = (rows.typical_p < 1) & (rows.temperature > 0) & chosen.isfinite()
                (places,) = typical.nonzero(as_tuple=True)
                token_ids[places] = sample(logits[places], rows.at(places), numbers[places])
                if rows.any_logprobs:
                    own = logits[places].log_softmax(-1).gather(1, token_ids[places, None])
                    chosen[places] = own.squeeze(1)
            if n_top:
                top = _listed(*self.kernels.best_tokens(logits, n_top))
            return list(map(Drawn, token_ids.tolist(), chosen.tolist(), top))
        token_ids = sample(logits, rows, numbers)
        if not rows.any_logprobs:
            # One number that is none spoils the row, as it would the log-probabilities.
            chosen = torch.where(logits.amax(-1).isfinite(), 0.0, torch.nan)
            return list(map(Drawn, token_ids.tolist(), chosen.tolist(), top))
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
        if n_top:
            values, indices = top_tokens(logprobs, n_top)
            top = _listed(indices, values)
        return list(map(Drawn, token_ids.tolist(), chosen.tolist(), top))


class _OwnList(NamedTuple):
    """A sentence's shortlist: its target language, what is common to all in this, and its own part."""

    language: str
    common: Selected
    own: Selected

    def ids(self) -> Tensor:
        """What stands at each place: what is common, its own, and one for all that is on no list, (n,)."""
        return torch.cat((self.common.ids, self.own.ids, torch.zeros(1, dtype=torch.long)))

    def places(self, tokens: Tensor) -> Tensor:
        """Where tokens (n,) stand in `ids`; the last place where they do not."""
        places = torch.full_like(tokens, len(self.common.ids) + len(self.own.ids))
        for first, part in ((0, self.common.ids), (len(self.common.ids), self.own.ids)):
            if len(part):
                at = torch.searchsorted(part, tokens).clamp(max=len(part) - 1)
                places = torch.where(part[at] == tokens, first + at, places)
        return places


class TranslateRunner(DecodeRunner):
    """Encode, and rank continuations, for a model with encoder and decoder."""

    model: Translator

    def __init__(self, checkpoint: Checkpoint, n_slots: int, max_len: int) -> None:
        super().__init__(checkpoint, n_slots, max_len)
        if self.spans:
            self.cache.track_origins()
        self.memory = make_cache(checkpoint.config, n_slots, max_len, self.device, self.dtype)
        self.memory_lengths = [0] * n_slots
        self._sentences = [-1] * n_slots  # the number of the one whose memory a row holds
        self.shortlist = checkpoint.shortlist
        self._lists: list[_OwnList | None] = [None] * n_slots  # of rows with a shortlist
        # What a static step leaves beside its logits: the states that they are made of.
        self._states = torch.zeros(n_slots, self.config.d_model, device=self.device, dtype=self.dtype)
        # Of rows whose sentence is like some examples, what was read in these; with a shortlist the values
        # are places in it.
        self._stores: list[Datastore | None] = [None] * n_slots
        self._digit_ids = checkpoint.tokenizer.digit_ids
        head: nn.Module = self.model.head
        self._common: dict[str, Selected] = {}
        if self.shortlist is not None and isinstance(head, KernelInt8Linear):
            for language in self.shortlist.tables:
                common = self.shortlist.common(language, self._suppressed_ids)
                self._common[language] = head.select(common)
        self._numbers = itertools.count()

    def encode(
        self,
        rows: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]],
        languages: Sequence[str | None] = (),
    ) -> None:
        """Encode sources (B of them) and give source i's memory to its neighbouring rows, rows[i].

        languages[i] is that of its translation where it may be made of a shortlist's tokens, if there is one.
        """
        src = padded(sources, self.model.config.pad_id, self.device)
        memory, _ = self.model.encode(src)
        pairs = self.model.decoder.project_memory(memory)
        for i, (own, source) in enumerate(zip(rows, sources, strict=True)):
            shape = (len(own), -1, -1, -1)
            self.memory.write(own[0], [(k[i].expand(shape), v[i].expand(shape)) for k, v in pairs])
            number = next(self._numbers)
            selected = self._select(source, languages[i] if languages else None)
            for row in own:
                self.memory_lengths[row], self._sentences[row] = len(source), number
                self._lists[row], self._stores[row] = selected, None

    def read_examples(
        self,
        rows: Sequence[int],
        source: Sequence[int],
        examples: Sequence[ExampleIds],
        weight: float,
        language: str | None = None,
    ) -> None:
        """Lead the decoder through a sentence's examples, for the rows that translate it.

        Each sentence's alone, so that what is read hangs on no neighbours. `language` is as in `encode`; a
        shortlist has what the examples say, too.
        """
        store = read_examples(self.model, source, examples, weight, self._digit_ids)
        said = [] if store is None else store.values.tolist()
        listed = self._select(source, language, said)
        if store is not None and listed is not None:
            store = store._replace(values=listed.places(store.values))
        for row in rows:
            self._lists[row], self._stores[row] = listed, store

    def has_examples(self, row: int) -> bool:
        """Do examples have a say in what a row says?"""
        return self._stores[row] is not None

    @property
    def shortlist_languages(self) -> tuple[str, ...]:
        """Those of the kept tables; none where steps are static."""
        return () if self.static is not None else tuple(self._common)

    def _select(
        self, source: Sequence[int], language: str | None, also: Sequence[int] = ()
    ) -> _OwnList | None:
        """A sentence's shortlist, with some tokens that shall be on it; None where there is none."""
        head: nn.Module = self.model.head
        if self.shortlist is None or language not in self._common or self.static is not None:
            return None
        assert language is not None
        assert isinstance(head, KernelInt8Linear)
        ids = self.shortlist.ids(source, language, self._suppressed_ids, also)
        if len(ids) > _MOST_LISTED:
            return None
        return _OwnList(language, self._common[language], head.select(ids))

    def _decode(self, first: int, ids: Tensor, positions: Tensor, length: int, mask: Mask | None) -> Tensor:
        n_rows = ids.size(0)
        every = self.rows_per_memory(first, n_rows)
        lengths = self.memory_lengths[first : first + n_rows : every]
        hidden: Tensor = self.model.decoder(
            ids,
            positions,
            mask,
            self.cache.view(first, positions, length),
            self.memory.read(first, n_rows, max(lengths), every),
            self._length_mask(lengths),
        )
        return hidden

    def rows_per_memory(self, first: int, n_rows: int) -> int:
        """How many neighbouring rows may read one memory: as many as every sentence has, else 1.

        With sentences of one width rows keep together: moves close the hole of one with all rows of another.
        """
        own = self._sentences[first : first + n_rows]
        width = own.count(own[0])
        starts = range(0, n_rows, width)
        return width if all(own[i : i + width] == [own[i]] * width for i in starts) else 1

    def _compute(self, token_ids: Tensor, positions: Tensor, memory_lengths: Tensor, length: int) -> Tensor:
        places = positions[:, None]
        # Free rows read something: of nothing the softmax is NaN, which would stay in their cache.
        lengths = memory_lengths.clamp(min=1)
        hidden: Tensor = self.model.decoder(
            token_ids[:, None],
            places,
            self._static_mask(places, length),
            self.cache.view(0, places, length),
            self.memory.read(0, len(token_ids), length),
            RowSpans(lengths - 1) if self.spans else self._to_add(length_mask(lengths, length)),
        )
        self._states[: len(token_ids)] = hidden[:, -1]
        return self._project(hidden)

    def _memory_lengths(self, n_rows: int) -> list[int]:
        return self.memory_lengths[:n_rows]

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy rows with their memories."""
        super().move(moves, length)
        if moves:
            sources, targets = [source for source, _ in moves], [target for _, target in moves]
            self.memory.copy_rows(sources, targets, max(self.memory_lengths[source] for source in sources))
            for source, target in moves:
                self.memory_lengths[target] = self.memory_lengths[source]
                self._sentences[target] = self._sentences[source]
                self._lists[target] = self._lists[source]
                self._stores[target] = self._stores[source]

    def let_go(self, first: int) -> None:
        """Rows from `first` on are free: drop their shortlists and examples."""
        self._lists[first:] = [None] * (self.n_slots - first)
        self._stores[first:] = [None] * (self.n_slots - first)

    def copy_beams(self, copies: Sequence[tuple[int, int]], length: int) -> None:
        """Let rows follow others of their group, where the memory is the same anyway."""
        self.cache.follow([source for source, _ in copies], [target for _, target in copies], length)

    def wipe(self, rows: Sequence[int]) -> None:
        """Forget what rows hold, with their memories."""
        super().wipe(rows)
        _zero(self.memory, rows)

    def rank(self, logits: Tensor, n_best: int) -> list[Candidates]:
        """The n best continuations of each row of guarded logits (B, V), with log-probabilities.

        Those of a row where everything is banned have -inf, those of one that holds no numbers NaN.
        """
        if self.kernels is not None:
            return _listed(*self.kernels.best_tokens(logits, n_best))
        values, indices = top_tokens(logits, n_best)
        # Twice as fast on a CPU as logsumexp, which passes over the row more often.
        logprobs = logits.log_softmax(-1).gather(1, indices).masked_fill_(values == -torch.inf, -torch.inf)
        # In one copy from the device, for which the host waits once.
        ids, bits = torch.stack((indices, logprobs.double().view(torch.long))).cpu()
        return _listed(ids, bits.view(torch.float64))

    def continuations(
        self,
        first: int,
        token_ids: list[int],
        positions: list[int],
        n_best: int,
        guards: Guards,
        owed: Mapping[int, Sequence[int]],
        *,
        part: bool = False,
    ) -> tuple[list[Candidates], dict[int, Candidates]]:
        """A step as `step`: the n best continuations of each row, and of some rows what is owed them.

        Each with its log-probability. Rows with a shortlist choose among its tokens; they must be free of
        whatever changes more than what is impossible.
        """
        head: nn.Module = self.model.head
        stores = self._stores[first : first + len(token_ids)]
        if self.static is not None or not isinstance(head, KernelInt8Linear):
            logits, hidden = self._step_with_states(first, token_ids, positions, part=part)
            logits = self.guard(self._mix(logits, hidden, stores), guards)
            return self.rank(logits, n_best), self.score(logits, owed)
        hidden = self._read(first, token_ids, positions)[:, -1]
        best: dict[int, Candidates] = {}
        found: dict[int, Candidates] = {}
        lists = self._lists[first : first + len(token_ids)]
        for language, common in self._common.items():
            listed = {row: each for row, each in enumerate(lists) if each and each.language == language}
            own = {row: each.own for row, each in listed.items() if stores[row] is None}
            if own:
                mine = guards.of([*own])
                assert mine.only_ban, "a row with a shortlist is guarded by more than bans"
                banned = torch.tensor(mine.banned, dtype=torch.long).view(-1, 2)
                x = _rows(hidden, [*own])
                ranked = head.best_listed(x, common, [*own.values()], n_best, banned)
                best |= zip(own, _listed(*ranked), strict=True)
            led = {row: (each, stores[row]) for row, each in listed.items() if row not in own}
            best |= self._among_listed(head, common, hidden, led, n_best, guards)
        others = [row for row, each in enumerate(lists) if each is None]
        if others:
            place = {row: n for n, row in enumerate(others)}
            wanted = {place[row]: tokens for row, tokens in owed.items()}
            free, near = _rows(hidden, others), [stores[row] for row in others]
            likeliest, scored = self._among_all(head, free, near, n_best, guards.of(others), wanted)
            best |= zip(others, likeliest, strict=True)
            found = {others[n]: each for n, each in scored.items()}
        return [best[row] for row in range(len(token_ids))], found

    def _among_listed(
        self,
        head: KernelInt8Linear,
        common: Selected,
        hidden: Tensor,
        led: Mapping[int, tuple[_OwnList, Datastore | None]],
        n_best: int,
        guards: Guards,
    ) -> dict[int, Candidates]:
        """hidden (B, D) -> the n best of rows with examples among the tokens of their shortlists.

        On a CPU four times as fast as to mix what is said into the logits of all tokens.
        """
        best: dict[int, Candidates] = {}
        if not led:
            return best
        numbers = [*led]
        shared = head.listed(_rows(hidden, numbers), common)
        for store, places in _by_store([store for _, store in led.values()]):
            rows = [numbers[place] for place in places]
            listed, _ = led[rows[0]]
            x, mine = _rows(hidden, rows), guards.of(rows)
            assert mine.only_ban, "a row with a shortlist is guarded by more than bans"
            impossible = torch.full((len(rows), 1), -torch.inf)  # what is on no list
            parts = _rows(shared, places), head.listed(x, listed.own), impossible
            logits = store.mix(torch.cat(parts, 1), x)
            if mine.banned:
                within, tokens = zip(*mine.banned, strict=True)
                logits[list(within), listed.places(torch.tensor(tokens))] = -torch.inf
            assert self.kernels is not None
            columns, logprobs = self.kernels.best_tokens(logits, n_best)
            best |= zip(rows, _listed(listed.ids()[columns], logprobs), strict=True)
        return best

    def _mix(self, logits: Tensor, hidden: Tensor, stores: Sequence[Datastore | None]) -> Tensor:
        """logits (B, V) of the states hidden (B, D), in place: with what the rows' examples say."""
        for store, rows in _by_store(stores):
            logits[rows] = store.mix(logits[rows], hidden[rows])
        return logits

    def _step_with_states(
        self, first: int, token_ids: list[int], positions: list[int], *, part: bool
    ) -> tuple[Tensor, Tensor]:
        """As `step`, and the states that the logits are made of, (B, D)."""
        if self.static is not None and not part:
            return self.step(first, token_ids, positions), self._states[: len(token_ids)]
        hidden = self._read(first, token_ids, positions)[:, -1]
        return self._project(hidden[:, None]), hidden

    def _among_all(
        self,
        head: KernelInt8Linear,
        hidden: Tensor,
        stores: Sequence[Datastore | None],
        n_best: int,
        guards: Guards,
        owed: Mapping[int, Sequence[int]],
    ) -> tuple[list[Candidates], dict[int, Candidates]]:
        """hidden (B, D) -> `rank` and `score`; without logits in between where nothing needs them.

        On a CPU they are a third of a step.
        """
        if guards.only_ban and not owed and all(store is None for store in stores):
            banned = torch.tensor([*self._banned_everywhere, *guards.banned], dtype=torch.long).view(-1, 2)
            return _listed(*head.best(hidden, n_best, banned)), {}
        logits = self.guard(self._mix(self._project(hidden[:, None]), hidden, stores), guards)
        return self.rank(logits, n_best), self.score(logits, owed)

    def score(self, logits: Tensor, tokens: Mapping[int, Sequence[int]]) -> dict[int, Candidates]:
        """Some tokens of some rows of guarded logits (B, V), with log-probabilities, by row."""
        pairs = [(row, token) for row, each in tokens.items() for token in each]
        if not pairs:
            return {}
        rows, ids = (torch.tensor(each, device=self.device) for each in zip(*pairs, strict=True))
        logprobs = (logits[rows, ids] - logits.logsumexp(-1)[rows]).tolist()
        found: dict[int, Candidates] = {row: [] for row in tokens}
        for (row, token), logprob in zip(pairs, logprobs, strict=True):
            found[row].append((token, logprob))
        return found

    def return_logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """As `model.round_trip.return_logprobs`; where a kernel decodes, whatever stands beside a pair."""
        in_one_call = isinstance(self.model.decoder, KernelDecoder)
        return return_logprobs(self.model, pairs, self._decode_whole if in_one_call else None)

    def _decode_whole(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """As `Translator.decode`, each token as if it were alone: tgt (B, T) -> (B, T, D)."""
        n_texts, length = tgt.shape
        cache = make_cache(self.config, n_texts, length, self.device, self.dtype)
        places = torch.arange(length).repeat(n_texts)
        rows = torch.arange(n_texts).repeat_interleave(length)
        kvs = self.model.decoder.project_memory(memory)
        hidden: Tensor = self.model.decoder(
            tgt.reshape(-1, 1),
            places[:, None],
            RowSpans(places, rows=rows),
            cache.whole(),
            [(k.contiguous(), v.contiguous()) for k, v in kvs],
            RowSpans(memory_mask.view(n_texts, -1).sum(1) - 1),
        )
        return hidden.view(n_texts, length, -1)

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


class Wish(NamedTuple):
    """What may fill a mask: words that begin with a space or not, so many, or certain ones alone.

    `votes` is what examples say.
    """

    allowed: str | None
    top_k: int
    targets: Sequence[int] | None = None
    votes: Votes | None = None


class MaskedRunner:
    """One pass of an encoder with its two heads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert isinstance(checkpoint.model, MaskedLM)
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.device = next(self.model.parameters()).device
        self.allowed = {
            None: fillable(self.tokenizer, None).to(self.device),
            "space": fillable(self.tokenizer, True).to(self.device),
            "no_space": fillable(self.tokenizer, False).to(self.device),
        }
        self.n_allowed = {name: int(mask.sum()) for name, mask in self.allowed.items()}

    def encode(self, token_ids: Sequence[Sequence[int]], segment_ids: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids -> hidden states (B, S, D)."""
        ids = padded(token_ids, self.model.config.pad_id, self.device)
        return self.model.encode(ids, padded(segment_ids, 0, self.device))

    def fill(self, hidden: Tensor, wishes: Sequence[Wish]) -> list[list[tuple[int, float]]]:
        """hidden (M, D) of masks -> for each, token ids with probabilities among the allowed, best first."""
        found = []
        for start in range(0, len(wishes), _MASKS):
            part = slice(start, start + _MASKS)
            found += self._fill(hidden[part], wishes[part])
        return found

    def _fill(self, hidden: Tensor, wishes: Sequence[Wish]) -> list[list[tuple[int, float]]]:
        allowed = torch.stack([self.allowed[wish.allowed] for wish in wishes])
        head = self.model.mlm_head
        # One after the other up to the projection, which in 8 bits feels no neighbours: sums of a product in
        # float32 hang on the number of its rows. They are small; the weights of the projection are not.
        features = torch.stack([head.features(own) for own in hidden])
        project: nn.Module = head.project
        logits = (project(features) + head.bias).float().masked_fill_(~allowed, -torch.inf)
        if isinstance(project, Int8Linear) and self.model.config.tied:
            self._make_exact(logits, features)
        probs = logits.softmax(-1)
        for row, wish in enumerate(wishes):
            if wish.votes is not None:
                probs[row] = wish.votes.mix(probs[row])
        return [
            self._best(probs[row : row + 1], wish)
            if wish.targets is None
            else self._among(probs[row], wish.targets)[: wish.top_k]
            for row, wish in enumerate(wishes)
        ]

    def _make_exact(self, logits: Tensor, features: Tensor) -> None:
        """Compute the greatest of 8-bit logits (M, V) again in float32, in place.

        Half of what 8 bits change among first fillings comes of this one product.
        """
        values, ids = top_tokens(logits, min(_EXACT, logits.size(1)))
        weight = self.model.embeddings.tokens.weight  # which the vocabulary's projection has, too
        exact = (weight[ids] * features[:, None]).sum(-1) + self.model.mlm_head.bias[ids]
        logits.scatter_(1, ids, exact.masked_fill(values == -torch.inf, -torch.inf))

    def _best(self, probs: Tensor, wish: Wish) -> list[tuple[int, float]]:
        values, ids = top_tokens(probs, min(wish.top_k, self.n_allowed[wish.allowed]))
        (ranked,) = _listed(ids, values)
        return ranked

    def _among(self, probs: Tensor, targets: Sequence[int]) -> list[tuple[int, float]]:
        picked = probs[list(targets)].tolist()
        return sorted(zip(targets, picked, strict=True), key=lambda pair: -pair[1])

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
        ids = padded(token_ids, self.model.config.pad_id, self.device)
        logits: list[list[float]] = self.model(ids, padded(segment_ids, 0, self.device)).float().tolist()
        return logits

    def responds(self) -> bool:
        """Does the device still answer?"""
        return responds(self.device)


def _rows(hidden: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of hidden (B, D), in rising order; all of them as they are."""
    return hidden if len(rows) == len(hidden) else hidden[list(rows)]


def _by_store(stores: Sequence[Datastore | None]) -> list[tuple[Datastore, list[int]]]:
    """What was read for each sentence, with the places of its rows."""
    found: dict[int, tuple[Datastore, list[int]]] = {}
    for place, store in enumerate(stores):
        if store is not None:
            found.setdefault(id(store), (store, []))[1].append(place)
    return [*found.values()]


def _listed(ids: Tensor, values: Tensor) -> list[Candidates]:
    """Tensors (B, n) -> pairs, row by row."""
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [list(zip(own, each, strict=True)) for own, each in pairs]


def responds(device: torch.device) -> bool:
    """Does a device still answer? After some faults of a GPU all that a process asks of it fails."""
    try:
        return bool(torch.zeros(1, device=device).item() == 0)
    except torch.OutOfMemoryError:
        return True
    except Exception:
        return False


def _zero(cache: KVCache, rows: Sequence[int]) -> None:
    for row in rows:
        cache.k[:, row] = 0
        cache.v[:, row] = 0


def _suppressed(tokenizer: Tokenizer, config: TransformerConfig) -> frozenset[int]:
    """What must never be generated: every special token but the ends."""
    return tokenizer.special_ids - set(config.eos_ids)
