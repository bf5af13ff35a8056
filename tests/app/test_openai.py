"""POST /v1/completions and GET /v1/models: the form, the refusals, and an unmodified client."""

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.generation import Generation
from app.api.openai import overlap, token_name, visible_chars
from app.engine.sequence import FinishReason, Sequence
from app.lifecycle import begin_drain
from model.sampling import SamplingParams
from tests.app.fakes import FakeDecodeLane, byte_tokenizer

Client = httpx.AsyncClient


async def complete(client: Client, prompt: object, **values: object) -> Any:
    answer = await client.post("/v1/completions", json={"prompt": prompt} | values)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def texts(client: Client, prompt: object, **values: object) -> list[str]:
    return [choice["text"] for choice in (await complete(client, prompt, **values))["choices"]]


async def stream(client: Client, prompt: object, **values: object) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "stream": True} | values
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.isascii()
    *events, last = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


async def refusal(client: Client, status: int, **body: object) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json=body)
    return check(answer, status)


def check(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.headers.get("x-should-retry") == "false") == (status not in (429, 503))
    return error


async def test_whole(client: Client) -> None:
    answer = await complete(client, "a", max_tokens=2, model="alphabet")
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "alphabet",
        "choices": [{"index": 0, "text": "bc", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    }


async def test_defaults(client: Client, generate_lane: FakeDecodeLane) -> None:
    assert await texts(client, "a") == ["bcdefghijklmnopq"]
    params = generate_lane.submitted[-1].params
    assert isinstance(params, SamplingParams)
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (1.0, 1.0, 0, 16)
    assert await texts(client, None, max_tokens=None, n=None, stop=None, logit_bias=None) == [
        "abcdefghijklmnop"
    ]


async def test_parameters_reach_the_engine(client: Client, generate_lane: FakeDecodeLane) -> None:
    values = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "frequency_penalty": 0.5,
        "presence_penalty": -1.5,
    }
    await complete(
        client, "a", max_tokens=1, repetition_penalty=1.5, user="u", logit_bias={"5": -100}, **values
    )
    params = generate_lane.submitted[-1].params
    assert {name: getattr(params, name) for name in values} == values
    assert isinstance(params, SamplingParams)
    assert params.repetition_penalty == 1.5
    assert params.logit_bias == ((5, -100.0),)


async def test_every_form_of_prompt(client: Client, generate_lane: FakeDecodeLane) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("ab")
    assert await texts(client, ["a", "x"], max_tokens=1) == ["b", "y"]
    assert await texts(client, ids, max_tokens=1) == ["c"]
    assert await texts(client, [ids, tokenizer.encode("x")], max_tokens=1) == ["c", "y"]
    await complete(client, [tokenizer.bos_id, *ids], max_tokens=1)
    assert generate_lane.submitted[-1].prompt_ids == [tokenizer.bos_id, *ids]


async def test_choice_i_of_prompt_p_is_number_p_n_plus_i(
    client: Client, generate_lane: FakeDecodeLane
) -> None:
    answer = await complete(client, ["a", "x"], n=2, seed=3, max_tokens=1)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        *((0, "b"), (1, "b"), (2, "y"), (3, "y"))
    ]
    assert [sequence.seed for sequence in generate_lane.submitted] == [3, 4, 3, 4]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


async def test_best_of_keeps_the_most_probable_first(client: Client) -> None:
    answer = await complete(client, "a", seed=2, best_of=3, n=2, max_tokens=2, logprobs=0)
    # The fake's log-probability is -0.25 for a seed that is a multiple of four, less for each after it.
    assert [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]] == [-0.25, -0.75]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


async def test_end_of_text(client: Client) -> None:
    answer = await complete(client, "y", logprobs=0)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("z", "stop")
    assert answer["choices"][0]["logprobs"]["tokens"] == ["z", "</s>"]
    assert answer["usage"]["completion_tokens"] == 2


