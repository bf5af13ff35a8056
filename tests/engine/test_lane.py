"""The door, and trying again in halves."""

from collections.abc import Sequence

import pytest

from app.engine.errors import Draining, Overloaded
from app.engine.lane import Door, halving


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_draining_door_refuses() -> None:
    door = Door()
    door.check()
    door.draining = True
    with pytest.raises(Draining):
        door.check()


def test_retry_after_follows_the_pace() -> None:
    clock = Clock()
    door = Door(clock)
    door.enter(1000)
    for _ in range(200):
        clock.now += 0.5
        door.leave()
    assert door.retry_after(20) == pytest.approx(10, rel=0.05)
    assert door.retry_after(0) == 1.0
    assert door.retry_after(10_000) == 60.0


def test_a_pause_does_not_spoil_the_pace() -> None:
    clock = Clock()
    door = Door(clock)
    for _ in range(3):
        door.enter(10)
        for _ in range(10):
            clock.now += 0.1
            door.leave()
        clock.now += 3600
    door.enter(50)
    for _ in range(10):
        clock.now += 0.1
        door.leave()
    assert door.retry_after(40) == pytest.approx(4, rel=0.2)


def test_before_the_first_end_the_wait_is_a_guess_that_grows() -> None:
    clock = Clock()
    door = Door(clock)
    door.enter(5)
    assert door.retry_after(5) == 1.0
    clock.now += 4
    assert door.retry_after(5) == 20.0


def test_what_runs_side_by_side_is_no_queue() -> None:
    """A hundred at once on a door that knows nothing yet: 32 of them run, and none has ended in a second."""
    clock = Clock()
    door = Door(clock)
    door.max_wait_seconds = 30
    for n_waiting in range(100):
        door.check_wait(max(0, n_waiting - 32))
        door.enter(1)
        clock.now += 0.01
    assert door.retry_after(68) < 3
    clock.now += 60  # and still none has
    with pytest.raises(Overloaded):
        door.check_wait(68)


def test_a_queue_that_is_too_long_in_seconds_refuses() -> None:
    clock = Clock()
    door = Door(clock)
    door.max_wait_seconds = 10.0
    door.enter(31)
    door.check_wait(1_000_000)  # nothing is known yet
    for _ in range(30):
        clock.now += 0.5
        door.leave()
    door.check_wait(19)
    with pytest.raises(Overloaded, match="the queue is 15 seconds long; try again in 14") as raised:
        door.check_wait(30)
    assert raised.value.retry_after_seconds == pytest.approx(14.5, rel=0.05)


def test_an_empty_lane_begins_at_once() -> None:
    """Whatever the pace was, and however long the pause: nothing is before the one who comes."""
    clock = Clock()
    door = Door(clock)
    door.max_wait_seconds = 10.0
    for pause in (0.0, 60.0, 3600.0):
        clock.now += pause
        door.check_wait(64)
        door.enter(64)
        clock.now += 15
        with pytest.raises(Overloaded):
            door.check_wait(64)
        for _ in range(64):
            clock.now += 0.3
            door.leave()
        assert door.retry_after(20) == pytest.approx(6, rel=0.05)


def test_a_burst_after_a_pause_goes_by_the_pace_before_it() -> None:
    clock = Clock()
    door = Door(clock)
    door.max_wait_seconds = 10.0
    door.enter(20)
    for _ in range(20):
        clock.now += 0.5
        door.leave()
    clock.now += 3600
    door.enter(30)
    with pytest.raises(Overloaded):
        door.check_wait(30)
    for _ in range(10):
        clock.now += 0.1
        door.leave()
    door.check_wait(30)  # what comes now is faster


@pytest.mark.parametrize("bad", [set(), {0}, {6}, {2, 3}, set(range(7))])
def test_only_the_cause_of_a_failure_fails(bad: set[int]) -> None:
    noted: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        if bad & set(items):
            raise RuntimeError(items)
        return list(items)

    def note(_: Exception, n_items: int) -> bool:
        noted.append(n_items)
        return True

    parts, failed = halving(range(7), run, note)
    assert [item for part in parts for item in part] == sorted(set(range(7)) - bad)
    assert failed == sorted(bad)
    assert noted.count(1) == len(bad)


def test_without_hope_nothing_is_tried_again() -> None:
    attempts: list[int] = []

    def run(items: Sequence[int]) -> None:
        attempts.append(len(items))
        raise RuntimeError

    assert halving(range(8), run, lambda *_: False) == ([], list(range(8)))
    assert attempts == [8]
