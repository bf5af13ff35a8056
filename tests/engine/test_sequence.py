"""One sequence and its readers, whatever they do and whenever they come."""

import asyncio

import pytest

from app.engine.errors import Aborted, StepFailed
from app.engine.sequence import FinishReason, Hypothesis, Sequence, TokenEvent
from model.sampling import BeamParams, SamplingParams

END = [Hypothesis([7], -0.5, [-0.5], FinishReason.LENGTH)]
FIRST = TokenEvent(1, 6, -0.5)
LAST = TokenEvent(2, 7, -0.5, (), FinishReason.LENGTH)


def make() -> Sequence:
    return Sequence([1, 2], SamplingParams(max_new_tokens=2))


def finish(sequence: Sequence) -> None:
    for delivery in (FIRST, LAST, END):
        sequence.deliver(delivery)


async def read(sequence: Sequence) -> list[TokenEvent]:
    return [event async for event in sequence.events()]


async def test_readers_of_both_kinds_before_and_after_the_end() -> None:
    sequence = make()
    readers = [asyncio.create_task(read(sequence)) for _ in range(3)]
    waiters = [asyncio.create_task(sequence.result()) for _ in range(3)]
    await asyncio.sleep(0)
    sequence.deliver(FIRST)
    await asyncio.sleep(0)
    sequence.deliver(LAST)
    sequence.deliver(END)
    assert await asyncio.gather(*readers) == [[FIRST, LAST]] * 3
    assert await asyncio.gather(*waiters) == [END] * 3
    assert await read(sequence) == [FIRST, LAST]
    assert await sequence.result() == END


async def test_a_cancelled_waiter_takes_nothing_with_it() -> None:
    sequence = make()
    leaving = [asyncio.create_task(sequence.result()), asyncio.create_task(read(sequence))]
    staying = asyncio.create_task(sequence.result())
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    finish(sequence)
    assert await staying == END
    assert await read(sequence) == [FIRST, LAST]


async def test_an_error_reaches_every_reader_after_the_tokens() -> None:
    sequence = make()
    sequence.deliver(FIRST)
    sequence.deliver(StepFailed("broken"))
    sequence.deliver(LAST)  # too late
    sequence.deliver(Aborted())
    events = sequence.events()
    assert await anext(events) == FIRST
    with pytest.raises(StepFailed, match="broken"):
        await anext(events)
    for _ in range(2):
        with pytest.raises(StepFailed, match="broken"):
            await sequence.result()


async def test_an_error_does_not_grow_with_its_readers() -> None:
    sequence, error = make(), StepFailed()
    sequence.deliver(error)
    depths = []
    for _ in range(3):
        with pytest.raises(StepFailed):
            await sequence.result()
        traceback, depth = error.__traceback__, 0
        while traceback is not None:
            traceback, depth = traceback.tb_next, depth + 1
        depths.append(depth)
    assert len(set(depths)) == 1


async def test_events_of_a_translation_end_with_it() -> None:
    sequence = Sequence([1], BeamParams())
    reader = asyncio.create_task(read(sequence))
    await asyncio.sleep(0)
    sequence.deliver(END)
    assert await reader == []


async def test_a_slow_reader_misses_nothing() -> None:
    sequence = make()
    seen = []
    finish(sequence)
    async for event in sequence.events():
        await asyncio.sleep(0.001)
        seen.append(event)
    assert seen == [FIRST, LAST]


def test_nothing_to_read_or_to_say_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_ids"):
        Sequence([], SamplingParams())
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sequence([1], SamplingParams(max_new_tokens=0))
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sequence([1], BeamParams(max_new_tokens=0))


def test_a_seed_is_drawn_where_none_is_given() -> None:
    assert Sequence([1], SamplingParams(seed=5)).seed == 5
    drawn = {make().seed for _ in range(5)}
    assert len(drawn) == 5
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_times_stop_at_the_end() -> None:
    sequence = make()
    sequence.end()
    assert sequence.inference_seconds == 0.0
    waited = sequence.queue_seconds
    sequence.end()
    assert sequence.queue_seconds == waited