async def test_stop_strings_are_no_part_of_the_text(client: Client, generate_lane: FakeDecodeLane) -> None:
    answer = await complete(client, "a", stop=["efg", "z"], logprobs=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("bcd", "stop")
    assert choice["logprobs"]["tokens"] == ["b", "c", "d"]
    assert answer["usage"]["completion_tokens"] == 6
    assert not generate_lane.running


async def test_logprobs(client: Client) -> None:
    answer = await complete(client, "a", max_tokens=2, logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["b", "c"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{"b": -0.25, "</s>": -5.0}, {"c": -0.25, "</s>": -5.0}],
        "text_offset": [0, 1],
    }


async def test_echo(client: Client) -> None:
    choice = (await complete(client, "aé", max_tokens=1, echo=True, logprobs=1))["choices"][0]
    assert choice["text"] == "aé\u00ea"[:2] + choice["text"][2:]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["token_logprobs"][:3] == [-1.0] * 3
    assert logprobs["top_logprobs"][:3] == [None] * 3
    assert logprobs["text_offset"][:3] == [0, 1, 1]
    assert logprobs["text_offset"][3] == 2
    assert await texts(client, byte_tokenizer().encode("ab"), max_tokens=1, echo=True) == ["abc"]


async def test_a_prompt_alone_can_be_scored(client: Client) -> None:
    answer = await complete(client, "ab", max_tokens=0, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == (
        *("ab", "length"),
        ["a", "b"],
    )
    assert answer["usage"]["completion_tokens"] == 0
    events = await stream(client, "ab", max_tokens=0, echo=True)
    assert [event["choices"][0]["text"] for event in events] == ["ab"]


async def test_stream(client: Client) -> None:
    events = await stream(client, "a", max_tokens=3)
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    assert [event["choices"] for event in events] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
        for text, reason in (("b", None), ("c", None), ("d", "length"))
    ]


async def test_stream_with_usage(client: Client) -> None:
    *events, last = await stream(client, "a", max_tokens=3, stream_options={"include_usage": True})
    assert [event["usage"] for event in events] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


async def test_choices_of_a_stream_are_interleaved(client: Client, generate_lane: FakeDecodeLane) -> None:
    events = await stream(client, ["a", "v"], n=2, max_tokens=6)
    order = [event["choices"][0]["index"] for event in events]
    assert order[:4] == [0, 1, 2, 3]
    assert joined(events) == {0: "bcdefg", 1: "bcdefg", 2: "wxyz", 3: "wxyz"}
    ends = [event["choices"][0] for event in events if event["choices"][0]["finish_reason"]]
    assert {end["index"]: end["finish_reason"] for end in ends} == {
        0: "length",
        1: "length",
        2: "stop",
        3: "stop",
    }
    assert not generate_lane.running


def joined(events: list[dict[str, Any]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


@pytest.mark.parametrize("stop", [["efg"], ["ef", "cdq"], ["b"], ["def", "ef"], ["zz"]])
@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_joined_is_the_whole(client: Client, stop: list[str], echo: bool) -> None:
    values = {"max_tokens": 8, "stop": stop, "logprobs": 1, "echo": echo}
    events = await stream(client, "a", **values)
    whole = (await complete(client, "a", **values))["choices"][0]
    assert joined(events) == {0: whole["text"]}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [each for event in events for each in event["choices"][0]["logprobs"][name]]
        assert streamed == whole["logprobs"][name]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


async def test_half_characters_are_held_back(client: Client, generate_lane: FakeDecodeLane) -> None:
    tokenizer = byte_tokenizer()
    generate_lane.scripts["k"] = [*tokenizer.encode("가\u2028나"), tokenizer.eos_id]
    events = await stream(client, "k", logprobs=0)
    assert [event["choices"][0]["text"] for event in events] == ["가", "\u2028", "나", ""]
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in events] == [3, 3, 3, 1]


def test_what_is_certain() -> None:
    assert overlap("abc", "cd") == 1
    assert overlap("abc", "bcd") == 2
    assert overlap("abc", "abc") == 2 - 2
    assert overlap("", "a") == overlap("a", "a") == 0
    assert overlap("aab", "aabaab") == 3
    generation = Generation(
        Sequence([1], SamplingParams()),
        FakeDecodeLane.__new__(FakeDecodeLane),
        byte_tokenizer(),
        ["bc", "abc"],
    )
    generation.text, generation.finish_reason = "xabc", FinishReason.STOP
    assert visible_chars(generation) == 1


def test_names_of_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert token_name(tokenizer.encode("a")[0], tokenizer) == "a"
    assert token_name(tokenizer.encode("가")[0], tokenizer) == "bytes:\\xea"
    assert token_name(tokenizer.eos_id, tokenizer) == "</s>"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, the limit is 1 to 99"),
        ({"max_tokens": 1025}, "max_tokens", "max_tokens is 1025, the limit is 1 to 99"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 98}, "prompt",
         "prompt has 3 tokens and max_tokens is 98: together 101, the limit is 100"),
        ({"temperature": -1}, "temperature", "temperature is -1, the limit is 0.01 to 100"),
        ({"top_p": 0}, "top_p", "top_p is 0, it must be above 0 and at most 1"),
        ({"n": 0}, "n", "n is 0, the limit is 1 to 4"),
        ({"n": 2, "best_of": 1}, "best_of", "best_of is 1, the limit is 2 to 4"),
        ({"best_of": 2, "stream": True}, "best_of",
         "best_of is 2 and n is 1; in a stream they must be the same"),
        ({"seed": -1}, "seed", "seed is -1, the limit is 0 to 9223372036854775807"),
        ({"logprobs": 6}, "logprobs", "logprobs is 6, the limit is 0 to 5"),
        ({"top_k": -1}, "top_k", "top_k is -1, the limit is 0 to 1000"),
        ({"frequency_penalty": 3}, "frequency_penalty", "frequency_penalty is 3, the limit is -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0, the limit is 0.1 to 10"),
        ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty is 2.5, the limit is -2 to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias: 'a' is no token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "logit_bias: '-1' is no token id"),
        ({"logit_bias": {"267": 1}}, "logit_bias", "logit_bias is 267, the limit is 0 to 266"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias[5] is 101, the limit is -100 to 100"),
        ({"logit_bias": {"5": True}}, "logit_bias", "logit_bias: the value of '5' must be a number"),
        ({"logit_bias": {"5": 10**400}}, "logit_bias", "logit_bias: the value of '5' must be a number"),
        (
            {"logit_bias": {str(i): 0 for i in range(301)}},
            "logit_bias",
            "logit_bias has 301 tokens, the limit is 300",
        ),
        (
            {"suffix": "a"},
            "suffix",
            "suffix: not supported here, the model only writes on; leave it out",
        ),
        ({"stop": ["a"] * 17}, "stop", "stop has 17 strings, the limit is 16"),
        ({"stop": ["a", ""]}, "stop", "stop[1] has 0 characters, the limit is 1 to 256"),
        ({"stream_options": {}}, "stream_options", "stream_options: only together with stream"),
        ({"stream_options": {"x": 1}}, "stream_options", "unknown parameter: stream_options.x"),
        ({"no_such": 1}, "no_such", "unknown parameter: no_such"),
        ({"prompt": 3}, "prompt",
         "prompt must be a string or a list of strings or a list of integers or a list of lists of integers"),
        ({"prompt": []}, "prompt", "prompt has 0 prompts, the limit is 1 to 64"),
        ({"prompt": ["a"] * 65}, "prompt", "prompt has 65 prompts, the limit is 1 to 64"),
        ({"prompt": "a" * 20_001}, "prompt", "prompt has 20001 characters, the limit is 20000"),
        ({"prompt": ["b", "a" * 64]}, "prompt", "prompt[1] has 65 tokens, the limit is 64"),
        ({"prompt": [[20], []]}, "prompt", "prompt[1] has 0 tokens, the limit is 1 to 64"),
        ({"prompt": [20] * 65}, "prompt", "prompt has 65 tokens, the limit is 1 to 64"),
        ({"prompt": [20, 99999]}, "prompt", "prompt[1] is 99999, the limit is 0 to 266"),
        ({"prompt": [[20, -1]]}, "prompt", "prompt[0][1] is -1, the limit is 0 to 266"),
        ({"prompt": ["a", "\ud800"]}, "prompt", "prompt[1] has a lone surrogate at character 0"),
    ],
)  # fmt: skip
async def test_refusals_name_parameter_limit_and_size(
    client: Client, body: dict[str, object], param: str, message: str
) -> None:
    content = json.dumps({"prompt": "ab"} | body)
    answer = await client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    error = check(answer, 400)
    assert error == {"message": message, "type": "invalid_request_error", "param": param, "code": None}


