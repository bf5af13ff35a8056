"""LibreTranslate's form of POST /translate, POST /detect, GET /languages; and an unmodified client."""

import asyncio
import json
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI

from app.engine.sequence import Sequence
from model.sampling import BeamParams
from tests.app.fakes import FakeDecodeLane

Client = httpx.AsyncClient

FORM = {"content-type": "application/x-www-form-urlencoded"}


async def translate(client: Client, q: object, **values: object) -> Any:
    answer = await client.post("/translate", json={"q": q, "source": "en", "target": "ko"} | values)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: str = answer.json()["error"]
    return error


async def test_json(client: Client) -> None:
    assert await translate(client, "I go. You stay.") == {"translatedText": "I GO. YOU STAY."}
    assert await translate(client, ["one", "two"]) == {"translatedText": ["ONE", "TWO"]}
    assert await translate(client, "a", format="text", api_key="k", alternatives=0) == {"translatedText": "A"}


async def test_form(client: Client) -> None:
    answer = await client.post("/translate", data={"q": "가 b+c", "source": "en", "target": "ko"})
    assert answer.json() == {"translatedText": "가 B+C"}
    repeated = urlencode([("q", "a"), ("q", "b"), ("source", "en"), ("target", "ko"), ("alternatives", "1")])
    answer = await client.post("/translate", content=repeated, headers=FORM)
    assert answer.json() == {"translatedText": ["A", "B"], "alternatives": [["A!"], ["B!"]]}


async def test_query_string(client: Client) -> None:
    query = {"q": "a", "source": "en", "target": "ko", "alternatives": "1"}
    answer = await client.post("/translate", params=query)
    assert answer.json() == {"translatedText": "A", "alternatives": ["A!"]}
    answer = await client.post("/translate", params={"target": "ko"}, data={"q": "a"})
    assert answer.json()["translatedText"] == "A"


async def test_alternatives_are_without_the_best(client: Client, translate_lane: FakeDecodeLane) -> None:
    assert await translate(client, "a", alternatives=2) == {
        "translatedText": "A",
        "alternatives": ["A!", "A!!"],
    }
    assert await translate(client, ["a"], alternatives=5) == {
        "translatedText": ["A"],
        "alternatives": [["A!", "A!!", "A!!!", "A!!!!", "A!!!!!"]],
    }
    params = translate_lane.submitted[-1].params
    assert isinstance(params, BeamParams)
    assert (params.num_beams, params.num_return_sequences) == (6, 6)
    assert (await translate(client, " ", alternatives=2))["alternatives"] == []


async def test_auto(client: Client, translate_lane: FakeDecodeLane) -> None:
    answer = await translate(client, "나는 집에 간다", source="auto", target="en")
    assert answer["detectedLanguage"] == {"confidence": 100, "language": "ko"}
    answer = await translate(client, ["hello", "집에"], source=None)
    assert [each["language"] for each in answer["detectedLanguage"]] == ["en", "ko"]
    languages = translate_lane.tokenizer.languages
    assert [sequence.prompt_ids[1] for sequence in translate_lane.submitted] == [
        languages["en"],
        languages["ko"],
    ]
    # The second of the list is Korean already.
    assert answer["translatedText"] == ["HELLO", "집에"]


async def test_a_language_to_itself_stays_as_it_is(client: Client, translate_lane: FakeDecodeLane) -> None:
    assert await translate(client, "a b.\n", target="en") == {"translatedText": "a b.\n"}
    assert not translate_lane.submitted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"q": None}, "q: Field required"),
        ({"target": None}, "target: Field required"),
        ({"target": "fr"}, "target: no language 'fr'; there are en, ko"),
        ({"target": "auto"}, "target: no language 'auto'; there are en, ko"),
        ({"source": "fr"}, "source: no language 'fr'; there are en, ko"),
        ({"source": ""}, "source: no language ''; there are en, ko"),
        ({"format": "xml"}, "format is 'xml'; there are text, html"),
        ({"alternatives": -1}, "alternatives is -1, the limit is 0 to 7"),
        ({"alternatives": 8}, "alternatives is 8, the limit is 0 to 7"),
        ({"alternatives": "a"}, "alternatives: Input should be a valid integer"),
        ({"q": []}, "q has 0 texts, the limit is 1 to 64"),
        ({"q": ["a"] * 65}, "q has 65 texts, the limit is 1 to 64"),
        ({"q": "a" * 20_001}, "q has 20001 characters, the limit is 20000"),
        ({"q": ["a", "\ud800"]}, "q[1] has a lone surrogate at character 0"),
        ({"no_such": 1}, "unknown parameter: no_such"),
    ],
)
async def test_refusals(client: Client, values: dict[str, object], message: str) -> None:
    content = json.dumps({"q": "a", "source": "en", "target": "ko"} | values)
    answer = await client.post("/translate", content=content, headers={"content-type": "application/json"})
    assert check(answer, 400) == message


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (b"q=a&target=ko&alternatives=x", "alternatives: Input should be a valid integer"),
        (b"q=a&target=ko&target=en", "target: Input should be a valid string"),
        (b"q=%ff&target=ko", "the form is not valid UTF-8"),
        (b"q=\xff&target=ko", "the form is not valid UTF-8"),
        (b"q=a&" * 1001, "the form has more than 1000 fields"),
        (b"q=a&no_such=b", "unknown parameter: no_such"),
        (b"q=a", "target: Field required"),
        (b"target=ko", "q: Field required"),
    ],
)
async def test_refusals_of_forms(client: Client, form: bytes, message: str) -> None:
    assert check(await client.post("/translate", content=form, headers=FORM), 400) == message


