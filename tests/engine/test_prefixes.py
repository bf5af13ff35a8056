"""Which beginnings are kept: chains of blocks against a naive memory of every prompt."""

import random

from app.engine.prefixes import PrefixIndex


def test_equal_beginnings_are_one_chain() -> None:
    index = PrefixIndex(8, 2)
    assert index.find([1, 2, 3, 4]) == []
    (first, at_first), (second, at_second) = index.add([1, 2, 3, 4, 5])
    assert (at_first, at_second) == (0, 2)
    assert index.find([1, 2, 3, 4, 5, 6]) == [first, second]
    assert index.find([1, 2, 9, 9]) == [first]
    assert index.find([3, 4]) == []  # the same tokens after another beginning are another block
    assert [start for _, start in index.add([1, 2, 7, 8])] == [2]
    index.forget()
    assert index.find([1, 2, 3, 4]) == []


def test_the_least_recently_used_goes_first_but_never_a_parent() -> None:
    index = PrefixIndex(3, 1)
    index.add([1, 2])
    index.add([5])
    index.find([1, 2])  # used later than 5
    index.add([6])
    assert index.find([5]) == []
    assert len(index.find([1, 2])) == 2
    index.add([7, 8])  # takes the places of 6 and of 2; 1 went after its child alone would not do
    assert len(index.find([7, 8])) == 2
    assert len(index.find([1, 2])) == 1


def test_a_prompt_longer_than_the_pool_keeps_its_beginning() -> None:
    index = PrefixIndex(3, 2)
    index.add([9, 9])
    assert [start for _, start in index.add(list(range(20)))] == [0, 2, 4]
    assert len(index.find(list(range(20)))) == 3
    assert PrefixIndex(0, 2).add([1, 2, 3]) == []


def test_random_prompts_find_what_was_written() -> None:
    rng, index = random.Random(0), PrefixIndex(12, 2)
    cells: dict[int, list[int]] = {}
    for _ in range(2000):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(12))]
        found = index.find(prompt)
        for n, block in enumerate(found):
            assert cells[block] == prompt[: 2 * (n + 1)]  # what was before it too
        for block, start in index.add(prompt):
            cells[block] = prompt[: start + 2]
        assert len(index._known) + len(index._free) == 12
        assert len(set(index._known.values()) | set(index._free)) == 12
