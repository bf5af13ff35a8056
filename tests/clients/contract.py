"""What clients that exist rely on, by the clients themselves: `python contract.py '{"url": ...}'`.

Runs in an environment of its own with whatever versions are there, and imports nothing of this project. The
servers have the fake lanes: a translation shouts, a generation says the alphabet on. Prints a JSON object:
the versions, and for each contract null or the traceback of its failure.
"""

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any
from urllib.error import HTTPError

import openai
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OverloadedError, ValidationError
from libretranslatepy import LibreTranslateAPI

Servers = dict[str, str]  # "url", "full" whose queues are full, "keyed" which wants "key"


def raises(kind: type[Exception], call: Callable[[], object]) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def refused(call: Callable[[], object]) -> tuple[int, Any]:
    """The status and the JSON of an answer that urllib takes for an error."""
    error = raises(HTTPError, call)
    assert isinstance(error, HTTPError)
    with error:
        return error.code, json.load(error)


def hf(base: str, path: str, **values: Any) -> Any:
    return InferenceClient(f"{base}{path}", **values)


def gpt(base: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)


def test_translation(servers: Servers) -> None:
    client = hf(servers["url"], "/translate")
    assert client.translation("I go home", src_lang="en", tgt_lang="ko").translation_text == "I GO HOME"
    assert (
        client.translation("나는 집에", generate_parameters={"num_beams": 2}).translation_text == "나는 집에"
    )


def test_fill_mask(servers: Servers) -> None:
    client = hf(servers["url"], "/fill-mask")
    found = client.fill_mask("나는 [MASK]에 간다", targets=["집", "학교"], top_k=1)
    assert [(each.token_str, each.sequence) for each in found] == [("집", "나는 집에 간다")]
    assert len(client.fill_mask("[MASK]")) == 4


def test_text_generation(servers: Servers) -> None:
    client = hf(servers["url"], "/generate")
    assert client.text_generation("a", max_new_tokens=3) == "bcd"
    whole = client.text_generation(
        "a",
        max_new_tokens=3,
        details=True,
        do_sample=True,
        seed=4,
        best_of=2,
        decoder_input_details=True,
        top_n_tokens=2,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        typical_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        truncate=10,
        return_full_text=True,
        watermark=False,
        stop=["x"],
    )
    assert (whole.generated_text, whole.details.finish_reason, whole.details.seed) == ("abcd", "length", 4)
    assert [token.text for token in whole.details.tokens] == ["b", "c", "d"]
    assert len(whole.details.prefill) == 2
    assert [len(tokens) for tokens in whole.details.top_tokens] == [2, 2, 2]
    assert whole.details.best_of_sequences[0].seed == 5


def test_streamed_text_generation(servers: Servers) -> None:
    client = hf(servers["url"], "/generate")
    assert list(client.text_generation("a", max_new_tokens=3, stream=True)) == ["b", "c", "d"]
    events = list(client.text_generation("a", stop=["d"], stream=True, details=True))
    assert "".join(event.token.text for event in events) == events[-1].generated_text == "bcd"
    assert events[-1].details.finish_reason == "stop_sequence"
    assert events[-1].details.generated_tokens == len(events) == 3


def test_hugging_face_errors(servers: Servers) -> None:
    client = hf(servers["url"], "/generate")
    error = raises(ValidationError, lambda: client.text_generation("a", max_new_tokens=9999))
    assert "max_new_tokens is 9999, the limit is 1 to 99" in str(error)
    raises(ValidationError, lambda: list(client.text_generation("a", top_p=3.0, stream=True)))
    raises(ValidationError, lambda: client.text_generation("a", watermark=True))
    full = hf(servers["full"], "/generate")
    assert "queue is full" in str(raises(OverloadedError, lambda: full.text_generation("a")))


def test_the_bare_root(servers: Servers) -> None:
    client = hf(servers["url"], "")
    assert client.text_generation("a", max_new_tokens=3) == "bcd"
    assert client.translation("I go", src_lang="en", tgt_lang="ko").translation_text == "I GO"
    assert len(client.fill_mask("나는 [MASK]에 간다")) == 4


def test_hugging_face_keys(servers: Servers) -> None:
    client = hf(servers["keyed"], "/generate", token=servers["key"])
    assert client.text_generation("a", max_new_tokens=1) == "b"
    stranger = hf(servers["keyed"], "/generate", token="wrong")
    assert "this API key is not known" in str(raises(Exception, lambda: stranger.text_generation("a")))
    error = raises(HfHubHTTPError, lambda: hf(servers["keyed"], "/translate").translation("a"))
    assert isinstance(error, HfHubHTTPError)
    assert error.response.status_code == 401


