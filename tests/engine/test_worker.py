"""The device thread: one hand-over per turn, and no failure that takes more with it than its own rows."""

import asyncio
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from app.engine.decode import Ranked, TranslateLane
from app.engine.errors import Aborted, Draining, EngineError, StepFailed
from app.engine.lane import Door, Failures, Handover, Handovers, Lane
from app.engine.runner import TranslateRunner
from app.engine.sequence import Sequence
from app.engine.worker import DeviceWorker
from model.checkpoint import Checkpoint
from model.sampling import BeamParams, SamplingParams
from tests.engine.rig import (
    FailingGenerateRunner,
    FailingTranslateRunner,
    check_generations,
    check_translations,
    drive,
    expected_generation,
    expected_translation,
    fails_on,
    generate_lane,
    outcome,
    random_generation,
    random_translation,
    translate_lane,
    turn,
)

BAD = 333  # the token that runners fail on


class CountingLoop:
    """The real loop, with a count of what crosses to it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.n_crossings = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        self.n_crossings += 1
        return self.loop.call_soon_threadsafe(callback, *args)


class Ball:
    """Comes back after as many turns as it is told; `deliver` may raise."""

    def __init__(self, n_turns: int = 1, *, broken: bool = False) -> None:
        self.n_turns, self.broken = n_turns, broken
        self.deliveries: list[object] = []
        self.back = asyncio.Event()

    def deliver(self, delivery: object) -> None:
        if self.broken:
            raise RuntimeError("this receiver is broken")
        self.deliveries.append(delivery)
        if isinstance(delivery, EngineError) or len(self.deliveries) == self.n_turns:
            self.back.set()


class Juggler:
    """A lane of balls: a turn gives each that is in the air its next number."""

    def __init__(self, name: str = "generate") -> None:
        self.name = name
        self.door = Door()
        self.failures = Failures(name, "tiny", lambda: self.responds)
        self.wake: Callable[[], None] = lambda: None
        self.responds, self.tells = True, False
        self.raises: list[str] = []  # what the next calls raise in
        self.error: BaseException = RuntimeError()
        self.n_turns = 0
        self.pause = threading.Event()
        self.pause.set()
        self.air: dict[Ball, int] = {}  # with the turns that are left

    def throw(self, balls: Iterable[Ball]) -> None:
        self.door.check()
        balls = list(balls)
        self.air |= {ball: ball.n_turns for ball in balls}
        self.door.enter(len(balls))
        self.wake()

    def tell_before_calls(self, tell: Callable[[], None]) -> bool:
        self.tell = tell
        return self.tells

    def has_work(self) -> bool:
        return bool(self.air)

    def turn(self) -> Handovers:
        self.pause.wait(5)
        self.n_turns += 1
        self._maybe_raise("turn")
        out: Handovers = []
        for ball in list(self.air):
            self.air[ball] -= 1
            out.append(Handover(ball, self.n_turns, None if self.air[ball] else self.door))
        self.air = {ball: left for ball, left in self.air.items() if left}
        return out

    def fail_all(self, error: Callable[[], EngineError]) -> Handovers:
        self._maybe_raise("fail_all")
        air, self.air = self.air, {}
        return [Handover(ball, error(), self.door) for ball in air]

    def _maybe_raise(self, place: str) -> None:
        if place in self.raises:
            self.raises.remove(place)
            raise self.error


@asynccontextmanager
async def working(*lanes: Lane) -> AsyncIterator[DeviceWorker]:
    worker = DeviceWorker(lanes)
    worker.start(asyncio.get_running_loop())
    try:
        yield worker
    finally:
        await asyncio.to_thread(worker.stop)
        assert not worker.alive


async def until_idle(lane: Lane) -> None:
    while lane.has_work():  # noqa: ASYNC110 - the device thread sets no event
        await asyncio.sleep(0.001)


async def wait(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), 10)


async def test_one_crossing_per_turn() -> None:
    lane, loop = Juggler(), CountingLoop()
    balls = [Ball(5) for _ in range(32)]
    lane.throw(balls)
    worker = DeviceWorker([lane])
    worker.start(loop)  # type: ignore[arg-type]
    await asyncio.gather(*(wait(ball.back) for ball in balls))
    assert loop.n_crossings == lane.n_turns == 5
    assert [ball.deliveries for ball in balls] == [[1, 2, 3, 4, 5]] * 32
    await asyncio.to_thread(worker.stop)
    assert loop.n_crossings == 5


class Teller(Juggler):
    """Says in every turn but those in `silent` that the interpreter is free, in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tells = True
        self.silent: set[int] = set()
        self.n_told: list[int] = []  # after each turn's call: what has crossed by then

    def turn(self) -> Handovers:
        if self.n_turns + 1 not in self.silent:
            self.tell()
        self.n_told.append(self.loop.n_crossings)
        return super().turn()

    loop: CountingLoop


