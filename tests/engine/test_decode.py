"""Continuous batching equals the oracles, request by request, in any mix; turn by turn, without a thread."""

import random
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from app.engine.decode import make_decode_lane
from app.engine.errors import Aborted, Draining, Overloaded, PromptTooLong, RequestTooLarge, StepFailed
from app.engine.sequence import FinishReason, Sequence
from model.checkpoint import Checkpoint
from model.constraints import Phrase, Progress
from model.models import Translator
from model.nearest import ExampleIds, read_examples
from model.sampling import BeamParams, SamplingParams
from model.shortlist import Shortlist, Table
from tests.engine.rig import (
    WAYS,
    FailingTranslateRunner,
    check_generations,
    check_translations,
    drive,
    expected_translation,
    fails_on,
    gauge,
    generate_lane,
    load_bold,
    ordinary_ids,
    outcome,
    random_generation,
    random_launchable,
    random_translation,
    tokens,
    translate_lane,
    turn,
    with_kernels,
)
from tests.tiny import TinyFolders

FIVE = [*((seed, "plain") for seed in range(4)), (4, "static")]
KERNELS = [(5, "kernels"), (6, "kernels")]


def greedy(n_prompt: int = 3, n_new: int = 10, first: int = 300) -> Sequence:
    """Never ends before its length, which makes it easy to count."""
    ids = list(range(first, first + n_prompt))
    return Sequence(ids, SamplingParams(max_new_tokens=n_new, min_new_tokens=n_new))


@pytest.mark.parametrize(("seed", "way"), [*FIVE, (4, "ahead"), *((s, "late") for s in range(4)), *KERNELS])
async def test_generations_equal_the_oracle_in_any_mix(
    causal: Checkpoint, causal_oracle: Checkpoint, seed: int, way: str
) -> None:
    rng = random.Random(seed)
    causal = with_kernels(causal) if way == "kernels" else causal
    n_slots, budget, chunk = rng.choice([1, 3, 8]), rng.choice([1, 40, 1000]), rng.choice([1, 5, 1000])
    lane = generate_lane(causal, n_slots=n_slots, prefill_tokens=budget, chunk_tokens=chunk, **WAYS[way])
    make = random_generation if way in ("plain", "static", "kernels") else random_launchable
    sequences = [make(causal, rng) for _ in range(24)]
    aborted = [sequence for sequence in sequences if rng.random() < 0.2]
    for sequence in sequences:
        lane.submit([sequence])
        for _ in range(rng.choice([0, 0, 1, 5])):
            turn(lane)
        if aborted and rng.random() < 0.3:
            lane.abort([rng.choice(aborted)])
    lane.abort(aborted)
    drive(lane)
    await check_generations(causal_oracle, (s for s in sequences if s not in aborted))
    for sequence in aborted:
        assert not isinstance(await outcome(sequence), list) or sequence.n_generated_tokens > 0


@pytest.mark.parametrize(("seed", "way"), [*FIVE, *KERNELS])
async def test_translations_equal_the_oracle_in_any_mix(
    translator: Checkpoint, translator_oracle: Checkpoint, seed: int, way: str
) -> None:
    rng = random.Random(seed)
    translator = with_kernels(translator) if way == "kernels" else translator
    n_slots, budget = rng.choice([5, 9, 16]), rng.choice([1, 40, 1000])
    lane = translate_lane(translator, n_slots=n_slots, prefill_tokens=budget, **WAYS[way])
    sequences = [random_translation(translator, rng) for _ in range(16)]
    aborted = [sequence for sequence in sequences if rng.random() < 0.2]
    for sequence in sequences:
        lane.submit([sequence])
        for _ in range(rng.choice([0, 0, 1, 4])):
            turn(lane)
        if aborted and rng.random() < 0.3:
            lane.abort([rng.choice(aborted)])
    lane.abort(aborted)
    drive(lane)
    await check_translations(translator_oracle, (s for s in sequences if s not in aborted))


