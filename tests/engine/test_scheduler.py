"""The scheduler against a naive model of it, under random admission and release."""

import random

import pytest

from app.engine.scheduler import Scheduler
from app.engine.sequence import Sequence, SequenceStatus
from model.sampling import BeamParams, SamplingParams


def make(n_tokens: int, n_rows: int = 1) -> Sequence:
    params = BeamParams(num_beams=n_rows) if n_rows > 1 else SamplingParams()
    return Sequence([0] * n_tokens, params)


def scheduler(
    n_slots: int = 4, prefill_tokens: int = 100, items: int = 10, queue_tokens: int = 100
) -> Scheduler:
    return Scheduler(
        n_slots=n_slots, prefill_tokens=prefill_tokens, max_queue_items=items, max_queue_tokens=queue_tokens
    )


class Cells:
    """What a cache would hold: in each row the name of the beam that wrote it."""

    def __init__(self, n_slots: int) -> None:
        self.rows: list[tuple[int, int] | None] = [None] * n_slots

    def write(self, sequence: Sequence) -> None:
        for beam, row in enumerate(sequence.rows):
            self.rows[row] = id(sequence), beam

    def move(self, moves: list[tuple[int, int]]) -> None:
        assert not {source for source, _ in moves} & {target for _, target in moves}
        for source, target in moves:
            self.rows[target] = self.rows[source]

    def check(self, scheduler: Scheduler) -> None:
        for sequence in scheduler.running:
            assert [self.rows[row] for row in sequence.rows] == [
                (id(sequence), i) for i in range(sequence.n_rows)
            ]


def check_active(scheduler: Scheduler) -> None:
    rows = sorted(row for sequence in scheduler.running for row in sequence.rows)
    assert rows == list(range(scheduler.n_active))
    assert scheduler.n_active <= scheduler.n_slots
    assert all(row in scheduler.owners[row].rows for row in rows)


def expected_admissions(scheduler: Scheduler) -> list[Sequence]:
    """First come, first served: the longest head of the queue that fits."""
    taken: list[Sequence] = []
    for sequence in scheduler.waiting:
        more = [*taken, sequence]
        padded = max(s.n_prompt_tokens for s in more) * len(more)
        if sum(s.n_rows for s in more) > scheduler.n_slots - scheduler.n_active:
            break
        if taken and padded > scheduler.prefill_tokens:
            break
        taken = more
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_random_admission_and_release(seed: int) -> None:
    rng = random.Random(seed)
    n_slots = rng.choice([1, 3, 8, 13])
    lane, cells = scheduler(n_slots, rng.choice([5, 30, 1000])), Cells(n_slots)
    for _ in range(200):
        lane.add(make(rng.randint(1, 9), rng.randint(1, min(n_slots, 5))) for _ in range(rng.randint(0, 3)))
        expected = expected_admissions(lane)
        admitted = lane.admit()
        assert admitted == expected
        for sequence in admitted:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.rows == list(range(sequence.rows[0], sequence.rows[0] + sequence.n_rows))
            cells.write(sequence)
        check_active(lane)
        ended = rng.sample(lane.running, rng.randint(0, len(lane.running)))
        n_freed = sum(sequence.n_rows for sequence in ended)
        moves = lane.release(ended)
        assert len(moves) <= n_freed
        cells.move(moves)
        cells.check(lane)
        check_active(lane)
        assert all(not sequence.rows for sequence in ended)
        assert lane.waiting_tokens == sum(sequence.n_prompt_tokens for sequence in lane.waiting)


def test_the_rows_of_one_admission_are_neighbours() -> None:
    lane = scheduler(10)
    lane.add([make(3, 4), make(3, 1), make(3, 5)])
    assert [sequence.rows for sequence in lane.admit()] == [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9]]


def test_the_last_rows_fill_the_holes() -> None:
    lane = scheduler(6)
    lane.add([make(1), make(1), make(1), make(1), make(1)])
    a, _b, c, d, e = lane.admit()
    assert lane.release([a, c]) == [(4, 0), (3, 2)]
    assert (e.rows, d.rows) == ([0], [2])


