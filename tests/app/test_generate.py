"""POST /generate and /generate_stream on the alphabet lane."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.generate import GenerateParameters
from app.api.generation import find_stop
from app.engine.sequence import Sequence
from model.sampling import SamplingParams
from tests.app.fakes import FakeDecodeLane, byte_tokenizer

Client = httpx.AsyncClient


async def generate(client: Client, inputs: object, **parameters: object) -> Any:
    answer = await client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(client: Client, inputs: str, **parameters: object) -> list[dict[str, Any]]:
    body = {"inputs": inputs, "parameters": parameters, "stream": True}
    answer = await client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.isascii()
    return [json.loads(event.removeprefix("data:")) for event in answer.text.split("\n\n") if event]


async def refusal(client: Client, inputs: object, **parameters: object) -> str:
    answer = await client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), answer.text
    error: str = answer.json()["error"]
    return error


async def test_whole(client: Client) -> None:
    assert await generate(client, "abc", max_new_tokens=3) == {"generated_text": "def"}


async def test_defaults_may_be_absent_or_null(client: Client) -> None:
    twenty = {"generated_text": "bcdefghijklmnopqrstu"}
    bodies: list[dict[str, object]] = [{}, {"parameters": None}, {"parameters": {}, "stream": None}]
    for body in bodies:
        assert (await client.post("/generate", json={"inputs": "a"} | body)).json() == twenty
    names = list(GenerateParameters.model_fields)
    assert await generate(client, "a", **dict.fromkeys(names)) == twenty


async def test_a_list_gives_a_list_in_order(client: Client) -> None:
    answer = await generate(client, ["x", "a", "yz"], max_new_tokens=2)
    assert answer == [{"generated_text": text} for text in ("yz", "bc", "")]


async def test_details(client: Client) -> None:
    answer = await generate(client, "ab", max_new_tokens=2, details=True, seed=3)
    ids = byte_tokenizer().encode("cd")
    assert answer["details"] == {
        "finish_reason": "length",
        "generated_tokens": 2,
        "seed": 3,
        "prefill": [],
        "tokens": [
            {"id": ids[0], "text": "c", "logprob": -1.0, "special": False},
            {"id": ids[1], "text": "d", "logprob": -1.0, "special": False},
        ],
    }


async def test_end_of_text_is_a_token_without_text(client: Client) -> None:
    details = (await generate(client, "y", details=True))["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", 2)
    assert [(token["text"], token["special"]) for token in details["tokens"]] == [("z", False), ("", True)]


async def test_prefill(client: Client) -> None:
    prefill = (await generate(client, "hé", details=True, decoder_input_details=True))["details"]["prefill"]
    assert [token["text"] for token in prefill] == ["", "h", "", "é"]
    assert [token["logprob"] for token in prefill] == [None, -1.0, -1.0, -1.0]


async def test_top_tokens(client: Client) -> None:
    details = (await generate(client, "a", max_new_tokens=1, details=True, top_n_tokens=2))["details"]
    assert [[token["text"] for token in tokens] for tokens in details["top_tokens"]] == [["b", ""]]


async def test_best_of_keeps_the_most_probable(client: Client) -> None:
    answer = await generate(client, "a", max_new_tokens=2, details=True, do_sample=True, seed=3, best_of=3)
    details = answer["details"]
    assert details["seed"] == 4  # a seed that is a multiple of four is the fake's most probable
    assert sorted(other["seed"] for other in details["best_of_sequences"]) == [3, 5]
    assert all(other["generated_text"] == "bc" for other in details["best_of_sequences"])


async def test_full_text(client: Client) -> None:
    assert (await generate(client, "ab", max_new_tokens=1, return_full_text=True))["generated_text"] == "abc"


async def test_truncate_keeps_the_end_of_the_prompt(client: Client, generate_lane: FakeDecodeLane) -> None:
    await generate(client, "abcdef", truncate=3, max_new_tokens=1)
    tokenizer = byte_tokenizer()
    assert generate_lane.submitted[-1].prompt_ids == [tokenizer.bos_id, *tokenizer.encode("ef")]


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"seed": 1}, 0.0),
        ({"repetition_penalty": 1.2}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"typical_p": 0.5}, 1.0),
    ],
)
async def test_greedy_unless_sampling_is_asked_for(
    client: Client, generate_lane: FakeDecodeLane, parameters: dict[str, object], temperature: float
) -> None:
    await generate(client, "a", **parameters)
    assert generate_lane.submitted[-1].params.temperature == temperature  # type: ignore[union-attr]


async def test_stop_string_over_several_tokens(client: Client) -> None:
    answer = await generate(client, "a", stop=["efg", "z"], details=True)
    assert answer["generated_text"] == "bcdefg"
    assert (answer["details"]["finish_reason"], answer["details"]["generated_tokens"]) == ("stop_sequence", 6)


async def test_stop_drops_the_rest_of_its_token_and_frees_the_row(
    client: Client, generate_lane: FakeDecodeLane
) -> None:
    events = await stream(client, "a", stop="d")
    assert events[-1]["generated_text"] == "bcd"
    assert not generate_lane.running
    assert find_stop("ab", "cde", ["bc"]) == 1
    assert find_stop("ab", "cde", ["e", "d"]) == 2
    assert find_stop("abc", "de", ["bc"]) is None
    assert find_stop("", "", ["a"]) is None


async def test_stream(client: Client) -> None:
    events = await stream(client, "ab", max_new_tokens=3)
    assert [event["index"] for event in events] == [1, 2, 3]
    assert [event["token"]["text"] for event in events] == ["c", "d", "e"]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "cde"
    details = {"finish_reason": "length", "generated_tokens": 3, "input_length": 3, "seed": None}
    assert events[-1]["details"] == details
    assert all("top_tokens" not in event for event in events)


async def test_generate_stream_always_streams(client: Client) -> None:
    body = {"inputs": ["ab"], "parameters": {"max_new_tokens": 1}, "stream": False}
    answer = await client.post("/generate_stream", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-prompt-tokens"] == "3"


async def test_half_characters_are_held_back(client: Client, generate_lane: FakeDecodeLane) -> None:
    tokenizer = byte_tokenizer()
    text = "가\u2028나"
    generate_lane.scripts["k"] = [*tokenizer.encode(text), tokenizer.encode("다")[0], tokenizer.eos_id]
    events = await stream(client, "k")
    pieces = [event["token"]["text"] for event in events]
    assert pieces == ["", "", "가", "", "", "\u2028", "", "", "나", "", ""]
    assert "".join(pieces) == events[-1]["generated_text"] == text
    assert events[-1]["details"]["generated_tokens"] == len(events)
    whole = await generate(client, "k", details=True)
    assert [token["text"] for token in whole["details"]["tokens"]] == pieces


async def test_an_error_in_mid_stream_is_an_event(client: Client, generate_lane: FakeDecodeLane) -> None:
    generate_lane.fail_at = 3
    events = await stream(client, "a")
    assert [event.get("index") for event in events] == [1, 2, None]
    assert events[-1] == {"error": "the fake step failed", "error_type": "generation"}


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_before_the_first_token_is_a_status(
    client: Client, generate_lane: FakeDecodeLane, streamed: bool
) -> None:
    generate_lane.fail_at = 1
    answer = await client.post("/generate", json={"inputs": "a", "stream": streamed})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "generation")
    assert not generate_lane.running


async def test_one_failure_ends_the_others(client: Client, generate_lane: FakeDecodeLane) -> None:
    generate_lane.fail_at = 5
    answer = await client.post("/generate", json={"inputs": ["y", "a", "b"]})
    assert answer.status_code == 500
    assert not generate_lane.running


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_full_queue_refuses_at_the_door(
    client: Client, generate_lane: FakeDecodeLane, streamed: bool
) -> None:
    generate_lane.pause_seconds = 30
    held = [Sequence([1], SamplingParams()) for _ in range(16)]
    generate_lane.submit(held)
    answer = await client.post("/generate", json={"inputs": "a", "stream": streamed})
    assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")
    generate_lane.abort(held)


async def test_the_penalty_on_repetition_is_the_models_own_unless_one_is_asked_for(
    client: Client, app: FastAPI, generate_lane: FakeDecodeLane
) -> None:
    """And only where the likeliest token is always taken."""
    task = app.state.services.tasks["generate"]
    task.config = replace(task.config, repetition_penalty=1.3)
    for parameters in ({}, {"repetition_penalty": 1.0}, {"frequency_penalty": 0.5}, {"do_sample": True}):
        await client.post("/generate", json={"inputs": "ab", "parameters": parameters})
    for more in ({"temperature": 0}, {}, {"temperature": 0, "presence_penalty": 1.0}):
        await client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2} | more)
    asked: list[Any] = [sequence.params for sequence in generate_lane.submitted]
    assert [params.repetition_penalty for params in asked] == [1.3, 1.0, 1.0, 1.0, 1.3, 1.0, 1.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, the limit is 1 to 99"),
        ({"max_new_tokens": 5000}, "max_new_tokens is 5000, the limit is 1 to 99"),
        ({"temperature": -1.0}, "temperature is -1, the limit is 0.01 to 100"),
        ({"temperature": 1e-9}, "temperature is 1e-09, the limit is 0.01 to 100"),
        ({"temperature": 101}, "temperature is 101, the limit is 0.01 to 100"),
        ({"top_k": -1}, "top_k is -1, the limit is 0 to 1000"),
        ({"top_k": 1001}, "top_k is 1001, the limit is 0 to 1000"),
        ({"top_p": 0.0}, "top_p is 0, it must be above 0 and at most 1"),
        ({"typical_p": 1.5}, "typical_p is 1.5, it must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0, the limit is 0.1 to 10"),
        ({"frequency_penalty": 3}, "frequency_penalty is 3, the limit is -2 to 2"),
        ({"seed": -1}, "seed is -1, the limit is 0 to 9223372036854775807"),
        ({"seed": 2**64}, f"seed is {2**64}, the limit is 0 to 9223372036854775807"),
        ({"truncate": 0}, "truncate is 0, the least is 1"),
        ({"top_n_tokens": 6}, "top_n_tokens is 6, the limit is 0 to 5"),
        ({"best_of": 5, "do_sample": True}, "best_of is 5, the limit is 1 to 4"),
        ({"best_of": 2}, "best_of is 2, more than 1 needs sampling (do_sample)"),
        ({"stop": ["a"] * 17}, "stop has 17 strings, the limit is 16"),
        ({"stop": [""]}, "stop[0] has 0 characters, the limit is 1 to 256"),
        ({"stop": ["a", "b" * 257]}, "stop[1] has 257 characters, the limit is 1 to 256"),
        ({"watermark": True}, "parameters.watermark: Input should be False"),
        ({"max_new_tokens": "5"}, "parameters.max_new_tokens: Input should be a valid integer"),
        ({"max_new_tokens": True}, "parameters.max_new_tokens: Input should be a valid integer"),
        ({"no_such": 1}, "unknown parameter: parameters.no_such"),
        (
            {"max_new_tokens": 98},
            "inputs has 3 tokens and max_new_tokens is 98: together 101, the limit is 100",
        ),
    ],
)
async def test_refusals_name_parameter_limit_and_size(
    client: Client, parameters: dict[str, object], message: str
) -> None:
    assert await refusal(client, "ab", **parameters) == message


async def test_refusals_of_inputs(client: Client) -> None:
    assert await refusal(client, "a" * 20_001) == "inputs has 20001 characters, the limit is 20000"
    assert await refusal(client, ["a", "b" * 20_001]) == "inputs[1] has 20001 characters, the limit is 20000"
    assert await refusal(client, []) == "inputs has 0 texts, the limit is 1 to 64"
    assert await refusal(client, ["a"] * 65) == "inputs has 65 texts, the limit is 1 to 64"
    assert await refusal(client, "a" * 64) == "inputs has 65 tokens, the limit is 64"


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        (["a", "b"], {}, "inputs has 2 texts, a stream takes one"),
        ("a", {"best_of": 2, "do_sample": True}, "best_of is 2, a stream takes only 1"),
        ("a", {"decoder_input_details": True}, "decoder_input_details: a stream does not give them"),
    ],
)
async def test_refusals_of_streams(
    client: Client, inputs: object, parameters: dict[str, object], message: str
) -> None:
    answer = await client.post("/generate_stream", json={"inputs": inputs, "parameters": parameters})
    assert (answer.status_code, answer.json()["error"]) == (422, message)


async def test_headers(client: Client) -> None:
    answer = await client.post("/generate", json={"inputs": ["a", "bc"], "parameters": {"max_new_tokens": 2}})
    assert (answer.headers["x-prompt-tokens"], answer.headers["x-generated-tokens"]) == ("5", "4")
    times = [float(answer.headers[f"x-{name}-time"]) for name in ("queue", "inference", "total")]
    assert times[0] == 1.0
    assert times[2] >= times[1] >= 0


@pytest.mark.parametrize(
    "inputs", ["", "\x00", "\u2028", "🙂", "<s>[MASK]</s>", "a\u0301", "\ufeff", "\ufffd"]
)
async def test_no_text_is_a_server_error(client: Client, inputs: str) -> None:
    assert (await client.post("/generate", json={"inputs": inputs})).status_code == 200


class TestTimeout:
    @pytest.fixture
    def settings_values(self) -> dict[str, object]:
        return {"timeout_seconds": 0.25}

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_before_the_first_token(
        self, client: Client, generate_lane: FakeDecodeLane, streamed: bool
    ) -> None:
        generate_lane.pause_seconds = 30
        answer = await client.post("/generate", json={"inputs": "a", "stream": streamed})
        assert (answer.status_code, answer.json()["error_type"]) == (504, "timeout")
        assert answer.json()["error"] == "the request took longer than 0.25 seconds"
        assert not generate_lane.running

    async def test_in_mid_stream(self, app: FastAPI, client: Client, generate_lane: FakeDecodeLane) -> None:
        generate_lane.pause_seconds = 0.1
        longer = app.state.settings.model_copy(update={"timeout_seconds": 1.5})
        app.state.services = replace(app.state.services, settings=longer)
        events = await stream(client, "a")
        assert events[0]["index"] == 1
        assert [event.get("error_type") for event in events][-2:] == [None, "timeout"]
        assert not generate_lane.running
