"""Real lanes on tiny random models, the answers of the oracles, and runners that fail on command."""

import asyncio
import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from prometheus_client import REGISTRY
from torch import Tensor

from app.engine.decode import DecodeLane, DecodeLimits, GenerateLane, TranslateLane
from app.engine.drawing import Drawing, Level, RowRules
from app.engine.errors import EngineError
from app.engine.graphs import Flight, Launcher, Work
from app.engine.runner import Candidates, GenerateRunner, Guards, TranslateRunner
from app.engine.sequence import Hypothesis, Sequence
from model.checkpoint import Checkpoint, load
from model.decoding import Decoded, beam_search, causal_scorer, translator_scorer
from model.inference import optimise
from model.kernels import compiled
from model.models import CausalLM, Translator
from model.nearest import Datastore, ExampleIds, read_examples
from model.quantize import KernelInt8Linear
from model.round_trip import MOST_ASKED, best_first, can_return, return_logprobs
from model.sampling import BeamParams, SamplingParams, SamplingRows, penalise, sample

# Sums in another order move a probability in its last bits; with large weights and a low temperature by more.
ROUNDING = 1e-4
_NEARLY_ONE = 1 - 1e-9

Fault = Callable[[str, list[int]], None]  # raises for (what the runner is about to do, the tokens it reads)


def load_bold(folder: Path, device: str = "cpu") -> Checkpoint:
    """A random model with larger weights: what it says next hangs on all that stands before.

    As it is made, a model with tied embeddings says its last token again and again, whatever the cache holds.
    """
    checkpoint = load(folder, device=device)
    for name, weight in checkpoint.model.named_parameters():
        if name.endswith(("out_proj.weight", "down.weight")):
            weight.data *= 10
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up.weight")):
            weight.data *= 3
    checkpoint.model.embeddings.tokens.weight.data[checkpoint.config.eos_id] *= 2
    if isinstance(checkpoint.model, Translator):
        # Its states are far from each other; the examples of tests are to have a say.
        checkpoint.model.config = replace(checkpoint.config, example_reach=20.0, example_temperature=1.0)
    return checkpoint


# How a lane's steps are launched: as they are, in few shapes, each before the last is read, and the same on a
# device that does nothing before somebody waits for it.
WAYS: dict[str, dict[str, int]] = {
    "plain": {},
    "static": {"static": True},
    "ahead": {"static": True, "ahead": True},
    "late": {"static": True, "ahead": True, "late": True},
    "kernels": {},  # of a model that `with_kernels` made
}


def with_kernels(checkpoint: Checkpoint, quantization: Literal["none", "int8"] = "none") -> Checkpoint:
    """A copy that runs as on a CPU with a compiler, in float32 or in eight bits."""
    kernels = compiled()
    if kernels is None or (quantization == "int8" and not kernels.has_int8):
        pytest.skip("no C compiler, or a processor without VNNI")
    model = copy.deepcopy(checkpoint.model)
    optimise(model, quantization, kernels=kernels)
    return replace(checkpoint, model=model)


def generate_lane(checkpoint: Checkpoint, n_slots: int = 4, **limits: int) -> GenerateLane:
    runner = FailingGenerateRunner(checkpoint, n_slots, checkpoint.config.max_len, limits.get("n_blocks", 8))
    bounds = _limits(checkpoint, n_slots, limits)
    ahead = bool(limits.get("ahead"))
    lane = GenerateLane("generate", runner, bounds, _budget(limits), launch_ahead=ahead)
    lane.chunk_tokens = limits.get("chunk_tokens", lane.chunk_tokens)
    if limits.get("static"):
        runner.make_static(runner.late if limits.get("late") else None)
    return lane


def translate_lane(checkpoint: Checkpoint, n_slots: int = 10, **limits: int) -> TranslateLane:
    runner = FailingTranslateRunner(checkpoint, n_slots, checkpoint.config.max_len)
    if limits.get("static"):
        runner.make_static()
    return TranslateLane("translate", runner, _limits(checkpoint, n_slots, limits), _budget(limits))


def _limits(checkpoint: Checkpoint, n_slots: int, limits: dict[str, int]) -> DecodeLimits:
    max_len = checkpoint.config.max_len
    items, tokens = limits.get("max_queue_items", 100), limits.get("max_queue_tokens", 10_000)
    return DecodeLimits(max_len, max_len, n_slots, items, tokens)


