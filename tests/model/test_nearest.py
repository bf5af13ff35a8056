"""Nearest-neighbour translation, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from model.block import WeightsTap
from model.decoding import beam_search, translator_scorer
from model.examples import Example
from model.models import Translator, build_model
from model.nearest import Datastore, ExampleIds, example_ids, read_examples
from model.sampling import BeamParams
from model.tokenizer import Tokenizer
from tests.tiny import tiny_config

TAG, EN, KO, END = 8, 6, 7, 2
SOURCE = [TAG, KO, 11, 12, 13, END]


@pytest.fixture
def model() -> Translator:
    torch.manual_seed(5)
    config = tiny_config("translator", languages={"en": EN, "ko": KO}, example_offset=0.0)
    built = build_model(config)
    assert isinstance(built, Translator)
    return built.eval()


def test_a_mix_by_hand() -> None:
    keys = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    values, offsets, speaks = torch.tensor([3, 1, 0]), torch.tensor([0.0, 0.5, 0.0]), torch.tensor([True] * 3)
    store = Datastore(keys, values, offsets, speaks, 0.8, 4.0, 0.5)
    logits = torch.tensor([[1.0, 2.0, 0.5, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    hidden = torch.tensor([[1.0, 0.0], [50.0, 0.0]])
    mixed = store.mix(logits, hidden)
    # Mean squares: 0.5 to the first; to the second 0.5, and 0.5 as it is less like; far to the third.
    near = torch.tensor([0.5, 1.0, (64 + 81) / 2])
    share, said = 0.8 * (1 - 0.5 / 4), (-near / 0.5).softmax(-1)
    own = logits[0].softmax(-1)
    expected = (1 - share) * own + share * torch.tensor([said[2], said[1], 0.0, said[0]])
    assert mixed[0, :3].exp().tolist() == pytest.approx(expected[:3].tolist(), abs=1e-6)
    assert mixed[0, 3] == -math.inf  # what is impossible stays so
    assert mixed[1].exp().tolist() == pytest.approx([0.25] * 4)  # far from all: the model alone
    # What has no say is said by the model.
    part = store._replace(speaks=torch.tensor([True, False, True])).mix(logits, hidden)
    others = share * said
    expected = (1 - others[0] - others[2]) * own + torch.tensor([others[2], 0.0, 0.0, others[0]])
    assert part[0, :3].exp().tolist() == pytest.approx(expected[:3].tolist(), abs=1e-6)


@torch.no_grad()
def test_what_is_read_of_examples(model: Translator) -> None:
    first = ExampleIds([TAG, KO, 14, END], [KO, 20, 21, END])
    second = ExampleIds([TAG, KO, 14, 15, 16, END], [KO, 22, END], likeness=0.5)
    source = [TAG, KO, 14, 15, 16, END]
    store = read_examples(model, source, [first, second], 0.9)
    assert store is not None
    assert sorted(store.values.tolist()) == sorted([20, 21, END, 22, END])
    for example in (first, second):
        alone = read_examples(model, source, [example], 0.9)
        states = model.decode(
            torch.tensor([example.target[:-1]]), *model.encode(torch.tensor([example.source]))
        )
        assert alone is not None
        torch.testing.assert_close(alone.keys, states[0])
        # Others beside it change nothing.
        for key in states[0]:
            assert (store.keys - key).abs().amax(-1).min() < 1e-5
    # Nor does it that a text has another translation, too.
    twice = read_examples(model, source, [second, first, second._replace(target=[KO, 23, END])], 0.9)
    assert twice is not None
    torch.testing.assert_close(twice.keys[2:5], store.keys[:3])
    assert read_examples(model, source, [], 0.9) is None
    assert read_examples(model, source, [first], 0.0) is None
    model.config = replace(model.config, example_offset=2.0)
    farther = read_examples(model, source, [second], 0.9)
    assert farther is not None
    assert farther.offsets.tolist() == [1.0, 1.0]


@torch.no_grad()
def test_states_that_look_at_what_the_sentence_lacks_are_left_out(model: Translator) -> None:
    target = [KO, *range(20, 36), END]
    example = ExampleIds([TAG, KO, 11, 14, 12, 15, END], target)
    with WeightsTap(model.decoder) as tap:
        model.decode(torch.tensor([target[:-1]]), *model.encode(torch.tensor([example.source])))
    *_, last = (weights[0] for name, weights in tap.weights.items() if name.endswith("cross_attention"))
    looks = [example.source[int(row.argmax())] for row in last[0].mean(0)]
    wanted = [token for token, at in zip(target[1:], looks, strict=True) if at not in (14, 15)]
    assert 0 < len(wanted) < len(target) - 1
    store = read_examples(model, SOURCE, [example], 0.9)
    assert store is not None
    assert store.values[store.speaks].tolist() == wanted
    assert len(store.values) == len(target) - 1


def test_an_example_with_other_numbers_proposes_no_digits(model: Translator) -> None:
    example = ExampleIds(SOURCE, [KO, 20, 30, 21, END], has_other_numbers=True)
    store = read_examples(model, SOURCE, [example], 0.9, digit_ids=[30, 31])
    assert store is not None
    assert store.values[store.speaks].tolist() == [20, 21, END]
    whole = read_examples(model, SOURCE, [example._replace(has_other_numbers=False)], 0.9, digit_ids=[30, 31])
    assert whole is not None
    assert whole.values[whole.speaks].tolist() == [20, 30, 21, END]
    assert (
        read_examples(model, SOURCE, [ExampleIds(SOURCE, [KO, 30], 1.0, True)], 0.9, digit_ids=[30]) is None
    )


def test_the_very_sentence_is_translated_as_the_example_was(model: Translator) -> None:
    target = [33, 17, 25, 33, 9]
    store = read_examples(model, SOURCE, [ExampleIds(SOURCE, [KO, *target, END])], 0.95)
    params = BeamParams(num_beams=3, max_new_tokens=12, example_weight=0.95)

    def translate(*stores: Datastore | None) -> list[int]:
        ((best,),) = beam_search(translator_scorer(model, [SOURCE], stores), [[KO]], END, params)
        return best.token_ids

    assert translate(store) == target
    assert translate(None) != target


def test_examples_in_tokens() -> None:
    tokenizer = Tokenizer.train(["Go home at 7."], 280)
    found = [
        Example("Go at 7.", "7시에 가.", 0.7),
        Example("Go at 8.", "8시에 가.", 0.6),
        Example("x" * 99, "y", 0.5),
    ]
    pairs = example_ids(found, "Go home at 7.", tokenizer, "en", "ko", 60)
    assert [example for example, _ in pairs] == found[:2]  # the third is too long
    ids = [each for _, each in pairs]
    assert [each.has_other_numbers for each in ids] == [False, True]
    assert [each.likeness for each in ids] == [0.7, 0.6]
    assert tokenizer.decode(ids[0].source) == "Go at 7."
    assert ids[0].target[0] == tokenizer.target_ids("ko")[0]
    assert ids[0].target[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[0].target) == "7시에 가."
    assert example_ids([], "Go.", tokenizer, "en", "ko", 60) == []
    # Digits that come of words count as other numbers, unless the text is known.
    for likeness, wary in ((1.0, False), (0.9, True)):
        ((_, spelt),) = example_ids(
            [Example("Go at six.", "6시에 가.", likeness)], "Go at six.", tokenizer, "en", "ko", 60
        )
        assert spelt.has_other_numbers is wary