async def test_a_form_whose_names_are_percent_encoded(client: Client) -> None:
    answer = await client.post("/translate", content=b"%71=a&%74arget=ko&source=en", headers=FORM)
    assert answer.json() == {"translatedText": "A"}


@pytest.mark.parametrize("path", ["/translate", "/detect"])
async def test_a_multipart_form_is_refused(client: Client, path: str) -> None:
    answer = await client.post(path, files={"q": (None, "a"), "target": (None, "ko")})
    assert check(answer, 400) == (
        "a multipart form is not understood; send application/json or application/x-www-form-urlencoded"
    )


async def test_refusals_of_queries(client: Client) -> None:
    answer = await client.post("/translate?q=a&target=ko&alternatives=many")
    assert check(answer, 400) == "alternatives: must be a whole number"
    answer = await client.post("/translate?q=a&target=ko&target=en")
    assert check(answer, 400) == "target has 2 values, it takes one"


async def test_without_a_query_an_empty_body_is_refused(client: Client) -> None:
    answer = await client.post("/translate")
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


async def test_a_full_queue(client: Client, translate_lane: FakeDecodeLane) -> None:
    translate_lane.pause_seconds = 30
    held = [Sequence([1], BeamParams()) for _ in range(16)]
    translate_lane.submit(held)
    answer = await client.post("/translate", data={"q": "a", "target": "ko"})
    assert "queue is full" in check(answer, 429)
    assert answer.headers["retry-after"] == "2"
    translate_lane.abort(held)


async def test_a_failed_step(client: Client, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.state.services.registry.translate.default.lane, "submit", lambda sequences: 1 / 0)
    answer = await client.post("/translate", data={"q": "a", "target": "ko"})
    assert check(answer, 500) == "internal error"


async def test_detect(client: Client) -> None:
    assert (await client.post("/detect", json={"q": "안녕"})).json() == [
        {"confidence": 100.0, "language": "ko"}
    ]
    (english,) = (await client.post("/detect", data={"q": "Where did you put the keys?"})).json()
    assert (english["language"], english["confidence"] > 50) == ("en", True)
    (french,) = (await client.post("/detect?q=Je vais à la maison avec mes amis.")).json()
    assert (french["language"], french["confidence"] > 50) == ("fr", True)


async def test_auto_refuses_what_nobody_here_knows(client: Client) -> None:
    answer = await client.post("/translate", data={"q": "Wo ist hier der Bahnhof, bitte?", "target": "ko"})
    assert "q is in German (de), as it seems, and there is no such direction" in check(answer, 400)


async def test_html(client: Client) -> None:
    answer = await translate(client, "<p>a &lt;</p>b<br/> c", format="html", alternatives=1)
    assert answer == {
        "translatedText": "<p>A &lt;</p>B<br/> C",
        "alternatives": ["<p>A &lt;!</p>B!<br/> C!"],
    }


async def test_refusals_of_detect(client: Client) -> None:
    assert check(await client.post("/detect"), 400) == "q: Field required"
    assert check(await client.post("/detect", json={"q": 3}), 400) == "q: Input should be a valid string"
    assert check(await client.post("/detect", json=[]), 400)
    assert check(
        await client.post("/detect", content=b"{", headers={"content-type": "application/json"}), 400
    )
    assert "20001 characters" in check(await client.post("/detect", data={"q": "a" * 20_001}), 400)
    assert check(await client.get("/detect"), 405)


async def test_languages(client: Client) -> None:
    expected = [
        {"code": "en", "name": "English", "targets": ["en", "ko"]},
        {"code": "ko", "name": "Korean", "targets": ["en", "ko"]},
    ]
    assert (await client.get("/languages")).json() == expected
    for method in ("GET", "POST"):  # older clients post
        answer = await client.request(method, "/languages", content=b"api_key=k", headers=FORM)
        assert answer.json() == expected


async def test_languages_of_a_model_that_is_not_loaded(client: Client, app: FastAPI) -> None:
    app.state.services.registry.translate.take("shout")
    assert "not loaded" in check(await client.get("/languages"), 404)
    assert "not loaded" in check(await client.post("/translate", json={"q": "a", "target": "ko"}), 404)


async def test_the_interface_is_described(client: Client) -> None:
    described = (await client.get("/openapi.json")).json()
    translate = described["paths"]["/translate"]["post"]
    assert set(translate["requestBody"]["content"]) == {
        "application/json",
        "application/x-www-form-urlencoded",
    }
    assert "400" in translate["responses"]
    schemas = described["components"]["schemas"]
    assert {"TranslateRequest", "LibreTranslateRequest", "LibreTranslation", "DetectRequest"} <= set(schemas)


async def test_an_unmodified_client(url: str) -> None:
    libretranslatepy = pytest.importorskip("libretranslatepy")
    api = libretranslatepy.LibreTranslateAPI(url, api_key="k")
    assert await asyncio.to_thread(api.translate, "I go & stay", "en", "ko") == "I GO & STAY"
    assert await asyncio.to_thread(api.translate, "집에", "auto", "en") == "집에"
    assert await asyncio.to_thread(api.detect, "집에") == [{"confidence": 100.0, "language": "ko"}]
    assert [each["code"] for each in await asyncio.to_thread(api.languages)] == ["en", "ko"]
    with pytest.raises(HTTPError) as refused:
        await asyncio.to_thread(api.translate, "a", "en", "fr")
    with refused.value as answer:
        assert (answer.code, json.load(answer)) == (
            *(400, {"error": "target: no language 'fr'; there are en, ko"}),
        )