def _budget(limits: dict[str, int]) -> int:
    return limits.get("prefill_tokens", 64)


class LateLauncher(Launcher):
    """A device that works when it is waited for, in order; what it is given reads its buffers only then."""

    def __init__(self) -> None:
        self._given: deque[Work] = deque()
        self.n_given = self.n_done = 0

    def do(self, work: Work) -> None:
        self._given.append(work)
        self.n_given += 1

    def mark(self) -> "_LateMark":
        return _LateMark(self, self.n_given)

    def catch_up(self, n_given: int | None = None) -> None:
        """Do what was given, the first so many."""
        while self.n_done < (self.n_given if n_given is None else n_given):
            self.n_done += 1
            self._given.popleft()()


class _LateMark:
    def __init__(self, launcher: LateLauncher, n_given: int) -> None:
        self._launcher, self._n_given = launcher, n_given

    def synchronize(self) -> None:
        self._launcher.catch_up(self._n_given)


class _LateDrawing(Drawing):
    """What is written between steps comes behind those that were given before."""

    late: LateLauncher

    def set_rules(self, rules: Items[RowRules]) -> None:
        self.late.catch_up()
        super().set_rules(rules)

    def set_history(self, row: int, token_ids: Items[int]) -> None:
        self.late.catch_up()
        super().set_history(row, token_ids)


class FailingGenerateRunner(GenerateRunner):
    """The real one; `fault` may raise before each of its steps, and a token may turn a row into NaN."""

    fault: Fault = staticmethod(lambda what, ids: None)
    nan_token = -1

    def __init__(self, checkpoint: Checkpoint, n_slots: int, max_len: int, n_blocks: int = 0) -> None:
        super().__init__(checkpoint, n_slots, max_len, n_blocks)
        self.late = LateLauncher()

    def _make_drawing(self) -> Drawing:
        drawing = _LateDrawing(self.n_slots, self.max_len, self.config.eos_ids, self.device)
        drawing.late = self.late
        return drawing

    def launch(
        self, token_ids: list[int], positions: list[int], uniform: list[float], level: Level
    ) -> Flight:
        self.fault("step", token_ids)
        return super().launch(token_ids, positions, uniform, level)

    def _compute(self, token_ids: Tensor, positions: Tensor, memory_lengths: Tensor, length: int) -> Tensor:
        logits = super()._compute(token_ids, positions, memory_lengths, length)
        if self.nan_token >= 0:
            bad = token_ids == self.nan_token
            logits[bad] = torch.nan
            self.cache.v[:, : len(bad)][:, bad] = torch.nan
        return logits

    def prefill(self, first: int, prompts: Items[Items[int]], start: int = 0) -> None:
        self.fault("prefill", [token for prompt in prompts for token in prompt])
        self.late.catch_up()
        super().prefill(first, prompts, start)

    def reuse(self, row: int, blocks: Items[int]) -> None:
        self.late.catch_up()
        super().reuse(row, blocks)

    def wipe(self, rows: Items[int]) -> None:
        self.late.catch_up()
        super().wipe(rows)

    def keep(self, row: int, blocks: Items[tuple[int, int]]) -> None:
        self.fault("keep", [])
        self.late.catch_up()
        super().keep(row, blocks)

    def prompt_logprobs(self, prompt: Items[int]) -> list[float | None]:
        self.fault("prompt_logprobs", list(prompt))
        return super().prompt_logprobs(prompt)

    def step(self, first: int, token_ids: list[int], positions: list[int], *, part: bool = False) -> Tensor:
        self.fault("step", token_ids)
        self.late.catch_up()
        logits = super().step(first, token_ids, positions, part=part)
        self.late.catch_up()
        for row in (row for row, token in enumerate(token_ids) if token == self.nan_token):
            logits[row] = torch.nan
            self.cache.v[:, first + row] = torch.nan
        return logits

    def draw(self, logits: Tensor, rows: SamplingRows, uniform: list[float], n_top: int):  # type: ignore[no-untyped-def]
        self.fault("draw", [])
        return super().draw(logits, rows, uniform, n_top)

    def move(self, moves: Items[tuple[int, int]], length: int) -> None:
        self.fault("move", [])
        self.late.catch_up()
        super().move(moves, length)


