"""POST /fill-mask and /next-sentence on the lane that ranks a fixed list."""

import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.errors import Json
from model.examples import Examples
from model.nearest_words import find_votes
from model.tokenizer import Tokenizer
from tests.app.fakes import FakeBatchLane, word_tokenizer

Client = httpx.AsyncClient


async def fill(client: Client, inputs: object, **parameters: object) -> Any:
    answer = await client.post("/fill-mask", json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refusal(client: Client, path: str, body: object) -> str:
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), answer.text
    error: str = answer.json()["error"]
    return error


async def test_one_mask_gives_a_flat_list(client: Client) -> None:
    answer = await fill(client, "I go [MASK].")
    assert [entry["token_str"] for entry in answer] == ["home", "school", "집", "학교"]
    token = word_tokenizer().encode(" home")[0]
    assert answer[0] == {"score": 0.5, "token": token, "token_str": "home", "sequence": "I go home."}


async def test_without_a_space_before_the_mask(client: Client) -> None:
    answer = await fill(client, "I go ([MASK])", top_k=1)
    token = word_tokenizer().encode("home")[0]
    assert answer == [{"score": 0.5, "token": token, "token_str": "home", "sequence": "I go (home)"}]


async def test_the_item_is_what_the_model_was_trained_on(
    client: Client, fill_mask_lane: FakeBatchLane
) -> None:
    await fill(client, "home [MASK] ([MASK]")
    item, tokenizer = fill_mask_lane.submitted[-1], word_tokenizer()
    ids, _ = tokenizer.encode_masked("home [MASK] ([MASK]")
    assert item.token_ids == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    assert set(item.segment_ids) == {0}
    assert item.allowed == ["space", "no_space"]


async def test_several_masks_give_a_list_each(client: Client) -> None:
    first, second = await fill(client, "[MASK] and [MASK]", top_k=1)
    assert first[0]["sequence"] == "home and [MASK]"
    assert second[0]["sequence"] == "[MASK] and home"


async def test_a_list_gives_a_list(client: Client) -> None:
    one, two = await fill(client, ["a [MASK]", "[MASK] [MASK]"], top_k=2)
    assert [entry["sequence"] for entry in one] == ["a home", "a school"]
    assert [[entry["sequence"] for entry in mask] for mask in two] == [
        ["home [MASK]", "school [MASK]"],
        ["[MASK] home", "[MASK] school"],
    ]


async def test_targets(client: Client) -> None:
    answer = await fill(client, "나는 [MASK]에 간다", targets=["학교", "집", "학교"], top_k=5)
    assert [entry["sequence"] for entry in answer] == ["나는 학교에 간다", "나는 집에 간다"]
    assert [entry["sequence"] for entry in await fill(client, "[MASK]!", targets="집")] == ["집!"]


async def test_a_target_may_have_a_space_before_it(client: Client) -> None:
    answer = await fill(client, "나는 [MASK]에 간다", targets=[" 학교", "학교", " 집"])
    assert [entry["token_str"] for entry in answer] == ["학교", "집"]
    assert [entry["sequence"] for entry in await fill(client, "[MASK]!", targets=" 집")] == ["집!"]


async def test_each_target_is_resolved_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], Tokenizer.encode

    def counting(self: Tokenizer, text: str) -> list[int]:
        encoded.append(text)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    await fill(client, ["[MASK] [MASK] ([MASK]"] * 3, targets=["home", "school"])
    assert sorted(text for text in encoded if text.strip() in ("home", "school")) == [
        *(" home", " school"),
        *("home", "school"),
    ]


@pytest.fixture
def with_examples(app: FastAPI) -> None:
    task = app.state.services.tasks["fill-mask"]
    pairs = [("I go home now.", "나는 지금 집에 간다."), ("Go to school!", "학교에 가!")]
    task.examples = Examples.build({("en", "ko"): pairs})
    task.config = replace(task.config, example_weight=0.5)