async def test_a_sentence_whose_examples_cannot_be_read_does_without(
    translator: Checkpoint, translator_oracle: Checkpoint
) -> None:
    tokenizer = translator.tokenizer
    source = tokenizer.source_ids([300, 301, 302], "ko")
    good, bad = (
        ExampleIds(tokenizer.source_ids(ids, "ko"), [*tokenizer.target_ids("ko"), 310, tokenizer.eos_id])
        for ids in ([300, 301], [300, 399])
    )
    params = BeamParams(num_beams=2, max_new_tokens=6, example_weight=0.9)
    lane = translate_lane(translator)
    assert isinstance(lane.runner, FailingTranslateRunner)
    lane.runner.fault = fails_on(399, "examples")
    sequences = [Sequence(source, params, examples=[example]) for example in (good, bad, good)]
    labels = {"endpoint": "translate", "model": lane.runner.model_name}
    before = REGISTRY.get_sample_value("transformer_with_examples_total", labels) or 0.0
    lane.submit(sequences)
    drive(lane)
    assert REGISTRY.get_sample_value("transformer_with_examples_total", labels) == before + 2
    await check_translations(translator_oracle, [sequences[0], sequences[2]])
    without = Sequence(source, replace(params, example_weight=0.0))
    (wanted,) = expected_translation(translator_oracle, without)
    (found,) = await sequences[1].result()
    assert found.token_ids == wanted.token_ids
    assert lane.runner._stores == [None] * lane.runner.n_slots


@pytest.mark.parametrize("way", ["plain", "static", "kernels", "int8"])
async def test_a_known_sentence_becomes_one_of_its_translations(translator: Checkpoint, way: str) -> None:
    """In a crowd; where there are several, the likeliest comes first, and no other text is among them."""
    rng, ends = random.Random(5), [translator.config.eos_id]
    checkpoint = (
        with_kernels(translator, "int8" if way == "int8" else "none")
        if way in ("kernels", "int8")
        else translator
    )
    lane = translate_lane(checkpoint, n_slots=16, **WAYS.get(way, {}))
    source = translator.tokenizer.source_ids([300, 301, 302], "ko")
    one = [310, 311, 310, 311, 310, *ends]
    several = [one, [310, 312, *ends], [320, *ends]]
    for known in ([one], several):
        for num_beams in (1, 4):
            params = BeamParams(num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=9)
            made = Sequence(source, params, known=known)
            lane.submit([random_translation(translator, rng), made])
            turn(lane)
            lane.submit([random_translation(translator, rng)])
            drive(lane)
            found = await made.result()
            ended = [[*h.token_ids, *ends] for h in found if h.finish_reason == "eos_token"]
            assert len(ended) == min(num_beams, len(known))
            assert all(each in known for each in ended)
            assert found[0].finish_reason == "eos_token"
    cut = Sequence(source, BeamParams(num_beams=2, max_new_tokens=3), known=[one])
    lane.submit([cut])
    drive(lane)
    assert (await cut.result())[0].token_ids == one[:3]


@pytest.mark.parametrize("seed", range(3))
async def test_ranking_without_logits_changes_nothing(translator: Checkpoint, seed: int) -> None:
    """Nor does it matter which of a crowd asks for what needs logits."""
    eight_bits = with_kernels(translator, "int8")
    answers = []
    for at_once in (True, False):
        rng, lane = random.Random(seed), translate_lane(eight_bits, n_slots=16)
        runner = lane.runner
        assert isinstance(runner, FailingTranslateRunner)
        runner.makes_logits = not at_once
        sequences = [random_translation(translator, rng) for _ in range(12)]
        # No guards at all, so that some steps have none.
        sequences += [random_translation(translator, rng, repetition_penalty=1.0) for _ in range(12)]
        for sequence in sequences:
            lane.submit([sequence])
            turn(lane)
        drive(lane)
        found = [await sequence.result() for sequence in sequences]
        answers.append([[(h.token_ids, h.score, h.logprobs) for h in each] for each in found])
        assert (runner.n_ranked_at_once > 0) is at_once
    assert answers[0] == answers[1]