def test_a_filled_hole_stays_filled() -> None:
    lane = scheduler(3)
    lane.add([make(1), make(1), make(1)])
    a, b, c = lane.admit()
    assert lane.release([a, b]) == [(2, 0)]
    assert (lane.owners, c.rows) == ([c], [0])


def test_nobody_overtakes_a_wide_sequence() -> None:
    lane = scheduler(4)
    small, wide = make(1), make(1, 4)
    lane.add([small, wide, make(1), make(1)])
    assert lane.admit() == [small]
    assert lane.admit() == []
    lane.release([small])
    assert lane.admit() == [wide]


def test_a_prompt_over_the_budget_is_admitted_alone() -> None:
    lane = scheduler(4, prefill_tokens=5)
    lane.add([make(9), make(1)])
    assert [s.n_prompt_tokens for s in lane.admit()] == [9]
    assert [s.n_prompt_tokens for s in lane.admit()] == [1]


def test_the_queue_is_bounded_in_items_and_tokens() -> None:
    lane = scheduler(items=3, queue_tokens=20)
    assert lane.has_room(3, 20)
    assert not lane.has_room(4, 4)
    lane.add([make(5), make(5)])
    assert lane.has_room(1, 10)
    assert not lane.has_room(1, 11)
    assert not lane.has_room(2, 2)


def test_the_aborted_leave_the_queue() -> None:
    lane = scheduler()
    first, second, third = make(1), make(2), make(3)
    lane.add([first, second, third])
    second.aborted = True
    assert lane.drop_aborted() == [second]
    assert lane.waiting_tokens == 4
    assert lane.admit() == [first, third]


def test_clear_forgets_everything() -> None:
    lane = scheduler(2)
    sequences = [make(1), make(1), make(1)]
    lane.add(sequences)
    lane.admit()
    assert set(lane.clear()) == set(sequences)
    assert (lane.n_active, lane.waiting_tokens, list(lane.waiting), lane.running) == (0, 0, [], [])


def test_a_sentence_does_not_wait_for_all_of_a_long_text() -> None:
    lane = scheduler(2)
    text, sentences = [make(1) for _ in range(30)], [make(1) for _ in range(4)]
    lane.add(text)
    first = lane.admit()
    assert first == text[:2]
    for sentence in sentences:
        assert lane.n_before(1) == sum(each in sentences for each in lane.waiting)
        lane.add([sentence])
    assert lane.n_before(4) == 4 + 3 + 3  # the sentences, three of the text by then, its own first three
    lane.release(first)
    assert lane.admit() == sentences[:2]


def test_a_long_text_has_its_turns_in_a_crowd() -> None:
    lane = scheduler(1)
    text = [make(1) for _ in range(6)]
    lane.add(text)
    order: list[bool] = []
    for _ in range(40):
        lane.add([make(1), make(1)])  # more than can be served
        (admitted,) = lane.admit()
        order.append(admitted in text)
        lane.release([admitted])
    assert sum(order) >= 3


def test_equal_turns_keep_the_order_of_arrival() -> None:
    lane = scheduler(5)
    sentences = [make(1) for _ in range(5)]
    for sentence in sentences:
        lane.add([sentence])
    assert lane.admit() == sentences
    assert lane.waiting == []


def test_who_ran_alone_owes_nothing_for_it() -> None:
    lane = scheduler(4)
    text = [make(1) for _ in range(40)]
    lane.add(text)
    for _ in range(9):
        lane.release(lane.admit())
    rest, others = lane.waiting[:], 0
    while any(sequence in lane.waiting for sequence in rest):
        for _ in range(4):
            lane.add([make(1)])
        admitted = lane.admit()
        others += sum(sequence not in rest for sequence in admitted)
        lane.release(admitted)
    assert others < 50