class FailingTranslateRunner(TranslateRunner):
    """The real one; `fault` may raise before each of its steps, and a token may turn a row into NaN."""

    fault: Fault = staticmethod(lambda what, ids: None)
    nan_token = -1
    n_ranked_at_once = 0
    n_listed = 0  # rows that chose among a shortlist's tokens, step by step
    makes_logits = False  # also where ranking can do without
    impossible: Tensor | None = None  # (V,) of those logits

    def encode(
        self,
        rows: Items[Items[int]],
        sources: Items[Items[int]],
        languages: Items[str | None] = (),
    ) -> None:
        self.fault("encode", [token for source in sources for token in source])
        super().encode(rows, sources, languages)

    def _step_with_states(
        self, first: int, token_ids: list[int], positions: list[int], *, part: bool
    ) -> tuple[Tensor, Tensor]:
        self.fault("step", token_ids)
        logits, hidden = super()._step_with_states(first, token_ids, positions, part=part)
        for row in (row for row, token in enumerate(token_ids) if token == self.nan_token):
            logits[row] = torch.nan
            self.cache.v[:, first + row] = torch.nan
        return logits, hidden

    def read_examples(
        self,
        rows: Items[int],
        source: Items[int],
        examples: Items[ExampleIds],
        weight: float,
        language: str | None = None,
    ) -> None:
        self.fault("examples", [token for example in examples for token in example.source])
        super().read_examples(rows, source, examples, weight, language)

    def rank(self, logits: Tensor, n_best: int) -> list[list[tuple[int, float]]]:
        self.fault("rank", [])
        return super().rank(logits, n_best)

    def continuations(
        self,
        first: int,
        token_ids: list[int],
        positions: list[int],
        n_best: int,
        guards: Guards,
        owed: Mapping[int, Items[int]],
        *,
        part: bool = False,
    ) -> tuple[list[Candidates], dict[int, Candidates]]:
        self.fault("continuations", token_ids)
        self.n_listed += sum(own is not None for own in self._lists[first : first + len(token_ids)])
        return super().continuations(first, token_ids, positions, n_best, guards, owed, part=part)

    def _among_all(
        self,
        head: KernelInt8Linear,
        hidden: Tensor,
        stores: Items[Datastore | None],
        n_best: int,
        guards: Guards,
        owed: Mapping[int, Items[int]],
    ) -> tuple[list[Candidates], dict[int, Candidates]]:
        if self.makes_logits:
            logits = self._project(hidden[:, None])
            if self.impossible is not None:
                logits[:, self.impossible] = -torch.inf
            logits = self.guard(self._mix(logits, hidden, stores), guards)
            return self.rank(logits, n_best), self.score(logits, owed)
        self.n_ranked_at_once += guards.only_ban and not owed
        return super()._among_all(head, hidden, stores, n_best, guards, owed)

    def _read(self, first: int, token_ids: list[int], positions: list[int]) -> Tensor:
        hidden = super()._read(first, token_ids, positions)
        hidden[[token == self.nan_token for token in token_ids]] = torch.nan
        return hidden

    def move(self, moves: Items[tuple[int, int]], length: int) -> None:
        self.fault("move", [])
        super().move(moves, length)

    def copy_beams(self, copies: Items[tuple[int, int]], length: int) -> None:
        self.fault("copy_beams", [])
        super().copy_beams(copies, length)

    def return_logprobs(self, pairs: Items[tuple[Items[int], Items[int]]]) -> list[float]:
        self.fault("return", [token for source, _ in pairs for token in source])
        return super().return_logprobs(pairs)

    def align(self, source: Items[int], target: Items[int]) -> list[list[float]]:
        self.fault("align", list(source))
        return super().align(source, target)


def fails_on(token: int, *places: str) -> Fault:
    """Raise wherever a token is read."""

    def fault(what: str, ids: list[int]) -> None:
        if what in places and token in ids:
            raise RuntimeError(f"{what} read the token {token}")

    return fault


@torch.inference_mode()
def turn(lane: DecodeLane) -> None:  # type: ignore[type-arg]
    """One turn, its results delivered: the worker without its thread."""
    for handover in lane.turn():
        handover.complete()
    check_rows(lane)


def drive(lane: DecodeLane) -> None:  # type: ignore[type-arg]
    """Turns until nothing is left to do."""
    while lane.has_work():
        turn(lane)
    assert lane.door.n_inside == 0
    assert lane.scheduler.n_active == 0


