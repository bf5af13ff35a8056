"""The service with its real engine, on tiny random models; and what start-up refuses."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from app.api.deps import Services
from app.lifecycle import Lifecycle
from app.main import StartError, create_app, load_services
from app.settings import Settings
from model.checkpoint import CheckpointError, load_config, save
from model.config import TransformerConfig
from model.models import build_model
from model.shortlist import Shortlist, Table
from tests.app.fakes import make_settings, word_tokenizer

Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("weights"), word_tokenizer()
    shape = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_heads": 2, "d_ff": 64, "max_len": 64}
    for config in (
        TransformerConfig("translator", n_encoder_layers=1, n_decoder_layers=1, **shape),  # type: ignore[arg-type]
        TransformerConfig("masked_lm", n_encoder_layers=1, n_segments=2, **shape),  # type: ignore[arg-type]
        TransformerConfig("causal_lm", n_decoder_layers=1, **shape),  # type: ignore[arg-type]
    ):
        save(folder / config.architecture, build_model(config), tokenizer)
    return folder


@pytest.fixture
async def client(weights: Path) -> AsyncIterator[Client]:
    settings = make_settings(
        translate_model=weights / "translator",
        fill_mask_model=weights / "masked_lm",
        generate_model=weights / "causal_lm",
        n_threads=1,
        device="cpu",
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with Client(transport=transport, base_url="http://test") as client:
            yield client


async def test_every_route(client: Client) -> None:
    assert (await client.get("/ready")).status_code == 200
    parameters = {
        "max_new_tokens": 5,
        "num_return_sequences": 2,
        "return_alignment": True,
        "return_scores": True,
    }
    translations = await client.post("/translate", json={"inputs": "Home. 집\n", "parameters": parameters})
    assert [entry["translation_text"].endswith("\n") for entry in translations.json()] == [True, True]
    fillings = await client.post(
        "/fill-mask", json={"inputs": "나는 [MASK] [MASK]", "parameters": {"top_k": 3}}
    )
    assert [len(mask) for mask in fillings.json()] == [3, 3]
    pair = await client.post("/next-sentence", json={"inputs": {"first": "home", "second": "집"}})
    assert 0 <= pair.json()["score"] <= 1
    await check_generation(client)


async def test_a_model_that_knows_nothing_keeps_what_it_must(client: Client) -> None:
    """Random weights say noise, and in it every address, number, term and tag."""
    text = (
        "<p>Go to <a href='x'>http://a.b/c</a> with <b>27</b> old pens.<br>Ask <code>me()</code> at home.</p>"
    )
    parameters = {"format": "html", "glossary": {"pens": "연필"}, "num_return_sequences": 2, "src_lang": "en"}
    answer = await client.post("/translate", json={"inputs": text, "parameters": parameters})
    found = answer.json()
    for each in found:
        assert "unmet" not in each, each
        for kept in ("http://a.b/c", "27", "연필", "<code>me()</code>", "<a href='x'>", "</b>", "<br>"):
            assert each["translation_text"].count(kept) == 1, (kept, each)
    assert 1 <= len({each["translation_text"] for each in found}) == len(found) <= 2


async def check_generation(client: Client) -> None:
    parameters = {"max_new_tokens": 8, "seed": 5, "do_sample": True, "details": True, "top_n_tokens": 2}
    body = {"inputs": "나는 home", "parameters": parameters | {"decoder_input_details": True}}
    whole = (await client.post("/generate", json=body)).json()
    details = whole["details"]
    assert "".join(token["text"] for token in details["prefill"]) == "나는 home"
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in details["prefill"][1:])
    streamed = await client.post("/generate_stream", json={"inputs": "나는 home", "parameters": parameters})
    events = [json.loads(event.removeprefix("data:")) for event in streamed.text.split("\n\n") if event]
    assert [event["token"]["id"] for event in events] == [token["id"] for token in details["tokens"]]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["generated_tokens"] == len(events)


async def test_completions(client: Client) -> None:
    sampled = {"prompt": ["나는 home", "집"], "max_tokens": 8, "n": 2, "seed": 5, "logprobs": 2, "echo": True}
    whole = (await client.post("/v1/completions", json=sampled)).json()["choices"]
    prompts = ["나는 home"] * 2 + ["집"] * 2
    assert all(c["text"].startswith(prompt) for c, prompt in zip(whole, prompts, strict=True))
    streamed = await client.post("/v1/completions", json=sampled | {"stream": True})
    *events, last = [event.removeprefix("data: ") for event in streamed.text.split("\n\n") if event]
    assert last == "[DONE]"
    for choice in whole:
        chunks = [
            c for event in events for c in json.loads(event)["choices"] if c["index"] == choice["index"]
        ]
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        tokens = [token for chunk in chunks for token in chunk["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert all(logprob < 0 for logprob in choice["logprobs"]["token_logprobs"])
    # A token that can never be drawn has no finite log-probability; JSON has no infinity.
    ids = [*word_tokenizer().encode("집"), word_tokenizer().mask_id]
    scored = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = await client.post("/v1/completions", json=scored)
    assert answer.json()["choices"][0]["logprobs"]["tokens"][-1] == "[MASK]"


async def test_libretranslate_and_tokens(client: Client) -> None:
    fields = {"q": "Home. 집\n", "source": "auto", "target": "en", "alternatives": "2"}
    answer = (await client.post("/translate", data=fields)).json()
    assert set(answer) == {"translatedText", "alternatives", "detectedLanguage"}
    assert len(answer["alternatives"]) <= 2
    spans = (await client.post("/tokenize", json={"inputs": "home school"})).json()
    assert "".join(span["text"] for span in spans) == "home school"


async def test_metrics_start_at_zero_in_spite_of_the_warm_up(client: Client) -> None:
    text = (await client.get("/metrics")).text
    counters = [line for line in text.splitlines() if line.startswith("transformer_") and "_total{" in line]
    assert len(counters) > 20
    assert all(line.endswith(" 0.0") for line in counters)


async def test_every_token_after_the_first_is_timed(client: Client) -> None:
    body = {"inputs": "home", "parameters": {"max_new_tokens": 4, "details": True}}
    answer = (await client.post("/generate", json=body)).json()
    metric = 'transformer_inter_token_seconds_count{endpoint="generate"}'
    text = (await client.get("/metrics")).text
    counted = next(line for line in text.splitlines() if line.startswith(metric))
    assert float(counted.removeprefix(metric)) == answer["details"]["generated_tokens"] - 1


async def test_a_trailing_slash_is_an_unknown_path(client: Client) -> None:
    answer = await client.post("/generate/", json={"inputs": "home"})
    assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found")


def test_a_folder_of_another_task_is_refused_by_name(weights: Path) -> None:
    folder = weights / "causal_lm"
    with pytest.raises(CheckpointError, match=f"{folder}: holds a causal_lm, translate takes a trans"):
        load_services(make_settings(translate_model=folder), Lifecycle())


@pytest.mark.parametrize("use_shortlist", [True, False])
def test_a_shortlist_may_be_left_aside(weights: Path, tmp_path: Path, *, use_shortlist: bool) -> None:
    folder = tmp_path / "translator"
    shutil.copytree(weights / "translator", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"languages": {"ko": 7}}))
    config = load_config(folder)
    one = np.array([config.eos_id])
    table = Table(one, one[:0], np.zeros(config.vocab_size + 1, dtype=np.int64))
    Shortlist({"ko": table}, config).save(folder)
    settings = make_settings(translate_model=folder, quantization="int8", use_shortlist=use_shortlist)
    task: Any = load_services(settings, Lifecycle()).tasks["translate"]
    lane = task.lane
    assert (lane.runner.shortlist is not None) is use_shortlist
    assert task.quantization == "int8"
    assert task.shortlist == (("ko",) if use_shortlist and lane.runner.kernels is not None else ())


@pytest.mark.parametrize("steps", ["plain", "static"])
async def test_a_known_sentence_is_translated_as_it_is_known(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str
) -> None:
    """By a model that knows nothing, over HTTP, also where steps are static; others are answered, too."""
    folder = tmp_path / "translator"
    shutil.copytree(weights / "translator", folder)
    values = json.loads((folder / "config.json").read_text())
    languages = word_tokenizer().languages
    (folder / "config.json").write_text(json.dumps(values | {"languages": languages, "example_weight": 0.95}))
    pairs = [
        ("Best regards,", "감사합니다. 안녕히 계세요"),
        ("Go home now.", "당장 집에 가."),
        ("The door is open.", "문이 열려 있다."),
    ]
    (tmp_path / "own.en-ko.tsv").write_text("".join(f"{en}\t{ko}\n" for en, ko in pairs))
    settings = make_settings(
        translate_model=folder,
        fill_mask_model="",
        generate_model="",
        classify_model="",
        examples=str(tmp_path / "own.en-ko.tsv"),
        cache_dir=tmp_path / "cache",
        n_threads=1,
        device="cpu",
    )

    def load(settings: Settings, lifecycle: Lifecycle) -> Services:
        services = load_services(settings, lifecycle)
        if steps == "static":
            lane: Any = services.tasks["translate"].lane
            lane.runner.make_static()
        return services

    app = create_app(settings, load)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with Client(transport=transport, base_url="http://test") as client:
            body = {"inputs": ["Best regards,", "당장 집에 가.", "Something else.", "The door is open."]}
            known, back, other, dutch = (await client.post("/translate", json=body)).json()
            info = (await client.get("/info")).json()
            text = (await client.get("/metrics")).text
    assert known["translation_text"] == "감사합니다. 안녕히 계세요"
    assert dutch["translation_text"] == "문이 열려 있다."  # English, though it looks like another language
    assert back["translation_text"] == "Go home now."
    assert "translation_text" in other
    assert info["tasks"]["translate"]["examples"] == 3
    assert 'transformer_with_examples_total{endpoint="translate",model="translator"} 3.0' in text
    assert list((tmp_path / "cache").iterdir())


def test_examples_that_were_asked_for_must_be_there(weights: Path, tmp_path: Path) -> None:
    settings = make_settings(translate_model=weights / "translator", examples=str(tmp_path / "none"))
    with pytest.raises(StartError, match=r"examples: .*none: no such file or folder"):
        load_services(settings, Lifecycle())


def test_a_folder_that_was_asked_for_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "none"
    with pytest.raises(CheckpointError, match=f"{missing}: no such folder"):
        load_services(make_settings(generate_model=missing), Lifecycle())


def test_default_folders_that_are_not_there_leave_their_tasks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_services(make_settings(), Lifecycle()).tasks == {}
