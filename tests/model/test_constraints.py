"""Phrases that must be said: progress through them, and the sharing out of beams."""

import pytest

from model.constraints import Phrase, Progress, share_out

ONE, TWO = Phrase(((1, 2, 3),)), Phrase(((1, 4), (5,)))


def after(progress: Progress, *tokens: int) -> Progress:
    for token in tokens:
        progress = progress.take(token)
    return progress


def test_a_phrase_is_met_by_any_of_its_spellings() -> None:
    start = Progress((ONE, TWO))
    assert (start.complete, start.n_missing, start.wanted()) == (False, 5, {1, 5})
    assert after(start, 5).met == after(start, 1, 4).met == {1}
    assert after(start, 9, 1, 2, 3, 9, 5).complete
    assert Progress(()).complete


def test_what_is_begun_goes_on_or_begins_anew() -> None:
    start = Progress((ONE, TWO))
    begun = after(start, 1)
    assert (begun.begun, begun.wanted(), begun.n_missing) == ((1,), {2, 4}, 4)
    assert after(start, 1, 1).begun == (1,)
    assert after(start, 1, 2, 1).begun == (1,)
    assert after(start, 1, 2, 9).begun == ()
    assert after(start, 1, 1, 2, 3).met == {0}
    assert after(start, 1, 2).rank > after(start, 1).rank < after(start, 5).rank


def test_overlapping_begins() -> None:
    progress = Progress((Phrase(((1, 1, 2),)),))
    assert after(progress, 1, 1, 1).begun == (1, 1)
    assert after(progress, 1, 1, 1, 2).complete


def test_the_same_phrase_twice_must_be_said_twice() -> None:
    progress = Progress((ONE, ONE))
    assert after(progress, 1, 2, 3).met == {0}
    assert after(progress, 1, 2, 3, 1, 2, 3).complete


def test_what_may_stand_once_is_not_said_again() -> None:
    once = Phrase(((1, 2), (3,)), once=True)
    progress = Progress((once, ONE))
    assert progress.banned([1]) == set()
    met = progress.take(3)
    assert (met.banned([3]), met.banned([3, 1])) == ({3}, {2, 3})


def test_digits_beside_a_number_make_another_number() -> None:
    digits = frozenset(range(10))
    progress = Progress((Phrase(((1, 2), (101, 2)), apart=digits),))  # 101 is a 1 with a space before it
    assert after(progress, 3, 1, 2).met == set()
    assert after(progress, 3, 101, 2).complete
    assert after(progress, 50, 1, 2).complete
    assert (progress.take(3).wanted(), progress.take(50).wanted()) == ({101}, {1, 101})
    assert after(progress, 1, 2).banned([1, 2]) == digits
    assert after(progress, 1, 2, 50).banned([1, 2, 50]) == set()
    assert after(progress, 1, 1, 2).met == set()


def test_a_number_that_begins_with_another() -> None:
    digits = frozenset(range(10))
    twenty, two_hundred = (Phrase((number, (10, *number)), apart=digits) for number in ((2, 0), (2, 0, 0)))
    for phrases in ((twenty, two_hundred), (two_hundred, twenty)):
        start, short, long = Progress(phrases), phrases.index(twenty), phrases.index(two_hundred)
        assert after(start, 2, 0, 50).met == after(start, 2, 0, 50, 2, 0).met == {short}
        assert after(start, 2, 0, 0).met == after(start, 2, 0, 0, 2, 0).met == {long}
        assert after(start, 2, 0, 5).met == after(start, 2, 0, 2).met == set()
        begun = after(start, 2, 0)
        assert (begun.wanted(), begun.banned([2, 0]), begun.complete) == ({0}, set(), False)
        # The shorter one first: a second time it may still become the longer one, and no other.
        again = after(start, 2, 0, 50, 2, 0)
        assert again.banned([2, 0, 50, 2, 0]) == digits - {0}
        assert after(again, 0).complete
        assert after(start, 2, 0, 0, 50, 2, 0).complete
        assert after(start, 2, 0, 0, 50, 2, 0).banned([2, 0]) == digits


def test_words_that_begin_with_others() -> None:
    short, long = Phrase(((1, 2),), once=True), Phrase(((1, 2, 3, 4),), once=True)
    start = Progress((short, long))
    assert after(start, 1, 2, 3, 4).met == {1}
    assert after(start, 1, 2, 3, 9).met == after(start, 1, 2, 9).met == {0}
    assert after(start, 1, 2, 1, 2, 3, 4).complete
    met = after(start, 1, 2, 9, 1)
    assert met.banned([1, 2, 9, 1]) == set()
    assert after(met, 2, 3, 4).complete
    assert start.n_missing == 2 + 4 + 1  # the shorter one counts with the token behind it
    one, two = Phrase(((7,),), once=True), Phrase(((7, 8),))
    assert after(Progress((one, two)), 7, 9).banned([7, 9]) == set()


@pytest.mark.parametrize("spellings", [(), ((),), ((1,), ())])
def test_phrases_without_tokens_are_refused(spellings: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="one token or more"):
        Phrase(spellings)


def test_beams_are_shared_out_by_rank() -> None:
    low, high, top = (0, 0), (0, 1), (1, 0)
    ranked = [(low, "a"), (low, "b"), (high, "c"), (low, "d"), (top, "e"), (high, "f")]
    assert share_out(ranked, 4) == ["e", "c", "a", "f"]
    assert share_out(ranked, 2) == ["e", "c"]
    assert share_out(ranked, 9) == ["e", "c", "a", "f", "b", "d"]
    assert share_out([(low, "a"), (low, "b"), (low, "c")], 2) == ["a", "b"]