def check_rows(lane: DecodeLane) -> None:  # type: ignore[type-arg]
    """Every active row has one owner, and each owner all of its rows."""
    scheduler = lane.scheduler
    rows = {row: sequence for sequence in scheduler.running for row in sequence.rows}
    assert [rows[row] for row in range(scheduler.n_active)] == scheduler.owners
    assert [len(sequence.rows) for sequence in scheduler.running] == [s.n_rows for s in scheduler.running]
    assert len(rows) == scheduler.n_active <= scheduler.n_slots


async def outcome(sequence: Sequence) -> list[Hypothesis] | EngineError:
    """The result, or the error it ended with."""
    try:
        return await asyncio.wait_for(sequence.result(), 20)
    except EngineError as error:
        return error


async def tokens(sequence: Sequence) -> list[int]:
    """What a generation said, its end token left out, as both ways of reading it tell."""
    (hypothesis,) = await asyncio.wait_for(sequence.result(), 20)
    events = [event async for event in sequence.events()]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [
        hypothesis.finish_reason
    ]
    assert [event.token_id for event in events][: len(hypothesis.token_ids)] == hypothesis.token_ids
    assert [event.logprob for event in events][: len(hypothesis.logprobs)] == hypothesis.logprobs
    return hypothesis.token_ids