@pytest.mark.parametrize("led", [False, True])
@pytest.mark.parametrize("place", ["continuations", "nan"])
async def test_in_eight_bits_only_the_culprit_fails(translator: Checkpoint, place: str, *, led: bool) -> None:
    """Led by examples, and choosing among the tokens of a shortlist, or among all."""
    checkpoint = with_shortlist(translator) if led else with_kernels(translator, "int8")
    lane = translate_lane(checkpoint, n_slots=12)
    runner = lane.runner
    params = BeamParams(num_beams=3, max_new_tokens=8, min_new_tokens=8, example_weight=0.8 * led)
    assert isinstance(runner, FailingTranslateRunner)
    english, korean = (lane.runner.config.languages[name] for name in ("en", "ko"))
    if place == "nan":
        runner.nan_token = english
    else:
        runner.fault = fails_on(english, place)
    sources = [translator.tokenizer.source_ids([300 + i], "ko" if i else "en") for i in range(4)]
    culprit, *innocent = (
        Sequence(source, params, examples=[ExampleIds(source, [source[1], 310 + i, 2])] * led)
        for i, source in enumerate(sources)
    )
    assert [s.prompt_ids[1] for s in (culprit, *innocent)] == [english, korean, korean, korean]
    lane.submit([*innocent[:2], culprit, innocent[2]])
    drive(lane)
    assert isinstance(await outcome(culprit), StepFailed)
    for sequence in innocent:
        assert len((await sequence.result())[0].token_ids) == 8
    assert (runner.n_ranked_at_once >= 8) is not led
    assert (runner.n_listed >= 8) is led