@pytest.mark.parametrize("prompt", [3, {}, [1, "a"], [[1, "a"]], [[["a"]]], [None], [True], [1.5], True])
async def test_prompts_of_the_wrong_kind(client: Client, prompt: object) -> None:
    assert (await refusal(client, 400, prompt=prompt))["param"] == "prompt"


async def test_a_long_list_of_the_wrong_kind_is_one_fault(client: Client) -> None:
    error = await refusal(client, 400, prompt=[None] * 100_000)
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"prompt": NaN}'])
async def test_bodies_that_are_refused(client: Client, content: bytes) -> None:
    answer = await client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert check(answer, 400)["type"] == "invalid_request_error"


async def test_models(client: Client) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [("alphabet", "model")]
    assert (await client.get("/v1/models/alphabet")).json() == listed["data"][0]


async def test_unknown_things(client: Client) -> None:
    error = check(await client.get("/v1/models/a/b"), 404)
    assert error["message"] == "no model 'a/b' for generate; there is 'alphabet'"
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert (await refusal(client, 404, model="gpt", prompt="a"))["code"] == "model_not_found"
    assert check(await client.get("/v1/nope"), 404)["code"] == "not_found"
    assert check(await client.get("/v1/completions"), 405)["code"] == "method_not_allowed"