def test_completions(servers: Servers) -> None:
    create = gpt(servers["url"]).completions.create
    one = create(
        model="alphabet", prompt="a", max_tokens=2, echo=True, logprobs=2, stop=["z"], seed=1, top_p=0.9
    )
    assert (one.choices[0].text, one.choices[0].finish_reason) == ("abc", "length")
    assert one.choices[0].logprobs is not None
    assert one.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert one.choices[0].logprobs.text_offset == [0, 1, 2]
    assert one.usage is not None
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.total_tokens) == (2, 2, 4)
    many = create(
        model="alphabet",
        prompt=["a", "x"],
        n=2,
        best_of=3,
        max_tokens=1,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        logit_bias={"20": -5},
        user="u",
    )
    assert [(choice.index, choice.text) for choice in many.choices] == [
        (0, "b"),
        (1, "b"),
        (2, "y"),
        (3, "y"),
    ]


def test_streamed_completions(servers: Servers) -> None:
    create = gpt(servers["url"]).completions.create
    chunks = list(create(model="alphabet", prompt=["a", "m"], max_tokens=3, stream=True))
    for index, text in enumerate(("bcd", "nop")):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == text
        assert own[-1].finish_reason == "length"
    *_, last = create(
        model="alphabet", prompt="a", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage is not None
    assert (last.choices, last.usage.completion_tokens) == ([], 3)


def test_models(servers: Servers) -> None:
    client = gpt(servers["url"])
    assert [model.id for model in client.models.list()] == ["alphabet"]
    assert client.models.retrieve("alphabet").object == "model"
    raises(openai.NotFoundError, lambda: client.models.retrieve("none"))


def test_openai_errors(servers: Servers) -> None:
    create = gpt(servers["url"]).completions.create
    error = raises(openai.BadRequestError, lambda: create(model="alphabet", prompt="a", max_tokens=9999))
    assert isinstance(error, openai.BadRequestError)
    assert error.param == "max_tokens"
    raises(openai.BadRequestError, lambda: create(model="alphabet", prompt="a", suffix="b"))
    raises(openai.NotFoundError, lambda: create(model="none", prompt="a"))
    full = raises(
        openai.RateLimitError, lambda: gpt(servers["full"]).completions.create(model="alphabet", prompt="a")
    )
    assert isinstance(full, openai.RateLimitError)
    assert int(full.response.headers["retry-after"]) >= 1


def test_openai_keys(servers: Servers) -> None:
    keyed, key = servers["keyed"], servers["key"]
    answer = gpt(keyed, key).completions.create(model="alphabet", prompt="a", max_tokens=1)
    assert answer.choices[0].text == "b"
    raises(openai.AuthenticationError, lambda: gpt(keyed, "wrong").models.list())


def test_libretranslate(servers: Servers) -> None:
    api = LibreTranslateAPI(servers["url"])
    assert api.translate("I go & stay", "en", "ko") == "I GO & STAY"
    assert api.translate("집에", "auto", "en") == "집에"
    assert api.detect("집에") == [{"confidence": 100.0, "language": "ko"}]
    assert [each["code"] for each in api.languages()] == ["en", "ko"]


def test_libretranslate_errors(servers: Servers) -> None:
    api = LibreTranslateAPI(servers["url"])
    assert refused(lambda: api.translate("a", "en", "fr")) == (
        *(400, {"error": "target: no language 'fr'; there are en, ko"}),
    )
    status, body = refused(lambda: LibreTranslateAPI(servers["full"]).translate("a", "en", "ko"))
    assert (status, "queue is full" in body["error"]) == (429, True)


def test_libretranslate_keys(servers: Servers) -> None:
    assert LibreTranslateAPI(servers["keyed"], servers["key"]).translate("a", "en", "ko") == "A"
    status, body = refused(lambda: LibreTranslateAPI(servers["keyed"], "wrong").translate("a", "en", "ko"))
    assert (status, list(body)) == (403, ["error"])


CONTRACTS = {name: value for name, value in globals().items() if name.startswith("test_")}


def run(servers: Servers) -> dict[str, str | None]:
    results: dict[str, str | None] = {}
    for name, contract in CONTRACTS.items():
        try:
            contract(servers)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    versions = {name: version(name) for name in ("huggingface_hub", "openai", "libretranslatepy")}
    json.dump({"versions": versions, "results": run(json.loads(sys.argv[1]))}, sys.stdout)