def with_shortlist(checkpoint: Checkpoint) -> Checkpoint:
    """In eight bits, with lists of about a third of the vocabulary."""
    rng, size = np.random.default_rng(0), checkpoint.config.vocab_size
    tables = {}
    for name in checkpoint.config.languages:
        common = np.append(rng.choice(size, size // 6, replace=False), checkpoint.config.eos_id)
        likely, starts = rng.integers(size, size=8 * size), np.arange(0, 8 * size + 1, 8)
        tables[name] = Table(np.unique(common), likely, starts)
    shortlist = Shortlist(tables, checkpoint.config)
    return replace(with_kernels(checkpoint, "int8"), shortlist=shortlist)


@pytest.mark.parametrize("seed", range(3))
async def test_translations_of_a_shortlist_are_the_best_that_it_holds(
    translator: Checkpoint, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """By all logits, where those of other tokens are impossible; in a crowd of which some have no list."""
    listed = with_shortlist(translator)
    rng = random.Random(seed)
    sequences = [random_translation(translator, rng) for _ in range(12)]
    sequences += [random_translation(translator, rng, repetition_penalty=1.0) for _ in range(12)]
    lane = translate_lane(listed, n_slots=16)
    failed: list[Exception] = []
    monkeypatch.setattr(lane.failures, "note", lambda error, _: failed.extend([error]))
    for sequence in sequences:
        lane.submit([sequence])
        turn(lane)
    drive(lane)
    runner = lane.runner
    assert isinstance(runner, FailingTranslateRunner)
    assert not failed  # not even once: what fails is tried again with fewer
    assert runner.n_listed > 50
    assert runner._lists == [None] * 16  # nothing is held for those that have gone
    assert listed.shortlist is not None
    assert isinstance(listed.model, Translator)
    names = {token: name for name, token in listed.config.languages.items()}
    n_led = 0
    for sequence in sequences:
        found = await sequence.result()
        twin = Sequence(sequence.prompt_ids, sequence.params, examples=sequence.examples)
        alone = translate_lane(listed, n_slots=5)
        alone.submit([twin])
        drive(alone)
        assert [(h.token_ids, h.logprobs) for h in await twin.result()] == [
            (h.token_ids, h.logprobs) for h in found
        ]
        assert isinstance(sequence.params, BeamParams)
        whole = translate_lane(replace(listed, shortlist=None), n_slots=5)
        if sequence.params.repetition_penalty == 1.0:
            language, weight = names[sequence.prompt_ids[1]], sequence.params.example_weight
            digits = listed.tokenizer.digit_ids
            store = read_examples(listed.model, sequence.prompt_ids, sequence.examples, weight, digits)
            n_led += store is not None
            said = [] if store is None else store.values.tolist()
            ids = listed.shortlist.ids(sequence.prompt_ids, language, runner._suppressed_ids, said).tolist()
            ids += listed.shortlist.common(language).tolist()
            assert {token for h in found for token in h.token_ids} <= set(ids)
            others = torch.ones(listed.config.vocab_size, dtype=torch.bool)
            others[ids] = False
            assert isinstance(whole.runner, FailingTranslateRunner)
            whole.runner.makes_logits, whole.runner.impossible = True, others
        oracle = Sequence(sequence.prompt_ids, sequence.params, examples=sequence.examples)
        whole.submit([oracle])
        drive(whole)
        expected = await oracle.result()
        assert [h.token_ids for h in found] == [h.token_ids for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-5)
    assert n_led > 1


async def test_what_needs_all_tokens_has_no_shortlist(
    translator: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phrases, given beginnings, penalties; a language without a table, and a source with too long a list."""
    listed = with_shortlist(translator)
    assert listed.shortlist is not None
    source = translator.tokenizer.source_ids([300, 301], "ko")
    phrase = (Phrase(((310, 311),)),)
    start = translator.tokenizer.target_ids("ko")
    for made, n in (
        (Sequence(source, BeamParams(num_beams=1, max_new_tokens=2, min_new_tokens=2)), 2),
        (Sequence(source, BeamParams(num_beams=1, max_new_tokens=1), target_ids=start), 1),
        (Sequence(source, BeamParams(num_beams=1, max_new_tokens=2, required=phrase)), 0),
        (Sequence(source, BeamParams(num_beams=1, max_new_tokens=2, repetition_penalty=1.2)), 0),
        (Sequence(source, BeamParams(num_beams=1, max_new_tokens=2), target_ids=[*start, 310]), 0),
    ):
        lane = translate_lane(listed)
        lane.submit([made])
        drive(lane)
        await made.result()
        assert isinstance(lane.runner, FailingTranslateRunner)
        assert lane.runner.n_listed == n
    english = replace(listed, shortlist=Shortlist({"en": listed.shortlist.tables["en"]}, listed.config))
    for checkpoint, most in ((english, 2048), (listed, 10)):
        monkeypatch.setattr("app.engine.runner._MOST_LISTED", most)
        lane = translate_lane(checkpoint)
        made = Sequence(source, BeamParams(max_new_tokens=2))
        lane.submit([made])
        drive(lane)
        await made.result()
        assert isinstance(lane.runner, FailingTranslateRunner)
        assert lane.runner.n_listed == 0


async def test_required_phrases_are_said_and_change_nothing_beside_them(
    translator: Checkpoint, translator_oracle: Checkpoint
) -> None:
    """Answers alone and in a crowd are the same, whether phrases are asked for or not."""
    rng, alone, crowd = random.Random(3), translate_lane(translator), translate_lane(translator, n_slots=16)
    free = [random_translation(translator, rng) for _ in range(6)]
    bound: list[tuple[Sequence, Sequence]] = []
    for first in range(300, 306):
        phrases = (Phrase(((first, first + 20), (first + 40,))), Phrase(((410,),), once=True))
        params = BeamParams(num_beams=3, num_return_sequences=3, max_new_tokens=12, required=phrases)
        source = translator.tokenizer.source_ids([first], "ko")
        bound.append((Sequence(source, params), Sequence(source, params)))
    for i, (one, other) in enumerate(bound):
        alone.submit([one])
        drive(alone)
        crowd.submit([free[i], other])
        turn(crowd)
    drive(crowd)
    await check_translations(translator_oracle, free)
    for one, other in bound:
        assert isinstance(one.params, BeamParams)
        found = await one.result()
        assert [h.token_ids for h in found] == [h.token_ids for h in await other.result()]
        assert found[0].token_ids.count(410) == 1
        said = reduce(Progress.take, found[0].token_ids, Progress(one.params.required))
        assert said.complete


async def test_a_seeded_generation_is_the_same_alone_and_in_a_crowd(causal: Checkpoint) -> None:
    rng = random.Random(5)
    params = SamplingParams(temperature=1.3, top_k=50, top_p=0.95, max_new_tokens=20, seed=11)
    said = []
    for n_others in (0, 3, 9):
        lane, sequence = generate_lane(causal, n_slots=6), Sequence([300, 301, 302], params)
        lane.submit([random_generation(causal, rng) for _ in range(n_others)])
        turn(lane)
        lane.submit([sequence])
        drive(lane)
        said.append(await tokens(sequence))
    assert said[0] == said[1] == said[2]
    lane, other = generate_lane(causal), Sequence([300, 301, 302], replace(params, seed=12))
    lane.submit([other])
    drive(lane)
    assert await tokens(other) != said[0]


async def test_top_tokens_and_prompt_logprobs(causal: Checkpoint) -> None:
    lane = generate_lane(causal)
    asking = Sequence([300, 301, 302], SamplingParams(max_new_tokens=4, top_n_tokens=3), prompt_logprobs=True)
    silent, alone = greedy(), Sequence([300], SamplingParams(max_new_tokens=2), prompt_logprobs=True)
    lane.submit([asking, silent, alone])
    drive(lane)
    async for event in asking.events():
        assert len(event.top_tokens) == 3
        ids, logprobs = zip(*event.top_tokens, strict=True)
        assert (ids[0], logprobs[0]) == (event.token_id, event.logprob)
        assert list(logprobs) == sorted(logprobs, reverse=True)
    assert [event.top_tokens async for event in silent.events()] == [()] * 10
    with torch.no_grad():
        table = causal.model(torch.tensor([[300, 301, 302]]))[0].log_softmax(-1)
    wanted = [table[0, 301].item(), table[1, 302].item()]
    assert asking.prompt_logprobs_out == [None, *map(pytest.approx, wanted)]
    assert alone.prompt_logprobs_out == [None]
    assert silent.prompt_logprobs_out == []


async def test_alignments(translator: Checkpoint) -> None:
    lane = translate_lane(translator)
    wishes = {"num_beams": 4, "num_return_sequences": 4, "return_alignment": True}
    sequence = random_translation(translator, random.Random(1), **wishes)
    lane.submit([sequence])
    drive(lane)
    for hypothesis in await sequence.result():
        assert hypothesis.alignment is not None
        assert len(hypothesis.alignment) == len(hypothesis.token_ids)
        for row in hypothesis.alignment:
            assert len(row) == sequence.n_prompt_tokens
            assert sum(row) == pytest.approx(1, abs=1e-4)
    assert not any("attend" in vars(module) for module in translator.model.modules())


async def test_a_generation_may_fill_the_whole_context(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal)
    full, long = greedy(n_prompt=1, n_new=63), greedy(n_prompt=63, n_new=1)
    lane.submit([full, long])
    drive(lane)
    await check_generations(causal_oracle, [full, long])


async def test_the_length_and_the_end_are_told_apart(causal: Checkpoint) -> None:
    rng, reasons = random.Random(2), set()
    lane = generate_lane(causal)
    ids = ordinary_ids(causal)
    params = SamplingParams(temperature=3.0, max_new_tokens=60)
    sequences = [Sequence([rng.choice(ids)], replace(params, seed=seed)) for seed in range(30)]
    lane.submit(sequences)
    drive(lane)
    for sequence in sequences:
        (hypothesis,) = await sequence.result()
        reasons.add(hypothesis.finish_reason)
        n_ends = hypothesis.finish_reason is FinishReason.EOS
        assert sequence.n_generated_tokens == len(hypothesis.token_ids) + n_ends
        assert causal.config.eos_id not in hypothesis.token_ids
    assert reasons == {FinishReason.EOS, FinishReason.LENGTH}


# Aborts, at every stage


async def test_an_abort_frees_the_row_at_the_next_turn(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=2)
    stopping, staying, waiting = greedy(), greedy(first=310), greedy(first=320)
    lane.submit([stopping, staying, waiting])
    turn(lane)
    lane.abort([stopping])
    turn(lane)
    assert lane.scheduler.running == [staying, waiting]
    assert isinstance(await outcome(stopping), Aborted)
    assert stopping.n_generated_tokens == 1
    drive(lane)
    await check_generations(causal_oracle, [staying, waiting])


async def test_a_waiting_one_leaves_without_a_row(causal: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=1)
    running, waiting = greedy(), greedy()
    lane.submit([running, waiting])
    turn(lane)
    lane.abort([waiting])
    turn(lane)
    assert isinstance(await outcome(waiting), Aborted)
    assert (waiting.admitted_at, waiting.inference_seconds) == (None, 0.0)
    assert lane.scheduler.waiting_tokens == 0


async def test_aborted_before_the_first_turn_or_even_before_it_was_submitted(causal: Checkpoint) -> None:
    lane = generate_lane(causal)
    early, at_once = greedy(), greedy()
    lane.abort([early])
    turn(lane)
    lane.submit([early])
    drive(lane)
    lane.submit([at_once])
    lane.abort([at_once])
    drive(lane)
    assert isinstance(await outcome(early), Aborted)
    assert isinstance(await outcome(at_once), Aborted)
    assert early.n_generated_tokens == at_once.n_generated_tokens == 0


async def test_an_abort_after_the_end_changes_nothing(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane, sequence = generate_lane(causal), greedy()
    lane.submit([sequence])
    drive(lane)
    lane.abort([sequence])
    lane.abort([sequence])
    turn(lane)
    await check_generations(causal_oracle, [sequence])
    assert lane.door.n_inside == 0


async def test_a_translation_gives_back_all_its_rows(
    translator: Checkpoint, translator_oracle: Checkpoint
) -> None:
    rng, lane = random.Random(3), translate_lane(translator, n_slots=8, prefill_tokens=1000)
    wide = random_translation(translator, rng, num_beams=5, num_return_sequences=1, max_new_tokens=12)
    narrow = random_translation(translator, rng, num_beams=2, num_return_sequences=1, max_new_tokens=12)
    lane.submit([wide, narrow])
    turn(lane)
    assert lane.scheduler.n_active == 7
    lane.abort([wide])
    turn(lane)
    assert lane.scheduler.n_active in (0, 2)
    drive(lane)
    await check_translations(translator_oracle, [narrow])


# Bounds


def test_a_full_queue_refuses_all_or_nothing(causal: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=1, max_queue_items=3, max_queue_tokens=20)
    lane.submit([greedy(), greedy()])
    for request in ([greedy(), greedy()], [greedy(n_prompt=15)]):
        with pytest.raises(Overloaded) as refused:
            lane.submit(request)
        assert 1.0 <= refused.value.retry_after_seconds <= 60.0
    assert (len(lane.scheduler.waiting), lane.door.n_inside) == (2, 2)
    assert gauge("queue_items", "generate") == 2
    assert gauge("queue_tokens", "generate") == 6
    lane.submit([greedy()])
    drive(lane)
    assert gauge("queue_items", "generate") == gauge("queue_tokens", "generate") == 0


def test_a_request_larger_than_the_queue_is_refused_for_good(causal: Checkpoint) -> None:
    lane = generate_lane(causal, max_queue_items=3, max_queue_tokens=20)
    with pytest.raises(RequestTooLarge, match=r"4 items .* limit is 3 items"):
        lane.submit([greedy()] * 4)
    with pytest.raises(RequestTooLarge, match=r"21 tokens .* 20 tokens"):
        lane.submit([greedy(n_prompt=7)] * 3)
    assert (len(lane.scheduler.waiting), lane.door.n_inside) == (0, 0)


def test_what_cannot_fit_is_refused_with_the_numbers(causal: Checkpoint, translator: Checkpoint) -> None:
    lane = generate_lane(causal)
    with pytest.raises(PromptTooLong, match=r"65 tokens.* 64"):
        lane.submit([greedy(), greedy(n_prompt=5, n_new=60)])
    assert not lane.has_work()
    translating = translate_lane(translator)
    for sequence in (
        Sequence([300] * 65, BeamParams(max_new_tokens=5)),
        Sequence([300], BeamParams(max_new_tokens=65)),
    ):
        with pytest.raises(PromptTooLong, match=r"65 tokens.* 64"):
            translating.submit([sequence])


def test_what_a_lane_cannot_do_never_reaches_the_queue(causal: Checkpoint, translator: Checkpoint) -> None:
    generating, translating = generate_lane(causal, n_slots=2), translate_lane(translator, n_slots=3)
    with pytest.raises(TypeError, match="SamplingParams"):
        generating.submit([Sequence([300], BeamParams(num_beams=3, max_new_tokens=5))])
    with pytest.raises(TypeError, match="BeamParams"):
        translating.submit([Sequence([300], SamplingParams())])
    with pytest.raises(ValueError, match="4 exceeds the 3 rows"):
        translating.submit([Sequence([300], BeamParams(num_beams=4, max_new_tokens=5))])
    for token in (-1, causal.config.vocab_size):
        with pytest.raises(ValueError, match="vocabulary"):
            generating.submit([Sequence([300, token], SamplingParams(max_new_tokens=5))])
    assert not generating.has_work()
    assert not translating.has_work()


def test_a_draining_lane_takes_nothing_more(causal: Checkpoint) -> None:
    lane = generate_lane(causal)
    lane.submit([greedy()])
    lane.door.draining = True
    with pytest.raises(Draining):
        lane.submit([greedy()])
    drive(lane)


async def test_admission_does_not_stop_running_streams(causal: Checkpoint) -> None:
    """At most one prompt of this length is taken in by a turn, and who runs has a token from each."""
    lane = generate_lane(causal, n_slots=8, prefill_tokens=30)
    running = greedy(n_new=10)
    lane.submit([running])
    turn(lane)
    lane.submit([greedy(n_prompt=20, n_new=1) for _ in range(6)])
    for n_turns in range(2, 7):
        turn(lane)
        assert running.n_generated_tokens == n_turns
        assert len(lane.scheduler.waiting) == 7 - n_turns


def test_usage_is_measured(causal: Checkpoint, translator: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=4)
    lane.submit([greedy(n_prompt=5), greedy(n_prompt=3, n_new=1)])
    turn(lane)
    assert gauge("rows_in_use", "generate") == 1
    assert gauge("kv_cache_usage_ratio", "generate") == 6 / (4 * 64)
    drive(lane)
    assert gauge("rows_in_use", "generate") == gauge("kv_cache_usage_ratio", "generate") == 0
    translating = translate_lane(translator, n_slots=10)
    params = BeamParams(num_beams=5, max_new_tokens=5, min_new_tokens=5)
    translating.submit([Sequence([300, 301], params)])
    turn(translating)
    assert gauge("rows_in_use", "translate") == 5
    assert gauge("kv_cache_usage_ratio", "translate") == 5 * 2 / (10 * 64)


def test_nothing_is_remembered_of_what_ended(causal: Checkpoint, translator: Checkpoint) -> None:
    rng = random.Random(0)
    generating, translating = generate_lane(causal), translate_lane(translator)
    for _ in range(3):
        done = [random_generation(causal, rng) for _ in range(5)]
        generating.submit(done)
        translating.submit([random_translation(translator, rng) for _ in range(3)])
        turn(generating)
        generating.abort(done[:1])
        drive(generating)
        drive(translating)
    assert generating._generations == {}
    assert generating._rows is None
    assert translating._groups == {}


def test_the_lane_that_suits_a_checkpoint(causal: Checkpoint, translator: Checkpoint) -> None:
    for checkpoint, wanted, longest in ((causal, "GenerateLane", 63), (translator, "TranslateLane", 64)):
        lane = make_decode_lane(
            "generate", checkpoint, n_slots=3, prefill_tokens=9, max_queue_items=5, max_queue_tokens=6
        )
        assert type(lane).__name__ == wanted
        limits = lane.limits
        assert (limits.max_prompt_tokens, limits.max_new_tokens, limits.n_slots) == (longest, 64, 3)
        assert (lane.limits.max_queue_items, lane.limits.max_queue_tokens) == (5, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", ["plain", "static", "ahead"])
async def test_the_mix_on_a_gpu(
    tiny_folders: TinyFolders, causal_oracle: Checkpoint, translator_oracle: Checkpoint, way: str
) -> None:
    """float32 on the GPU, step by step and as CUDA graphs, says what the oracles say on the CPU."""
    causal, translator = load_bold(tiny_folders.generate, "cuda"), load_bold(tiny_folders.translate, "cuda")
    generating, translating = generate_lane(causal, **WAYS[way]), translate_lane(translator, **WAYS[way])
    rng = random.Random(0)
    make = random_launchable if way == "ahead" else random_generation
    generations = [make(causal, rng) for _ in range(16)]
    translations = [random_translation(translator, rng) for _ in range(12)]
    for generation, translation in zip(generations, translations, strict=False):
        generating.submit([generation])
        translating.submit([translation])
        turn(generating)
        turn(translating)
    generating.submit(generations[12:])
    drive(generating)
    drive(translating)
    await check_generations(causal_oracle, generations)
    await check_translations(translator_oracle, translations)


# Long prompts in chunks, and beginnings that are kept


async def test_a_long_prompt_is_read_in_chunks_between_the_steps_of_others(
    causal: Checkpoint, causal_oracle: Checkpoint
) -> None:
    lane = generate_lane(causal, n_slots=4, prefill_tokens=1000, chunk_tokens=6, n_blocks=0)
    running, long, short = greedy(n_new=30), greedy(n_prompt=45, n_new=5), greedy(n_prompt=4, n_new=3)
    lane.submit([running])
    turn(lane)
    lane.submit([long])
    for n_turns in range(2, 8):  # 44 tokens at six in a chunk and one in the step
        turn(lane)
        assert running.n_generated_tokens == n_turns
        assert long.n_generated_tokens == 0
    lane.submit([short])
    turn(lane)
    assert long.n_generated_tokens == 1
    drive(lane)
    await check_generations(causal_oracle, [running, long, short])


@pytest.mark.parametrize("way", ["kernels", "ahead"])
@pytest.mark.parametrize(
    ("chunk", "together"), [(32, 0), (40, 0), (64, 0), (7, 0), (64, 512), (9, 512), (40, 32)]
)
async def test_in_eight_bits_a_generation_hangs_on_nobody_else(
    causal: Checkpoint, monkeypatch: pytest.MonkeyPatch, chunk: int, together: int, way: str
) -> None:
    """To the last bit: however prompts came together, were read in parts, or had been read before.

    By pieces, token by token, and by both.
    """
    monkeypatch.setattr("app.engine.decode._TOGETHER", together)
    model = with_kernels(causal, "int8")
    rng = random.Random(5)

    def make() -> list[Sequence]:
        rng.seed(5)
        return [
            Sequence([rng.randrange(300, 340) for _ in range(n_prompt)], SamplingParams(max_new_tokens=8))
            for n_prompt in (2, 3, 9, 9, 31, 33, 34, 45, 50, 50)
        ]

    async def outputs(sequences: list[Sequence]) -> list[tuple[list[int], list[float]]]:
        return [(best.token_ids, best.logprobs) for best, *_ in [await s.result() for s in sequences]]

    alone = make()
    for sequence in alone:
        lane = generate_lane(model, n_slots=6, prefill_tokens=64, chunk_tokens=chunk, n_blocks=0, **WAYS[way])
        lane.submit([sequence])
        drive(lane)
    wanted = await outputs(alone)
    lane = generate_lane(model, n_slots=6, prefill_tokens=64, chunk_tokens=chunk, n_blocks=4, **WAYS[way])
    at_once, later = make(), make()
    lane.submit(at_once)
    drive(lane)
    for sequence in reversed(later):
        lane.submit([sequence])
        turn(lane)
    drive(lane)
    assert await outputs(at_once) == wanted
    assert await outputs(later) == wanted


async def test_nobody_to_wait_for_means_whole_prompts(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=4, prefill_tokens=1000, chunk_tokens=6)
    prompts = [greedy(n_prompt=40, n_new=5), greedy(n_prompt=30, n_new=5)]
    lane.submit(prompts)
    turn(lane)
    assert [sequence.n_generated_tokens for sequence in prompts] == [1, 1]
    drive(lane)
    await check_generations(causal_oracle, prompts)


def reused() -> float:
    samples = [m for m in REGISTRY.collect() if m.name == "transformer_reused_tokens"]
    return sum(s.value for m in samples for s in m.samples if s.name.endswith("_total"))


async def test_a_known_beginning_is_not_read_again(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal, n_slots=3, n_blocks=2)
    first, same = greedy(n_prompt=40, n_new=6), greedy(n_prompt=50, n_new=6)
    other = Sequence([*range(300, 331), 320, 321, 322], SamplingParams(max_new_tokens=6))
    for sequence, expected in ((first, 0), (same, 32), (other, 0), (greedy(n_prompt=33, n_new=2), 32)):
        before = reused()
        lane.submit([sequence])
        drive(lane)
        assert reused() - before == expected
        await check_generations(causal_oracle, [sequence])


async def test_what_cannot_be_kept_is_read_again(causal: Checkpoint, causal_oracle: Checkpoint) -> None:
    lane = generate_lane(causal)

    def fault(what: str, ids: list[int]) -> None:
        if what == "keep":
            raise RuntimeError("no room")

    lane.runner.fault = fault  # type: ignore[attr-defined]
    sequences = [greedy(n_prompt=40, n_new=6), greedy(n_prompt=40, n_new=6)]
    for sequence in sequences:
        lane.submit([sequence])
        drive(lane)
    await check_generations(causal_oracle, sequences)