async def test_results_cross_when_the_next_turn_needs_no_interpreter() -> None:
    lane, ball = Teller(), Ball(5)
    lane.loop = CountingLoop()
    lane.silent = {3}
    lane.throw([ball])
    worker = DeviceWorker([lane])
    worker.start(lane.loop)  # type: ignore[arg-type]
    await wait(ball.back)
    assert ball.deliveries == [1, 2, 3, 4, 5]
    # The second turn's wait for no call longer than the third turn; then the third's come with them.
    assert lane.n_told == [0, 1, 1, 2, 3]
    assert lane.loop.n_crossings == 4
    await asyncio.to_thread(worker.stop)


async def test_the_last_results_wait_for_nothing() -> None:
    lane, other, ball = Teller(), Juggler("translate"), Ball()
    lane.loop = CountingLoop()
    other.throw([Ball(1_000_000)])
    async with working(lane, other):
        lane.throw([ball])
        await wait(ball.back)


async def test_nothing_is_held_through_the_turn_of_a_lane_that_tells_nothing() -> None:
    lane, slow, ball = Teller(), Juggler("translate"), Ball(9)
    lane.loop = CountingLoop()
    lane.throw([ball])
    slow.throw([Ball(1_000_000)])
    worker = DeviceWorker([lane, slow])
    worker._loop = lane.loop  # type: ignore[assignment]
    assert worker._turn(lane)
    assert lane.loop.n_crossings == 0
    crossed: list[int] = []

    def turn() -> Handovers:
        crossed.append(lane.loop.n_crossings)
        return []

    slow.turn = turn  # type: ignore[method-assign]
    assert worker._turn(slow)
    assert crossed == [1]


async def test_what_is_held_comes_before_an_error() -> None:
    lane, ball = Teller(), Ball(9)
    lane.loop = CountingLoop()
    lane.throw([ball])
    worker = DeviceWorker([lane])
    worker._loop = lane.loop  # type: ignore[assignment]
    assert worker._turn(lane)
    assert lane.loop.n_crossings == 0
    lane.raises, lane.silent = ["turn"], {2}
    assert worker._turn(lane)
    await wait(ball.back)
    assert (ball.deliveries[0], type(ball.deliveries[1])) == (1, StepFailed)


async def test_every_lane_has_its_turn() -> None:
    long, short = Juggler(), Juggler("translate")
    long.throw([Ball(1_000_000)])
    async with working(long, short):
        ball = Ball(3)
        short.throw([ball])
        await wait(ball.back)
        assert long.n_turns > 0


async def test_idle_takes_no_turns_and_wakes_at_once() -> None:
    lane = Juggler()
    async with working(lane):
        await asyncio.sleep(0.05)
        assert lane.n_turns == 0
        ball, start = Ball(), time.monotonic()
        lane.throw([ball])
        await wait(ball.back)
        assert time.monotonic() - start < 0.5  # not the next look at the clock