@pytest.mark.usefixtures("with_examples")
async def test_words_of_known_texts_have_votes(
    app: FastAPI, client: Client, fill_mask_lane: FakeBatchLane
) -> None:
    tokenizer, task = word_tokenizer(), app.state.services.tasks["fill-mask"]
    texts = [
        *("I go [MASK] now.", "Zzz. I go [MASK] now. Qqq.", "나는 지금 [MASK]에 간다."),
        *("Zzz qqq [MASK]", "I go [MASK]. Go to [MASK]!"),
    ]
    await fill(client, texts)
    one, among, korean, none, two = (item.votes for item in fill_mask_lane.submitted)
    for votes, word in ((one, " home"), (among, " home"), (korean, " 집")):
        (found,) = votes
        assert found is not None
        best, _ = max(zip(found.token_ids, found.shares, strict=True), key=lambda pair: pair[1])
        assert [best] == tokenizer.encode(word)
        assert 0 < found.weight <= 0.5
    assert one == among  # by the sentence that holds the mask
    assert none == [None]
    first, second = two
    assert find_votes(task.examples, "Go to [MASK]!", tokenizer, task.config, 0.5, follows=True) == [second]
    assert find_votes(task.examples, "I go [MASK].", tokenizer, task.config, 0.5) == [first]
    await fill(client, "I go [MASK] now." + "[MASK]" * 8)
    assert fill_mask_lane.submitted[-1].votes == []


@pytest.mark.usefixtures("with_examples")
async def test_examples_can_be_turned_off_and_up(client: Client, fill_mask_lane: FakeBatchLane) -> None:
    for asked in (0, 0.25, 0.95, None):
        await fill(client, "I go [MASK] now.", examples=asked)
    off, *others = (item.votes for item in fill_mask_lane.submitted)
    assert off == []
    weights = [votes.weight for (votes,) in others if votes is not None]
    assert [weight / weights[-1] for weight in weights] == pytest.approx([0.5, 1.9, 1.0])
    for wrong in (-0.1, 0.96):
        body = {"inputs": "[MASK]", "parameters": {"examples": wrong}}
        assert await refusal(client, "/fill-mask", body) == f"examples is {wrong}, the limit is 0 to 0.95"


async def test_without_examples_none_can_be_asked_for(client: Client) -> None:
    body = {"inputs": "[MASK]", "parameters": {"examples": 0.5}}
    assert "started without any" in await refusal(client, "/fill-mask", body)
    await fill(client, "[MASK]", examples=0)


class TestFillings:
    @pytest.fixture
    def settings_values(self) -> dict[str, object]:
        return {"max_fillings": 12}

    async def test_are_bounded_over_all_masks_of_all_texts(self, client: Client) -> None:
        texts = ["[MASK] [MASK]", "[MASK]"]
        await fill(client, texts, top_k=4)
        assert await refusal(client, "/fill-mask", {"inputs": texts, "parameters": {"top_k": 5}}) == (
            "inputs has 3 masks with 5 fillings each: together 15, the limit is 12"
        )

    async def test_no_more_than_the_targets_count(self, client: Client) -> None:
        await fill(client, "[MASK]", top_k=1000, targets=["home", "school"])
        body = {"inputs": "[MASK]", "parameters": {"top_k": 13}}
        assert "together 13, the limit is 12" in await refusal(client, "/fill-mask", body)


