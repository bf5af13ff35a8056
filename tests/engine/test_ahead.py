"""Drawing on the device, and steps that are launched before the last one is read."""

import gc
import itertools
import random
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from app.engine.decode import GenerateLane, make_decode_lane
from app.engine.drawing import Level, RowRules, has_penalties, level_of
from app.engine.errors import Aborted, StepFailed
from app.engine.graphs import Flight
from app.engine.runner import GenerateRunner, Guards
from app.engine.sequence import Sequence
from model.checkpoint import Checkpoint
from model.sampling import SamplingParams, SamplingRows
from tests.engine.rig import (
    WAYS,
    FailingGenerateRunner,
    check_generations,
    drive,
    expected_generation,
    generate_lane,
    load_bold,
    ordinary_ids,
    outcome,
    random_launchable,
    turn,
    with_kernels,
)
from tests.tiny import TinyFolders

BAD = 299


def plain_params(checkpoint: Checkpoint, rng: random.Random) -> SamplingParams:
    """Any parameters with which steps draw on the device."""
    while True:
        params = random_launchable(checkpoint, rng).params
        assert isinstance(params, SamplingParams)
        if level_of(params) is not None:
            return params


def plain_generation(checkpoint: Checkpoint, rng: random.Random, **changes: object) -> Sequence:
    """Any prompt, and such parameters."""
    params = replace(plain_params(checkpoint, rng), **changes)  # type: ignore[arg-type]
    return Sequence(random_launchable(checkpoint, rng).prompt_ids, params)


def failing(lane: GenerateLane) -> FailingGenerateRunner:
    assert isinstance(lane.runner, FailingGenerateRunner)
    return lane.runner


# To the tokens


@pytest.mark.parametrize(
    ("params", "level"),
    [
        (SamplingParams(), Level.GREEDY),
        (SamplingParams(top_k=5, top_p=0.5, typical_p=0.5, min_new_tokens=3), Level.GREEDY),
        (SamplingParams(repetition_penalty=1.1), Level.DRAWN),
        (SamplingParams(presence_penalty=0.5), Level.DRAWN),
        (SamplingParams(temperature=0.5), Level.DRAWN),
        (SamplingParams(temperature=0.5, top_k=5), Level.FILTERED),
        (SamplingParams(temperature=0.5, top_p=0.5, frequency_penalty=1.0), Level.FILTERED),
        (SamplingParams(temperature=0.5, typical_p=0.5), None),
        (SamplingParams(top_n_tokens=1), None),
        (SamplingParams(logit_bias=((5, 1.0),)), None),
    ],
)
def test_levels(params: SamplingParams, level: Level | None) -> None:
    assert level_of(params) is level