async def test_the_loop_survives_a_lane_that_raises() -> None:
    lane, other = Juggler(), Juggler("translate")
    victims, neighbour, later = [Ball(9), Ball(9)], Ball(50), Ball()
    other.throw([neighbour])
    lane.raises = ["turn"]
    lane.throw(victims)
    async with working(lane, other) as worker:
        for ball in victims:
            await wait(ball.back)
        assert [type(ball.deliveries[-1]) for ball in victims] == [StepFailed, StepFailed]
        assert victims[0].deliveries[-1] is not victims[1].deliveries[-1]
        lane.throw([later])
        await wait(later.back)
        await wait(neighbour.back)
        assert worker.alive


async def test_the_loop_survives_a_lane_that_cannot_even_fail() -> None:
    lane = Juggler()
    lane.raises = ["turn", "fail_all"]
    ball = Ball()
    lane.throw([ball])
    async with working(lane) as worker:
        await wait(ball.back)  # it was not lost, and the next turn went well
        assert worker.alive
        assert ball.deliveries == [2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_dies_leaves_nobody_waiting() -> None:
    lane, ball = Juggler(), Ball()
    lane.error, lane.raises = SystemExit(), ["turn"]
    worker = DeviceWorker([lane])
    lane.throw([ball])
    worker.start(asyncio.get_running_loop())
    await wait(ball.back)
    assert isinstance(ball.deliveries[-1], Aborted)
    with pytest.raises(Draining):
        lane.throw([Ball()])
    await asyncio.to_thread(worker.stop)
    assert not worker.alive


async def test_a_receiver_that_raises_takes_nothing_from_its_neighbours() -> None:
    lane = Juggler()
    before, broken, after = Ball(), Ball(broken=True), Ball()
    lane.throw([before, broken, after])
    async with working(lane) as worker:
        await wait(before.back)
        await wait(after.back)
        assert await worker.drained(5)


async def test_drained_means_delivered() -> None:
    lane = Juggler()
    async with working(lane) as worker:
        assert await worker.drained(0)
        ball = Ball(20)
        lane.throw([ball])
        worker.begin_drain()
        with pytest.raises(Draining):
            lane.throw([Ball()])
        assert await worker.drained(5)
        assert ball.back.is_set()


async def test_drained_looks_behind_the_lane_for_what_is_under_way() -> None:
    """The lane has no work any more, but the loop has not yet taken what it produced."""
    lane, ball = Juggler(), Ball()
    worker = DeviceWorker([lane])
    lane.throw([ball])
    lost = CountingLoop()
    lost.call_soon_threadsafe = lambda *_: None  # type: ignore[method-assign, assignment]
    worker.start(lost)  # type: ignore[arg-type]
    await until_idle(lane)
    assert not await worker.drained(0.05)
    await asyncio.to_thread(worker.stop)


async def test_draining_gives_up_after_its_time() -> None:
    lane = Juggler()
    lane.pause.clear()
    lane.throw([Ball()])
    async with working(lane) as worker:
        start = time.monotonic()
        assert not await worker.drained(0.05)
        assert time.monotonic() - start < 1
        lane.pause.set()


async def test_stop_ends_what_waits_and_runs(causal: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=1)
    worker = DeviceWorker([lane])
    sequences = [Sequence([300], SamplingParams(max_new_tokens=60, min_new_tokens=60)) for _ in range(20)]
    lane.submit(sequences)
    worker.start(asyncio.get_running_loop())
    first = [event async for event in sequences[0].events()]
    await asyncio.to_thread(worker.stop)
    errors = [await outcome(sequence) for sequence in sequences]
    assert len(first) == 60
    assert sum(isinstance(error, Aborted) for error in errors) > 0
    assert not any(isinstance(error, StepFailed) for error in errors)
    assert (lane.door.n_inside, lane.scheduler.n_active, lane._generations) == (0, 0, {})
    with pytest.raises(Draining):
        lane.submit([Sequence([300], SamplingParams())])
    worker.stop()  # twice does no harm


async def test_stopped_before_it_began_nothing_comes_in() -> None:
    lane = Juggler()
    DeviceWorker([lane]).stop()
    with pytest.raises(Draining):
        lane.throw([Ball()])


async def test_a_worker_without_a_loop_to_tell_ends_quietly() -> None:
    lane = Juggler()
    lane.throw([Ball()])
    loop = asyncio.new_event_loop()
    loop.close()
    worker = DeviceWorker([lane])
    worker.start(loop)
    await until_idle(lane)
    assert worker.alive
    await asyncio.to_thread(worker.stop)


async def test_a_dead_device_is_not_alive() -> None:
    lane = Juggler()
    async with working(lane) as worker:
        assert worker.alive
        assert lane.failures.note(RuntimeError(), 1)
        assert worker.alive
        lane.responds = False
        assert not lane.failures.note(RuntimeError(), 1)
        assert not worker.alive


async def test_the_fault_says_what_is_wrong() -> None:
    lane, ball = Juggler(), Ball()
    worker = DeviceWorker([lane], stall_seconds=0.2)
    assert worker.fault == "the device thread has ended"
    lane.pause.clear()
    lane.throw([ball])
    worker.start(asyncio.get_running_loop())
    await until(lambda: worker.fault is not None)
    assert re.fullmatch(r"the device thread has not answered for \d+ seconds", worker.fault or "")
    lane.pause.set()
    await until(lambda: worker.fault is None)
    await wait(ball.back)
    lane.failures.broken = True
    assert worker.fault == "the device answers no more (generate)"
    await asyncio.to_thread(worker.stop)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# The real lanes, under the thread


async def test_both_lanes_at_once_equal_the_oracles(
    causal: Checkpoint,
    causal_oracle: Checkpoint,
    translator: Checkpoint,
    translator_oracle: Checkpoint,
) -> None:
    rng = random.Random(9)
    generating, translating = generate_lane(causal), translate_lane(translator)
    generations = [random_generation(causal, rng) for _ in range(20)]
    translations = [random_translation(translator, rng, return_alignment=True) for _ in range(10)]
    async with working(generating, translating) as worker:
        for i, generation in enumerate(generations):
            generating.submit([generation])
            translating.submit(translations[i : i + 1])
            if i % 4 == 0:
                await asyncio.sleep(0.005)
        gone = [generations.pop(), generations.pop(3)], [translations.pop(2)]
        generating.abort(gone[0])
        translating.abort(gone[1])
        await check_generations(causal_oracle, generations)
        await check_translations(translator_oracle, translations)
        worker.begin_drain()
        assert await worker.drained(10)


async def test_streams_and_departures_in_disorder(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    """Clients that read, leave in the middle, or never read, all at once."""
    rng, lane = random.Random(4), generate_lane(causal, n_slots=3)

    async def client(sequence: Sequence, n_wanted: int) -> None:
        lane.submit([sequence])
        try:
            async for event in sequence.events():
                await asyncio.sleep(rng.choice([0, 0, 0.002]))
                if event.index >= n_wanted:
                    return
        finally:
            lane.abort([sequence])

    sequences = [random_generation(causal, rng) for _ in range(30)]
    async with working(lane) as worker:
        clients = [asyncio.create_task(client(s, rng.choice([1, 3, 99]))) for s in sequences]
        await asyncio.sleep(0.01)
        for task in clients[::5]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), 20)
        assert await worker.drained(5)
        last = random_generation(causal, rng)
        lane.submit([last])
        await check_generations(causal_oracle, [last])
    assert (lane.scheduler.n_active, lane._generations) == (0, {})


