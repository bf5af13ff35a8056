"""The way back, by hand."""

import pytest
import torch

from model.models import Translator, build_model
from model.round_trip import best_first, can_return, return_logprobs, ways_back
from model.sampling import BeamParams
from tests.tiny import tiny_config

LANGUAGES = {"en": 6, "ko": 7}
TAG, EN, KO, END = 8, 6, 7, 2


@pytest.fixture
def model() -> Translator:
    torch.manual_seed(5)
    built = build_model(tiny_config("translator", languages=LANGUAGES))
    assert isinstance(built, Translator)
    return built.eval()


def by_hand(model: Translator, source: list[int], target: list[int]) -> float:
    """The mean log-probability of all tokens of a target but the first, one step at a time."""
    logprobs = [
        model(torch.tensor([source]), torch.tensor([target[:n]]))[0, -1].log_softmax(-1)[target[n]]
        for n in range(1, len(target))
    ]
    return float(torch.stack(logprobs).mean())


@torch.no_grad()
def test_the_way_back(model: Translator) -> None:
    source = [TAG, KO, 11, 12, 13, END]
    hypotheses = [[20, 21], [22], [], [23, 24, 25, 26, 27]]
    found = return_logprobs(model, [(source, hypothesis) for hypothesis in hypotheses])
    expected = [by_hand(model, [TAG, EN, *each, END], [EN, 11, 12, 13, END]) for each in hypotheses]
    assert found == pytest.approx(expected, abs=1e-5)
    # Others beside them, of other lengths and the other direction, change nothing.
    other = [TAG, EN, *range(10, 30), END], [31, 32]
    assert return_logprobs(model, [(source, hypotheses[0]), other])[0] == pytest.approx(found[0], abs=1e-5)


def test_what_can_return(model: Translator) -> None:
    config = model.config
    source = [TAG, KO, 11, 12, 13, 14, END]
    assert can_return(config, source, [[12]])
    assert not can_return(config, [TAG, 11, *source[2:]], [[12]])  # no language where it should stand
    assert not can_return(config, [TAG, KO, 11, 12, 13, END], [[12]])  # too little to be said
    assert not can_return(config, source, [[12], [12] * config.max_len])
    assert not can_return(config, [TAG, KO, *[11] * config.max_len, END], [[12]])
    assert ways_back(config) == {EN: KO, KO: EN}
    assert ways_back(tiny_config("translator", languages={})) == {}
    three = tiny_config("translator", languages=LANGUAGES | {"fr": 9})
    assert not can_return(three, source, [[12]])


def test_where_a_number_is_none_the_order_stays() -> None:
    params = BeamParams(round_trip=0.5)
    assert best_first("abc", [(-2.0, 3), (-1.0, 3), (-0.5, 3)], [float("nan"), -0.1, -0.1], params) == list(
        "abc"
    )
    endless = BeamParams(length_penalty=1000.0, round_trip=0.5)
    assert best_first("ab", [(-2.0, 30), (-1.0, 30)], [-0.2, -0.1], endless) == ["a", "b"]


def test_both_ways_count() -> None:
    found = [(-1.0 / 4**1.4, 4), (-0.9, 1)]  # sums of -1 over 4 tokens and of -0.9 over one
    order = [
        best_first("ab", found, [0.0, back], BeamParams(length_penalty=1.4, round_trip=0.5))
        for back in (1.2, 1.4)
    ]
    assert order == [["a", "b"], ["b", "a"]]  # means of -0.25 and -0.9 and half of what the way back says
    # Those that were not asked stay behind these.
    params = BeamParams(length_penalty=1.4, round_trip=0.5)
    assert best_first("abcd", [*found, (0.0, 1), (0.0, 1)], [0.0, 1.4], params) == list(
        "bacd"
    )  # means of -0.25 and -0.9 and half of what the way back says