def ordinary_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that are text."""
    special = checkpoint.tokenizer.special_ids
    return [token for token in range(checkpoint.config.vocab_size) if token not in special]


def suppressed(checkpoint: Checkpoint) -> frozenset[int]:
    return checkpoint.tokenizer.special_ids - {checkpoint.config.eos_id}


@torch.no_grad()
def expected_generation(
    checkpoint: Checkpoint, sequence: Sequence, found: list[int] | None = None
) -> list[int]:
    """What a generation must say: one token after the other, nothing cached, nobody beside it.

    A number that falls on the border between two tokens, within what sums in another order differ by, may
    draw either: there the answer goes on with the one that was `found`.
    """
    model, params = checkpoint.model, sequence.params
    assert isinstance(model, CausalLM)
    assert isinstance(params, SamplingParams)
    score, noise, text = causal_scorer(model), random.Random(sequence.seed), list(sequence.prompt_ids)
    rows, eos_id = SamplingRows.stack([params]), checkpoint.config.eos_id
    for n_new in range(params.max_new_tokens):
        logits = score([text], [0])
        logits[:, list(suppressed(checkpoint))] = -torch.inf
        values = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        logits = penalise(logits, torch.tensor([text]), *(torch.tensor([value]) for value in values))
        for biased, amount in params.logit_bias:
            logits[0, biased] += amount
        if n_new < params.min_new_tokens:
            logits[:, eos_id] = -torch.inf
        number = noise.random()
        numbers = (min(max(number + shift, 0.0), _NEARLY_ONE) for shift in (0.0, -ROUNDING, ROUNDING))
        token, *near = (int(sample(logits, rows, torch.tensor([u], dtype=torch.float64))) for u in numbers)
        said = [*found, eos_id][n_new : n_new + 1] if found is not None else []
        if said and said[0] in near:
            token = said[0]
        if token == eos_id:
            break
        text.append(token)
    return text[sequence.n_prompt_tokens :]


def expected_translation(checkpoint: Checkpoint, sequence: Sequence) -> list[Decoded]:
    """What the oracle of beam search says."""
    assert isinstance(checkpoint.model, Translator)
    assert isinstance(sequence.params, BeamParams)
    params, model = sequence.params, checkpoint.model
    digits = checkpoint.tokenizer.digit_ids
    weight = params.example_weight if params.repetition_penalty == 1.0 else 0.0
    store = read_examples(model, sequence.prompt_ids, sequence.examples, weight, digits)
    score = translator_scorer(model, [sequence.prompt_ids], [store], suppressed(checkpoint))
    all_of_them = replace(params, num_return_sequences=params.num_beams)
    (decoded,) = beam_search(
        score, [[sequence.prompt_ids[1]]], checkpoint.config.eos_id, all_of_them, suppressed(checkpoint)
    )
    ended = [each for each in decoded if each.finished]
    said = [each.token_ids for each in ended[:MOST_ASKED]]
    if params.round_trip and said and can_return(checkpoint.config, sequence.prompt_ids, said):
        back = return_logprobs(checkpoint.model, [(sequence.prompt_ids, tokens) for tokens in said])
        found = [(each.score, len(each.token_ids) + 1) for each in ended]
        decoded[: len(ended)] = best_first(ended, found, back, params)
    return decoded[: params.num_return_sequences]


def random_generation(checkpoint: Checkpoint, rng: random.Random) -> Sequence:
    """Any prompt, any parameters, in a context of 64."""
    sampled = rng.random() < 0.6
    params = SamplingParams(
        temperature=rng.choice([0.3, 1.0, 1.7]) if sampled else 0.0,
        top_k=rng.choice([0, 0, 1, 5, 40, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.4, 0.9]),
        typical_p=rng.choice([1.0, 1.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5, -0.2]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5, -0.5]),
        logit_bias=rng.choice([(), ((300, 4.0), (301, -100.0), (2, 2.0))]),
        max_new_tokens=rng.randint(1, 20),
        min_new_tokens=rng.choice([0, 0, 4]),
        seed=rng.choice([None, rng.randrange(2**63)]),
        top_n_tokens=rng.choice([0, 0, 3]),
    )
    ids = ordinary_ids(checkpoint)
    return Sequence([rng.choice(ids) for _ in range(rng.randint(1, 30))], params)


def random_launchable(checkpoint: Checkpoint, rng: random.Random) -> Sequence:
    """Mostly such that steps can be launched ahead: a lane does so while none among its rows stops it."""
    sequence = random_generation(checkpoint, rng)
    assert isinstance(sequence.params, SamplingParams)
    if rng.random() < 0.9:
        plain = {"logit_bias": (), "top_n_tokens": 0, "typical_p": 1.0}
        sequence.params = replace(sequence.params, **plain)  # type: ignore[arg-type]
    return sequence


def random_translation(checkpoint: Checkpoint, rng: random.Random, **changes: object) -> Sequence:
    """Any source, any parameters."""
    num_beams = rng.choice([1, 2, 4, 5])
    values: dict[str, object] = {
        "num_beams": num_beams,
        "num_return_sequences": rng.randint(1, num_beams),
        "length_penalty": rng.choice([0.0, 0.5, 1.0, 1.5, -1.0]),
        "max_new_tokens": rng.randint(1, 12),
        "min_new_tokens": rng.choice([0, 0, 5]),
        "no_repeat_ngram_size": rng.choice([0, 0, 1, 2]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        "early_stopping": rng.choice([None, None, True, False, "never"]),
    }
    if values["early_stopping"] is None:  # else what was cut competes, too, and the oracle does not tell it
        values["round_trip"] = rng.choice([0.0, 0.0, 0.7])
    values["example_weight"] = rng.choice([0.0, 0.0, 0.5, 0.9])
    ids = ordinary_ids(checkpoint)

    def text(most: int) -> list[int]:
        return [rng.choice(ids) for _ in range(rng.randint(1, most))]

    tokenizer, language = checkpoint.tokenizer, rng.choice(sorted(checkpoint.tokenizer.languages))
    own = text(20)
    examples = [
        ExampleIds(
            tokenizer.source_ids(rng.choices(own, k=rng.randint(1, 20)) + text(3), language),
            [*tokenizer.target_ids(language), *text(12), tokenizer.eos_id],
            rng.random(),
            rng.random() < 0.3,
        )
        for _ in range(rng.choice([0, 1, 5]))
    ]
    source = tokenizer.source_ids(own, language)
    params = BeamParams(**(values | changes))  # type: ignore[arg-type]
    return Sequence(source, params, examples=examples)


async def check_generations(checkpoint: Checkpoint, sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        found = await tokens(sequence)
        assert found == expected_generation(checkpoint, sequence, found), (sequence.params, sequence.seed)


async def check_translations(checkpoint: Checkpoint, sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        found = await asyncio.wait_for(sequence.result(), 20)
        wanted = expected_translation(checkpoint, sequence)
        assert [h.token_ids for h in found] == [d.token_ids for d in wanted], sequence.params
        for hypothesis, decoded in zip(found, wanted, strict=True):
            assert abs(hypothesis.score - decoded.score) < 1e-4 * max(1.0, abs(decoded.score))
            assert (hypothesis.finish_reason == "eos_token") == decoded.finished
            assert len(hypothesis.logprobs) == len(hypothesis.token_ids)


def gauge(name: str, endpoint: str) -> float:
    """The value of a metric at this moment."""
    samples = [s for family in REGISTRY.collect() for s in family.samples if s.name == f"transformer_{name}"]
    values = [sample.value for sample in samples if sample.labels["endpoint"] == endpoint]
    assert values
    return sum(values)