# Failures: only the culprit


def never_read(sequences: Iterable[Sequence], oracle: Checkpoint) -> list[Sequence]:
    """Those generations that meet the bad token neither in their prompt nor in what they say."""
    return [s for s in sequences if BAD not in [*s.prompt_ids, *expected_generation(oracle, s)]]


def failing(lane: Any) -> FailingGenerateRunner:
    assert isinstance(lane.runner, FailingGenerateRunner)
    return lane.runner


@pytest.mark.parametrize("place", ["prefill", "prompt_logprobs", "step"])
@pytest.mark.parametrize("position", [0, 3, 7])
async def test_only_the_culprit_of_a_generation_fails(
    causal: Checkpoint, causal_oracle: Checkpoint, place: str, position: int
) -> None:
    lane = generate_lane(causal, n_slots=8, prefill_tokens=1000)
    rng = random.Random(position)
    innocent = never_read([random_generation(causal, rng) for _ in range(9)], causal_oracle)[:7]
    # A step reads the last token of a prompt, a prefill those before it.
    prompt, params = [300, BAD, 301], SamplingParams(max_new_tokens=20)
    culprit = Sequence(prompt[:2] if place == "step" else prompt, params, prompt_logprobs=True)
    failing(lane).fault = fails_on(BAD, place)
    lane.submit([*innocent[:position], culprit, *innocent[position:]])
    drive(lane)
    assert isinstance(await outcome(culprit), StepFailed)
    await check_generations(causal_oracle, innocent)
    assert not lane.failures.broken