@torch.inference_mode()
def test_a_step_draws_what_the_sampler_draws(causal: Checkpoint) -> None:
    """The same tokens and log-probabilities to the last bit, whatever the neighbours ask for."""
    rng, ids = random.Random(0), ordinary_ids(causal)
    drawing, sampling = GenerateRunner(causal, 8, 64), GenerateRunner(causal, 8, 64)
    levels = set()
    for runner in (drawing, sampling):
        runner.make_static()
    assert drawing.drawing is not None
    for number in range(40):
        prompts = [[rng.choice(ids) for _ in range(rng.randint(2, 20))] for _ in range(rng.randint(1, 8))]
        params = [plain_params(causal, rng) if number % 5 else SamplingParams() for _ in prompts]
        uniform = [rng.choice([0.0, rng.random(), 1 - 2**-53]) for _ in prompts]
        for runner in (drawing, sampling):
            runner.prefill(0, [prompt[:-1] for prompt in prompts])
        reads = [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts]

        rules = [
            RowRules(p, len(prompt) - 1 + p.min_new_tokens) for p, prompt in zip(params, prompts, strict=True)
        ]
        drawing.drawing.set_rules(rules)
        for row, prompt in enumerate(prompts):
            drawing.drawing.set_history(row, prompt)
        level = max(each for p in params if (each := level_of(p)) is not None)
        found = drawing.launch(*reads, uniform, level).land()

        guards = Guards()
        for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
            if p.min_new_tokens:
                guards.banned += [(row, causal.config.eos_id)]
            if has_penalties(p):
                guards.penalty(row, prompt, p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        logits = sampling.guard(sampling.step(0, *reads), guards)
        wanted = sampling.draw(logits, SamplingRows.stack(params), uniform, 0)
        assert found == ([d.token_id for d in wanted], [d.logprob for d in wanted]), params
        levels.add(level)
    assert levels == set(Level)


# One step ahead


def watch(runner: GenerateRunner) -> list[str]:
    """The order in which steps are launched and landed, from now on."""
    order: list[str] = []
    numbers, launch = itertools.count(), runner.launch

    def watched(*arguments: object) -> Flight:
        n, flight = next(numbers), launch(*arguments)  # type: ignore[arg-type]
        order.append(f"launch {n}")
        land = flight.land

        def landed() -> tuple[list[int], list[float]]:
            order.append(f"land {n}")
            return land()

        flight.land = landed  # type: ignore[method-assign]
        return flight

    runner.launch = watched  # type: ignore[assignment, method-assign]
    return order


def test_the_next_step_is_launched_before_the_last_is_read(causal: Checkpoint) -> None:
    """And none behind the one with which everybody reaches its length."""
    lane = generate_lane(causal, **WAYS["late"])
    order = watch(lane.runner)
    sequence = Sequence([300, 301], SamplingParams(max_new_tokens=4, min_new_tokens=4))
    lane.submit([sequence])
    counts = []
    while lane.has_work():
        turn(lane)
        counts.append(sequence.n_generated_tokens)
    assert counts == [0, 1, 2, 3, 4]
    assert order == [
        *("launch 0", "launch 1", "land 0", "launch 2", "land 1", "launch 3", "land 2", "land 3"),
    ]


def test_without_looking_ahead_a_step_is_read_at_once(causal: Checkpoint) -> None:
    lane = generate_lane(causal, **WAYS["static"])
    order = watch(lane.runner)
    sequence = Sequence([300, 301], SamplingParams(max_new_tokens=2, min_new_tokens=2))
    lane.submit([sequence])
    drive(lane)
    assert order == ["launch 0", "land 0", "launch 1", "land 1"]


async def test_events_are_the_same_whether_launched_ahead_or_not(causal: Checkpoint) -> None:
    told = []
    for way in ("plain", "static", "ahead", "late"):
        rng = random.Random(9)
        sequences = [plain_generation(causal, rng, seed=seed) for seed in range(12)]
        lane = generate_lane(causal, n_slots=5, **WAYS[way])
        lane.submit(sequences)
        drive(lane)
        told.append([[event async for event in sequence.events()] for sequence in sequences])
    for others in told[1:]:
        for events, same in zip(told[0], others, strict=True):
            assert [e._replace(logprob=0.0) for e in events] == [e._replace(logprob=0.0) for e in same]
            logprobs = [event.logprob for event in same]
            assert [event.logprob for event in events] == pytest.approx(logprobs, rel=1e-4, abs=1e-5)


async def test_kernels_for_a_cpu_can_be_launched_ahead(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane, rng = generate_lane(with_kernels(causal), n_slots=5, **WAYS["late"]), random.Random(11)
    sequences = [plain_generation(causal, rng) for _ in range(10)]
    lane.submit(sequences)
    drive(lane)
    await check_generations(causal_oracle, sequences)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
async def test_the_host_never_waits_for_a_gpu_but_to_read_a_step(
    tiny_folders: TinyFolders, causal_oracle: Checkpoint
) -> None:
    """Admission, prompts in chunks, moves and all: torch raises where an operation would wait."""
    rng, lane = (
        random.Random(10),
        generate_lane(load_bold(tiny_folders.generate, "cuda"), n_slots=5, chunk_tokens=5, **WAYS["ahead"]),
    )
    for mode in ("default", "error"):  # what is done once may wait
        sequences = [plain_generation(causal_oracle, rng) for _ in range(12)]
        torch.cuda.set_sync_debug_mode(mode)
        try:
            lane.submit(sequences)
            drive(lane)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        await check_generations(causal_oracle, sequences)


async def test_a_row_is_free_at_once_though_a_step_of_it_is_on_its_way(
    causal: Checkpoint, causal_oracle: Checkpoint
) -> None:
    lane = generate_lane(causal, n_slots=2, **WAYS["late"])
    long = SamplingParams(max_new_tokens=20, min_new_tokens=20, repetition_penalty=1.3)
    leaving, staying, next_one = (Sequence([first, 301, 302], long) for first in (300, 310, 320))
    lane.submit([leaving, staying, next_one])
    for _ in range(4):
        turn(lane)
    lane.abort([leaving])
    turn(lane)
    assert lane.scheduler.running == [staying, next_one]
    assert isinstance(await outcome(leaving), Aborted)
    assert leaving.n_generated_tokens == 3
    drive(lane)
    await check_generations(causal_oracle, [staying, next_one])


async def test_a_row_that_moves_in_the_middle_of_its_prompt_remembers_all_of_it(
    causal: Checkpoint, causal_oracle: Checkpoint
) -> None:
    lane = generate_lane(causal, n_slots=3, chunk_tokens=2, **WAYS["late"])
    rng, ids = random.Random(1), ordinary_ids(causal)
    short, long = (SamplingParams(max_new_tokens=n, min_new_tokens=n) for n in (4, 25))
    streams = [Sequence([300, 301], short), Sequence([310, 311], long)]
    lane.submit(streams)
    turn(lane)
    prompt = [rng.choice(ids) for _ in range(40)]
    # Its own tokens are likelier, so that each of them counts.
    reading = Sequence(prompt, SamplingParams(max_new_tokens=20, presence_penalty=-4.0))
    lane.submit([reading])
    while lane.scheduler.n_active == 3 or streams[0].n_generated_tokens == 0:
        turn(lane)
    assert reading.rows == [0]
    assert reading.n_generated_tokens == 0
    drive(lane)
    await check_generations(causal_oracle, [*streams, reading])


async def test_the_whole_context_may_be_filled_ahead(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal, **WAYS["late"])
    sequences = [
        Sequence([300] * n, SamplingParams(max_new_tokens=64 - n, min_new_tokens=64 - n)) for n in (1, 40, 63)
    ]
    lane.submit(sequences)
    drive(lane)
    await check_generations(causal_oracle, sequences)


# What fails


def sometimes(work: Callable[..., object], every: int) -> Callable[..., object]:
    """Fails before it begins, once in so many times."""
    numbers = itertools.count(1)

    def run(*arguments: object) -> object:
        if next(numbers) % every == 0:
            raise RuntimeError("no")
        return work(*arguments)

    return run


@pytest.mark.parametrize("way", ["static", "ahead", "late"])
async def test_a_launch_that_fails_is_a_step_that_is_made(
    causal: Checkpoint, causal_oracle: Checkpoint, way: str
) -> None:
    lane, rng = (
        generate_lane(causal, n_slots=5, prefill_tokens=40, chunk_tokens=5, **WAYS[way]),
        random.Random(4),
    )
    lane.runner.launch = sometimes(lane.runner.launch, 3)  # type: ignore[assignment, method-assign]
    sequences = [plain_generation(causal, rng) for _ in range(12)]
    lane.submit(sequences)
    drive(lane)
    await check_generations(causal_oracle, sequences)


@pytest.mark.parametrize("way", ["static", "ahead", "late"])
async def test_a_landing_that_fails_is_made_again(
    causal: Checkpoint, causal_oracle: Checkpoint, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    lane, rng = (
        generate_lane(causal, n_slots=5, prefill_tokens=40, chunk_tokens=5, **WAYS[way]),
        random.Random(5),
    )
    land, numbers = Flight.land, itertools.count(1)

    def landing(flight: Flight) -> tuple[list[int], list[float]]:
        found = land(flight)
        if next(numbers) % 3 == 0:
            raise RuntimeError("the device says no")
        return found

    monkeypatch.setattr(Flight, "land", landing)
    sequences = [plain_generation(causal, rng) for _ in range(12)]
    lane.submit(sequences)
    drive(lane)
    await check_generations(causal_oracle, sequences)
    assert not lane.failures.broken


@pytest.mark.parametrize("way", ["static", "ahead", "late"])
async def test_steps_that_do_not_fit_are_made_in_parts(
    causal: Checkpoint, causal_oracle: Checkpoint, way: str
) -> None:
    """Of seven rows the first three alone, which are no bucket: nothing is written into the others."""

    def too_many(what: str, ids: list[int]) -> None:
        if what == "step" and len(ids) > 3:
            raise torch.OutOfMemoryError(f"{len(ids)} rows")

    lane, rng = generate_lane(causal, n_slots=7, prefill_tokens=1000, **WAYS[way]), random.Random(6)
    failing(lane).fault = too_many
    sequences = [plain_generation(causal, rng) for _ in range(10)]
    lane.submit(sequences)
    drive(lane)
    await check_generations(causal_oracle, sequences)


@pytest.mark.parametrize("way", ["static", "ahead", "late"])
async def test_a_row_without_numbers_fails_alone_though_it_is_a_step_ahead(
    causal: Checkpoint, causal_oracle: Checkpoint, way: str
) -> None:
    lane, rng = generate_lane(causal, n_slots=4, prefill_tokens=1000, **WAYS[way]), random.Random(7)
    failing(lane).nan_token = BAD
    sequences = [plain_generation(causal, rng) for _ in range(12)]
    innocent = [s for s in sequences if BAD not in [*s.prompt_ids, *expected_generation(causal_oracle, s)]]
    culprits = [Sequence([300, BAD], SamplingParams(max_new_tokens=9)) for _ in range(3)]
    lane.submit([culprits[0], *innocent[:3], culprits[1], *innocent[3:], culprits[2]])
    drive(lane)
    for culprit in culprits:
        assert isinstance(await outcome(culprit), StepFailed)
    await check_generations(causal_oracle, innocent)


async def test_giving_up_a_lane_leaves_it_as_new(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane, rng = generate_lane(causal, n_slots=3, **WAYS["late"]), random.Random(8)
    lost = [plain_generation(causal, rng, max_new_tokens=20) for _ in range(5)]
    lane.submit(lost)
    for _ in range(3):
        turn(lane)
    for handover in lane.fail_all(StepFailed):
        handover.complete()
    assert not lane.has_work()
    sequences = [plain_generation(causal, rng) for _ in range(5)]
    lane.submit(sequences)
    drive(lane)
    await check_generations(causal_oracle, sequences)


def test_a_static_runner_is_gone_with_the_last_who_held_it(causal: Checkpoint) -> None:
    """At once, not with the next collection of circles: its cache is most of a device's memory."""
    gc.disable()
    try:
        lane = generate_lane(causal, **WAYS["ahead"])
        lane.submit([Sequence([300, 301], SamplingParams(max_new_tokens=4))])
        drive(lane)
        cache = weakref.ref(lane.runner.cache)
        del lane
        assert cache() is None
    finally:
        gc.enable()


def test_a_lane_looks_ahead_where_it_is_told_to(causal: Checkpoint) -> None:
    limits = {"n_slots": 3, "prefill_tokens": 9, "max_queue_items": 5, "max_queue_tokens": 6}
    for word, ahead in ((None, False), (False, False), (True, True)):
        lane = make_decode_lane("generate", causal, **limits, launch_ahead=word)
        assert isinstance(lane, GenerateLane)
        assert lane.launch_ahead is ahead
        assert (lane.runner.static is not None) is ahead