@pytest.mark.parametrize(("n_texts", "on_the_loop"), [(1, True), (16, False)])
async def test_a_long_answer_is_written_off_the_loop(
    client: Client, monkeypatch: pytest.MonkeyPatch, n_texts: int, on_the_loop: bool
) -> None:
    threads = []

    def noting(content: object) -> Json:
        threads.append(threading.current_thread())
        return Json(content)

    monkeypatch.setattr("app.api.fill_mask.Json", noting)
    await fill(client, ["[MASK]" * 10] * n_texts, top_k=4)
    assert (threads == [threading.current_thread()]) is on_the_loop


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ("no mask", {}, "inputs has no mask; write [MASK] where a word is missing"),
        (["[MASK]", ""], {}, "inputs[1] has no mask; write [MASK] where a word is missing"),
        ("a [MASK]", {"targets": ["homely"]}, "targets: 'homely' after a space is 3 tokens, it must be one"),
        ("[MASK]", {"targets": [""]}, "targets[0] is empty, it must be a word"),
        ("[MASK]", {"targets": ["home", " \n"]}, "targets[1] is empty, it must be a word"),
        (
            "[MASK]",
            {"targets": ["y" * 300]},
            f"targets: '{'y' * 77}...' without a space before it is 300 tokens, it must be one",
        ),
        ("[MASK]", {"top_k": 10**300}, f"top_k is 1{'0' * 76}..., the limit is 1 to 1000"),
        (3, {}, "inputs must be a string or a list of strings"),
        ([3], {}, "inputs.0: Input should be a valid string"),
        ("[MASK]", {"targets": 3}, "parameters.targets must be a string or a list of strings"),
        ("[MASK]", {"targets": []}, "targets has 0 words, the limit is 1 to 256"),
        ("[MASK]", {"targets": ["a"] * 257}, "targets has 257 words, the limit is 1 to 256"),
        ("[MASK]", {"top_k": 0}, "top_k is 0, the limit is 1 to 1000"),
        ("[MASK]", {"top_k": 1001}, "top_k is 1001, the limit is 1 to 1000"),
        ("[MASK]", {"topk": 1}, "unknown parameter: parameters.topk"),
        ("[MASK]" * 65, {}, "the number of masks in inputs is 65, the limit is 1 to 64"),
        ("[MASK] " + "x" * 31, {}, "inputs has 35 tokens, the limit is 32"),
    ],
)
async def test_refusals(client: Client, inputs: object, parameters: object, message: str) -> None:
    assert await refusal(client, "/fill-mask", {"inputs": inputs, "parameters": parameters}) == message


async def test_next_sentence(client: Client, fill_mask_lane: FakeBatchLane) -> None:
    answer = await client.post("/next-sentence", json={"inputs": {"first": "ab", "second": "cd"}})
    assert answer.json() == {"follows": False, "score": 0.25}  # the fake goes by the number of tokens
    item, tokenizer = fill_mask_lane.submitted[-1], word_tokenizer()
    first, second = tokenizer.encode("ab"), tokenizer.encode(" cd")
    assert item.token_ids == [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
    assert item.segment_ids == [0, 0, 0, 0, 1, 1, 1, 1]
    assert answer.headers["x-prompt-tokens"] == "8"


async def test_next_sentence_list(client: Client) -> None:
    pairs = [{"first": "a", "second": "b"}, {"first": "", "second": ""}, {"first": "a", "second": " b"}]
    answer = await client.post("/next-sentence", json={"inputs": pairs, "parameters": {}})
    assert [each["follows"] for each in answer.json()] == [False, True, False]


async def test_next_sentence_refusals(client: Client) -> None:
    path, pair = "/next-sentence", {"first": "x" * 20, "second": "y" * 20}
    assert await refusal(client, path, {"inputs": pair}) == "inputs has 44 tokens together, the limit is 32"
    assert await refusal(client, path, {"inputs": []}) == "inputs has 0 pairs, the limit is 1 to 64"
    many = {"inputs": [pair] * 65}
    assert await refusal(client, path, many) == "inputs has 65 pairs, the limit is 1 to 64"
    long = {"inputs": [{"first": "a", "second": "b" * 20_001}]}
    assert await refusal(client, path, long) == "inputs[0].second has 20001 characters, the limit is 20000"
    assert await refusal(client, path, {"inputs": {"first": "a"}}) == "inputs.second: Field required"
    assert await refusal(client, path, {"inputs": [{"first": "a"}]}) == "inputs.0.second: Field required"
    assert await refusal(client, path, {"inputs": 3}) == "inputs must be an object or a list of objects"
    assert "parameters.top_k" in await refusal(client, path, {"inputs": pair, "parameters": {"top_k": 1}})