async def test_a_model_that_is_not_loaded(client: Client, app: FastAPI) -> None:
    app.state.services.registry.generate.take("alphabet")
    assert (await client.get("/v1/models")).json()["data"] == []
    assert "not loaded" in (await refusal(client, 404, prompt="a"))["message"]


async def test_loading_and_draining(client: Client, app: FastAPI) -> None:
    services, app.state.services = app.state.services, None
    assert (await refusal(client, 503, prompt="a"))["type"] == "server_error"
    app.state.services = services
    begin_drain(app)
    answer = await client.post("/v1/completions", json={"prompt": "a"})
    assert check(answer, 503)["code"] == "draining"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_full_queue_refuses_at_the_door(
    client: Client, generate_lane: FakeDecodeLane, streamed: bool
) -> None:
    generate_lane.pause_seconds = 30
    held = [Sequence([1], SamplingParams()) for _ in range(16)]
    generate_lane.submit(held)
    answer = await client.post("/v1/completions", json={"prompt": "a", "stream": streamed})
    error = check(answer, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")
    generate_lane.abort(held)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_before_the_first_token_is_a_status(
    client: Client, generate_lane: FakeDecodeLane, streamed: bool
) -> None:
    generate_lane.fail_at = 1
    error = await refusal(client, 500, prompt=["a", "b"], stream=streamed)
    assert error["message"] == "the fake step failed"
    assert not generate_lane.running


async def test_an_error_in_mid_stream_is_an_event(client: Client, generate_lane: FakeDecodeLane) -> None:
    generate_lane.fail_at = 3
    events = await stream(client, ["a", "b"])
    assert joined(events[:-1]) == {0: "bc", 1: "cd"}
    assert events[-1]["error"]["message"] == "the fake step failed"
    assert not generate_lane.running


async def test_headers(client: Client) -> None:
    answer = await client.post("/v1/completions", json={"prompt": ["a", "bc"], "max_tokens": 2})
    assert (answer.headers["x-prompt-tokens"], answer.headers["x-generated-tokens"]) == ("5", "4")


class TestLimits:
    @pytest.fixture
    def settings_values(self) -> dict[str, object]:
        return {"timeout_seconds": 1.0, "max_body_bytes": 2000}

    async def test_too_large(self, client: Client) -> None:
        assert (await refusal(client, 413, prompt="a" * 3000))["code"] == "too_large"

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_too_slow(self, client: Client, generate_lane: FakeDecodeLane, streamed: bool) -> None:
        generate_lane.pause_seconds = 30
        assert (await refusal(client, 504, prompt="a", n=2, stream=streamed))["code"] == "timeout"
        assert not generate_lane.running

    async def test_too_slow_in_mid_stream(self, client: Client, generate_lane: FakeDecodeLane) -> None:
        generate_lane.pause_seconds = 0.3
        events = await stream(client, "a", n=2)
        assert events[-1]["error"]["code"] == "timeout"
        assert not generate_lane.running


async def test_the_interface_is_described(client: Client) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    answers = paths["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504", "default"} <= set(answers)
    assert {"/v1/models", "/v1/models/{model_id}"} <= set(paths)


class TestRealClient:
    """The openai package, unmodified, over a socket."""

    async def test_completions(self, url: str) -> None:
        openai = pytest.importorskip("openai")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.completions.create(
                model="alphabet", prompt=["a", "x"], max_tokens=2, n=2, logprobs=1, seed=4
            )
            assert [choice.text for choice in answer.choices] == ["bc", "bc", "yz", "yz"]
            assert answer.choices[0].logprobs.tokens == ["b", "c"]
            assert answer.usage.total_tokens == 12
            extra = {"top_k": 3, "repetition_penalty": 1.1}
            answer = await client.completions.create(model="alphabet", prompt=[20, 21], extra_body=extra)
            assert answer.choices[0].finish_reason == "length"
            assert [model.id async for model in client.models.list()] == ["alphabet"]
            assert (await client.models.retrieve("alphabet")).id == "alphabet"

    async def test_streams(self, url: str) -> None:
        openai = pytest.importorskip("openai")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            chunks = await client.completions.create(
                model="alphabet",
                prompt="a",
                n=2,
                stop="e",
                stream=True,
                stream_options={"include_usage": True},
            )
            found, usage = ["", ""], None
            async for chunk in chunks:
                for choice in chunk.choices:
                    found[choice.index] += choice.text
                usage = chunk.usage
            assert found == ["bcd", "bcd"]
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (2, 8)

    async def test_errors(self, url: str, app: FastAPI, generate_lane: FakeDecodeLane) -> None:
        openai = pytest.importorskip("openai")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.completions.create(model="alphabet", prompt="a", max_tokens=9999)
            assert (refused.value.param, refused.value.type) == ("max_tokens", "invalid_request_error")
            with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
                await client.completions.create(model="gpt", prompt="a")
            generate_lane.fail_at = 3
            with pytest.raises(openai.APIError, match="the fake step failed"):
                async for _ in await client.completions.create(model="alphabet", prompt="a", stream=True):
                    pass
            generate_lane.fail_at, generate_lane.pause_seconds = None, 30
            held = [Sequence([1], SamplingParams()) for _ in range(16)]
            generate_lane.submit(held)
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="alphabet", prompt="a")
            generate_lane.abort(held)
