"""The whole service on tiny models: two of one endpoint, and one that takes another's place under load."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from app.engine.errors import NoRoom
from app.keys import key_line, make_key
from app.lifecycle import Lifecycle
from app.main import StartError, create_app, load_services
from model import checkpoint
from model.models import build_model
from model.tokenizer import Tokenizer
from tests.app.fakes import make_settings
from tests.tiny import TinyFolders, fitting_config

Client = httpx.AsyncClient

ADMIN = make_key()
PROMPTS = ["I go home.", "나는", "The old dog", "Where did you", "She reads a book", ""]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tiny_folders: TinyFolders) -> Path:
    """Two language models that go on differently, a translator, a masked model, and a folder cut short."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        model = build_model(fitting_config("causal_lm", tokenizer, positions="rotary"))
        for parameter in model.parameters():
            parameter.data.mul_(3)  # bolder, so that the two do not say the same by chance
        checkpoint.save(root / name, model, tokenizer, dtype=torch.float32)
    (root / "cut").mkdir()
    for file in (root / "new").iterdir():
        whole = file.read_bytes()
        (root / "cut" / file.name).write_bytes(whole[:-9] if file.suffix == ".safetensors" else whole)
    shutil.copytree(tiny_folders.translate, root / "translate")
    shutil.copytree(tiny_folders.fill_mask, root / "fill-mask")
    return root


@pytest.fixture
async def app(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FastAPI]:
    monkeypatch.chdir(tmp_path)  # where no default folders are
    settings = make_settings(
        generate_model=f"main={root / 'old'}, other={root / 'new'}",
        translate_model=root / "translate",
        fill_mask_model=f"masks={root / 'fill-mask'}",
        model_roots=str(root),
        api_keys=f"{key_line('boss', ADMIN, admin=True)}",
        generate_slots=4,
        n_threads=1,
        device="cpu",
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[Client]:
    headers = {"x-api-key": ADMIN}
    async with Client(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers) as client:
        yield client


async def generate(client: Client, prompt: str, model: str | None, *, stream: bool = False) -> str:
    body: dict[str, Any] = {"inputs": prompt, "parameters": {"max_new_tokens": 12}, "stream": stream}
    answer = await client.post("/generate", json=body | ({} if model is None else {"model": model}))
    assert answer.status_code == 200, answer.text
    if not stream:
        return str(answer.json()["generated_text"])
    events = [json.loads(event.removeprefix("data:")) for event in answer.text.split("\n\n") if event]
    text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert text == events[-1]["generated_text"]
    return text


async def complete(client: Client, prompt: str, model: str) -> str:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = await client.post(f"/models/{model}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def put(client: Client, name: str, folder: str, endpoint: str = "generate") -> httpx.Response:
    return await client.post(
        "/admin/models", json={"endpoint": endpoint, "name": name, "folder": folder}, timeout=60
    )


async def expected(client: Client) -> dict[str, tuple[str, str]]:
    """For each prompt what the old and the new model say."""
    answers = {p: (await generate(client, p, "main"), await generate(client, p, "other")) for p in PROMPTS}
    assert all(old != new for old, new in answers.values())
    return answers


async def test_two_models_of_one_endpoint(client: Client) -> None:
    answers = await expected(client)
    for prompt, (old, new) in answers.items():
        assert await generate(client, prompt, None) == await complete(client, prompt, "main") == old
        assert await complete(client, prompt, "other") == new
    mixed = await asyncio.gather(
        *(generate(client, prompt, name) for prompt in PROMPTS for name in ("main", "other"))
    )
    assert mixed == [text for prompt in PROMPTS for text in answers[prompt]]
    info = (await client.get("/info")).json()["models"]
    assert {endpoint: list(models) for endpoint, models in info.items()} == {
        "translate": ["translate"],
        "fill-mask": ["masks"],
        "generate": ["main", "other"],
    }
    text = (await client.get("/metrics")).text
    for name in ("main", "other"):
        series = f'transformer_generated_tokens_total{{endpoint="generate",model="{name}"}} '
        assert float(text.partition(series)[2].splitlines()[0]) > 12


async def test_a_swap_under_load_loses_nothing_and_mixes_nothing(client: Client, app: FastAPI) -> None:
    answers = await expected(client)
    swapped = asyncio.Event()
    seen: dict[str, int] = {"old": 0, "new": 0}
    errors: list[str] = []

    async def ask(number: int) -> None:
        n_after = 0
        while n_after < 4:  # until well after the swap
            prompt = PROMPTS[number % len(PROMPTS)]
            n_after += swapped.is_set()
            was_swapped = swapped.is_set()
            if number % 3 == 0:
                text = await complete(client, prompt, "main")
            else:
                text = await generate(client, prompt, "main", stream=number % 3 == 1)
            old, new = answers[prompt]
            if text not in (old, new) or (was_swapped and text != new):
                errors.append(f"{prompt!r} gave {text!r}, not {old!r} or {new!r}")
            seen["new" if text == new else "old"] += 1

    asking = [asyncio.create_task(ask(number)) for number in range(12)]
    await asyncio.sleep(0.2)
    broken = await put(client, "main", "cut")
    assert (broken.status_code, "model.safetensors" in broken.json()["error"]) == (422, True)
    assert not any(task.done() for task in asking)
    answer = await put(client, "main", "new")
    swapped.set()
    assert answer.status_code == 201, answer.text
    await asyncio.wait_for(asyncio.gather(*asking), 120)
    assert errors == []
    assert seen["old"] >= 12
    assert seen["new"] >= 12 * 4
    registry = app.state.services.registry
    async with asyncio.timeout(10):
        while registry.leaving:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(registry.worker.lanes) == 4
    text = (await client.get("/metrics")).text
    models = [
        line for line in text.splitlines() if line.startswith('transformer_model_info{endpoint="generate"')
    ]
    named = [line for line in models if 'name="main"' in line or 'name="other"' in line]
    assert len(named) == 2
    assert len({line.partition("sha256")[2] for line in named}) == 1  # both names have the new one now
    for gauge in ("queue_items", "queue_tokens", "rows_in_use"):
        assert f'transformer_{gauge}{{endpoint="generate",model="main"}} 0.0' in text


async def test_other_endpoints_too(client: Client) -> None:
    assert (await put(client, "translate", "translate", "translate")).status_code == 201
    assert (await put(client, "second", "fill-mask", "fill-mask")).status_code == 201
    body = {"inputs": "I [MASK] home.", "parameters": {"top_k": 2}}
    first = (await client.post("/models/masks", json=body)).json()
    assert first == (await client.post("/fill-mask", json=body | {"model": "second"})).json()
    pair = {"inputs": {"first": "I go home.", "second": "나는"}, "model": "second"}
    assert (await client.post("/next-sentence", json=pair)).status_code == 200
    assert (await client.post("/translate", json={"inputs": "I go home."})).status_code == 200
    wrong = await put(client, "main", "translate")
    assert (wrong.status_code, "holds a translator, generate takes a causal_lm" in wrong.json()["error"]) == (
        422,
        True,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"generate_model": "a={0}/old,b={0}/new", "max_models": 1},
            "generate_model names 2 models, max_models is 1",
        ),
        (
            {"generate_model": "a={0}/old", "max_model_bytes": 1000},
            r"old needs \d+ bytes .* max_model_bytes 1000",
        ),
    ],
)
def test_what_cannot_start(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {name: v.format(root) if isinstance(v, str) else v for name, v in values.items()}
    with pytest.raises((StartError, NoRoom), match=message):
        load_services(make_settings(**folders, device="cpu", n_threads=1), Lifecycle())