async def test_a_step_that_is_tried_again_draws_the_same(
    causal: Checkpoint, causal_oracle: Checkpoint
) -> None:
    """Every second attempt fails, before or after the model has run; nobody may notice."""
    lane, rng = generate_lane(causal, n_slots=5), random.Random(2)
    attempts = dict.fromkeys(("prefill", "step", "draw", "move"), 0)

    def sometimes(what: str, _: list[int]) -> None:
        attempts[what] += 1
        if lane.scheduler.n_active > 1 and attempts[what] % 4 == 1 and what != "move":
            raise torch.OutOfMemoryError("no room")

    failing(lane).fault = sometimes
    sequences = [random_generation(causal, rng) for _ in range(12)]
    lane.submit(sequences)
    drive(lane)
    outcomes = [await outcome(sequence) for sequence in sequences]
    fine = [s for s, found in zip(sequences, outcomes, strict=True) if isinstance(found, list)]
    assert len(fine) >= 6
    await check_generations(causal_oracle, fine)


@pytest.mark.parametrize("max_rows", [1, 3])
async def test_out_of_memory_is_tried_again_with_less(
    causal: Checkpoint,
    causal_oracle: Checkpoint,
    translator: Checkpoint,
    translator_oracle: Checkpoint,
    max_rows: int,
) -> None:
    """Steps of more rows than fit are halved until they do; everybody has their answer."""

    def too_many(what: str, ids: list[int]) -> None:
        if what == "step" and len(ids) > max_rows:
            raise torch.OutOfMemoryError(f"{len(ids)} rows")

    rng = random.Random(max_rows)
    generating, translating = generate_lane(causal, n_slots=8), translate_lane(translator)
    failing(generating).fault = too_many
    assert isinstance(translating.runner, FailingTranslateRunner)
    translating.runner.fault = too_many
    generations = [random_generation(causal, rng) for _ in range(10)]
    translations = [random_translation(translator, rng) for _ in range(5)]
    generating.submit(generations)
    translating.submit(translations)
    drive(generating)
    drive(translating)
    await check_generations(causal_oracle, generations)
    await check_translations(translator_oracle, translations)


@pytest.mark.parametrize("place", ["encode", "align"])
async def test_only_the_culprit_of_translations_fails(
    translator: Checkpoint, translator_oracle: Checkpoint, place: str
) -> None:
    rng, lane = random.Random(1), translate_lane(translator, n_slots=16, prefill_tokens=1000)
    assert isinstance(lane.runner, FailingTranslateRunner)
    lane.runner.fault = fails_on(BAD, place)
    wishes: dict[str, object] = {"return_alignment": True, "early_stopping": None}
    innocent = [random_translation(translator, rng, **wishes) for _ in range(8)]
    innocent = [sequence for sequence in innocent if BAD not in sequence.prompt_ids]
    source = translator.tokenizer.source_ids([300, BAD], "en")
    culprit = Sequence(source, BeamParams(num_beams=3, max_new_tokens=8, return_alignment=True))
    lane.submit([*innocent[:2], culprit, *innocent[2:]])
    drive(lane)
    assert isinstance(await outcome(culprit), StepFailed)
    await check_translations(translator_oracle, innocent)


def that_look_back(translator: Checkpoint, n: int) -> list[Sequence]:
    """Translations of which several hypotheses end, so that there is something to put in order."""
    rng = random.Random(8)
    wishes: dict[str, object] = {"num_beams": 4, "num_return_sequences": 4, "min_new_tokens": 0}
    wishes |= {
        "max_new_tokens": 40,
        "early_stopping": None,
        "repetition_penalty": 1.0,
        "length_penalty": -1.0,
    }
    return [random_translation(translator, rng, **wishes) for _ in range(n)]


def with_round_trip(sequences: list[Sequence], share: float) -> list[Sequence]:
    for sequence in sequences:
        assert isinstance(sequence.params, BeamParams)
        sequence.params = replace(sequence.params, round_trip=share)
    return sequences


async def test_the_way_back_puts_translations_in_another_order(
    translator: Checkpoint, translator_oracle: Checkpoint
) -> None:
    """And asks no more of it a turn than may be read of sources."""
    lane = translate_lane(translator, n_slots=16, prefill_tokens=60)
    runner, asked = lane.runner, []

    def noting(pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        asked.append([len(source) + len(tokens) for source, tokens in pairs])
        return TranslateRunner.return_logprobs(runner, pairs)

    runner.return_logprobs = noting  # type: ignore[method-assign, assignment]
    sequences = with_round_trip(that_look_back(translator, 12), 5.0)
    labels = {"endpoint": lane.name, "model": runner.model_name}
    before = REGISTRY.get_sample_value("transformer_reranked_total", labels) or 0.0
    lane.submit(sequences)
    drive(lane)
    assert len(asked) > 3
    assert all(max(each) * len(each) <= 60 or len(each) == 1 for each in asked)
    await check_translations(translator_oracle, sequences)
    found = [[tuple(each.token_ids) for each in await sequence.result()] for sequence in sequences]
    by_search = [expected_translation(translator_oracle, s) for s in with_round_trip(sequences, 0.0)]
    firsts = [tuple(wanted[0].token_ids) for wanted in by_search]
    changed = sum(ours[0] != first for ours, first in zip(found, firsts, strict=True))
    assert changed > 0
    assert REGISTRY.get_sample_value("transformer_reranked_total", labels) == before + changed


async def test_where_the_way_back_fails_the_order_of_the_search_stays(
    translator: Checkpoint, translator_oracle: Checkpoint
) -> None:
    lane = translate_lane(translator, n_slots=16, prefill_tokens=200)
    assert isinstance(lane.runner, FailingTranslateRunner)
    sequences = with_round_trip(that_look_back(translator, 8), 5.0)
    bad = sequences[2].prompt_ids[3]
    lane.runner.fault = fails_on(bad, "return")
    lane.submit(sequences)
    drive(lane)
    hit = [sequence for sequence in sequences if bad in sequence.prompt_ids]
    await check_translations(translator_oracle, [s for s in sequences if s not in hit])
    await check_translations(translator_oracle, with_round_trip(hit, 0.0))


async def test_broken_rows_are_wiped_before_those_of_others_are_given_back(translator: Checkpoint) -> None:
    """Also when somebody is set aside in the same step: else NaN would move, and its row not be found."""

    def begin() -> tuple[TranslateLane, list[Sequence]]:
        lane = translate_lane(translator, n_slots=48, prefill_tokens=1000)
        sequences = with_round_trip(that_look_back(translator, 12), 5.0)
        lane.submit(sequences)
        return lane, sequences

    lane, sequences = begin()
    lane._finish = lambda: None  # type: ignore[method-assign]
    n_steps = 0
    while not lane._looking and n_steps < 50:
        turn(lane)
        n_steps += 1
    aside = sequences.index(lane._looking[0].sequence)
    bad = sequences.index(lane.scheduler.running[-1])
    lane, sequences = begin()
    calls: list[str] = []
    choose, wipe, release = lane._choose, lane._wipe, lane.scheduler.release
    steps = iter(range(1, 1000))

    def choosing(rows: list[int]) -> dict[int, Ranked]:
        chosen = choose(rows)
        if next(steps) == n_steps:
            chosen |= {row: Ranked([(300, float("nan"))], []) for row in sequences[bad].rows}
        return chosen

    def wiping(gone: list[Sequence]) -> None:
        calls.append("wipe")
        wipe(gone)

    def releasing(gone: Iterable[Sequence]) -> list[tuple[int, int]]:
        calls.append("release")
        return release(gone)

    lane._choose = choosing  # type: ignore[method-assign, assignment]
    lane._wipe = wiping  # type: ignore[method-assign, assignment]
    lane.scheduler.release = releasing  # type: ignore[method-assign, assignment]
    for _ in range(n_steps):
        calls.clear()
        turn(lane)
    assert calls[:2] == ["wipe", "release"]
    drive(lane)
    assert isinstance(await outcome(sequences[bad]), StepFailed)
    assert isinstance(await outcome(sequences[aside]), list)


async def test_who_leaves_before_the_way_back(translator: Checkpoint) -> None:
    lane = translate_lane(translator, n_slots=16, prefill_tokens=40)
    sequences = with_round_trip(that_look_back(translator, 6), 5.0)
    lane.submit(sequences)
    while not lane._looking:
        turn(lane)
    gone = [each.sequence for each in lane._looking]
    lane.abort(gone)
    drive(lane)
    assert not lane._groups
    assert all([isinstance(await outcome(sequence), Aborted) for sequence in gone])
    again = with_round_trip(that_look_back(translator, 6), 5.0)
    lane.submit(again)
    while not lane._looking:
        turn(lane)
    for handover in lane.fail_all(StepFailed):
        handover.complete()
    assert all([isinstance(await outcome(sequence), StepFailed | list) for sequence in again])
    assert not lane.has_work()
    assert not lane._groups


@pytest.mark.parametrize("place", ["step", "rank", "copy_beams", "move"])
async def test_translations_fail_and_go_on(
    translator: Checkpoint, translator_oracle: Checkpoint, place: str
) -> None:
    """A few attempts in a row fail, down to single rows; who was not hit says what the oracle says."""
    rng, lane = random.Random(6), translate_lane(translator, n_slots=12, prefill_tokens=1000)
    assert isinstance(lane.runner, FailingTranslateRunner)
    attempts = 0

    def sometimes(what: str, _: list[int]) -> None:
        nonlocal attempts
        attempts += what == place
        if what == place and attempts % 20 in (3, 4, 5, 6, 7):
            raise RuntimeError(place)

    lane.runner.fault = sometimes
    sequences = [random_translation(translator, rng) for _ in range(24)]
    lane.submit(sequences)
    drive(lane)
    outcomes = [await outcome(sequence) for sequence in sequences]
    fine = [s for s, found in zip(sequences, outcomes, strict=True) if isinstance(found, list)]
    assert 0 < len(fine) < len(sequences)
    await check_translations(translator_oracle, fine)


async def test_rows_that_cannot_move_fail_alone(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=4)

    def no_moves(what: str, _: list[int]) -> None:
        if what == "move":
            raise RuntimeError("move")

    failing(lane).fault = no_moves
    lengths = (1, 6, 6, 9)
    first, second, third, last = (
        Sequence([300 + n], SamplingParams(max_new_tokens=n, min_new_tokens=n)) for n in lengths
    )
    lane.submit([first, second, third, last])
    turn(lane)
    assert isinstance(await outcome(last), StepFailed)  # it was to fill the place of the first
    drive(lane)
    await check_generations(causal_oracle, [first])
    assert lane.scheduler.n_active == 0


async def test_rows_without_numbers_fail_and_leave_nothing_behind(
    causal: Checkpoint, causal_oracle: Checkpoint
) -> None:
    """NaN in the cache would reach whoever gets the row next, through positions that are masked."""
    lane = generate_lane(causal, n_slots=3)
    params = SamplingParams(max_new_tokens=12, min_new_tokens=12)
    innocent = never_read([Sequence([300 + i], params) for i in range(6)], causal_oracle)[:2]
    failing(lane).nan_token = BAD
    culprit = Sequence([302, BAD], params)
    lane.submit([culprit, *innocent])
    drive(lane)
    error = await outcome(culprit)
    assert isinstance(error, StepFailed)
    assert "no number" in str(error)
    assert torch.isfinite(failing(lane).cache.v).all()
    later = never_read([Sequence([306 + i], params) for i in range(6)], causal_oracle)
    lane.submit(later)
    drive(lane)
    await check_generations(causal_oracle, [*innocent, *later])


async def test_beams_without_numbers_fail_alone(
    translator: Checkpoint, translator_oracle: Checkpoint
) -> None:
    lane, params = translate_lane(translator, n_slots=8), BeamParams(num_beams=4, max_new_tokens=6)
    languages = translator.tokenizer.languages
    broken, fine = (
        Sequence(translator.tokenizer.source_ids([300, 301], language), params) for language in ("ko", "en")
    )
    assert isinstance(lane.runner, FailingTranslateRunner)
    lane.runner.nan_token = languages["ko"]  # what the decoder reads first
    lane.submit([broken, fine])
    drive(lane)
    assert isinstance(await outcome(broken), StepFailed)
    assert torch.isfinite(lane.runner.cache.v).all()
    await check_translations(translator_oracle, [fine])


async def test_a_dead_device_is_not_asked_again_and_again(
    causal: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    lane = generate_lane(causal, n_slots=8, prefill_tokens=1000)
    n_attempts = 0

    def dead(what: str, _: list[int]) -> None:
        nonlocal n_attempts
        n_attempts += 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    failing(lane).fault = dead
    lane.failures = Failures("generate", "tiny", lambda: False)
    sequences = [Sequence([300, 301], SamplingParams()) for _ in range(8)]
    lane.submit(sequences)
    drive(lane)
    for sequence in sequences:
        assert isinstance(await outcome(sequence), StepFailed)
    assert n_attempts == 1
    assert lane.failures.broken
    assert caplog.text.count("Traceback") == 1


async def test_what_a_broken_turn_had_already_ended_is_not_lost(causal: Checkpoint) -> None:
    """The turn takes the departed off their rows, and then breaks where nobody expects it."""
    lane = generate_lane(causal)
    gone, running = (Sequence([300], SamplingParams(max_new_tokens=30)) for _ in range(2))
    lane.submit([gone, running])
    turn(lane)
    lane.abort([gone])
    lane._commit = None  # type: ignore[assignment, method-assign]
    async with working(lane) as worker:
        assert isinstance(await outcome(gone), Aborted)
        assert isinstance(await outcome(running), StepFailed)
        assert await worker.drained(5)
    assert (lane.scheduler.n_active, lane._generations) == (0, {})


async def test_what_a_broken_turn_ended_is_not_ended_again(causal: Checkpoint) -> None:
    lane = generate_lane(causal)
    gone, running = (Sequence([300], SamplingParams(max_new_tokens=30)) for _ in range(2))
    lane.submit([gone, running])
    turn(lane)
    lane.abort([gone])
    lane.scheduler.release = None  # type: ignore[assignment, method-assign]
    async with working(lane) as worker:
        assert isinstance(await outcome(gone), Aborted)
        assert isinstance(await outcome(running), StepFailed)
        assert await worker.drained(5)
    assert lane.door.n_inside == 0


async def test_a_row_that_fails_twice_in_a_turn_ends_once(causal: Checkpoint) -> None:
    """Its step fails, and so does its move into the place of one that has ended."""
    lane = generate_lane(causal)

    def fault(what: str, ids: list[int]) -> None:
        if what == "move" or (what == "step" and BAD in ids):
            raise RuntimeError(what)

    failing(lane).fault = fault
    short, culprit = Sequence([300], SamplingParams(max_new_tokens=1)), Sequence([BAD], SamplingParams())
    lane.submit([short, culprit])
    drive(lane)
    assert isinstance(await outcome(short), list)
    assert isinstance(await outcome(culprit), StepFailed)
