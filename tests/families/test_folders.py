"""Whole folders, weights and tokenizer together: loading, inspecting, converting, serving."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.engine.memory import held_bytes, int8_bytes
from app.inspection import inspect_folder
from app.main import create_app
from app.settings import Settings
from model.checkpoint import CheckpointError, load
from model.convert import convert, main
from model.inference import optimise
from model.languages import find_language, iso_code, language_name
from tests.tiny import TinyFolders

Folders = Callable[[str], Path]
# A model, and the tokenizer that goes with it.
WHOLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "gpt2", {"bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("llama", "llama", {"bos_token_id": 1, "eos_token_id": [2, 5]}),
    "qwen3": ("qwen3", "qwen2", {"bos_token_id": None, "eos_token_id": 0}),
    "mistral": ("mistral", "llama", {"bos_token_id": 1, "eos_token_id": 2}),
    "bert": ("bert-both", "bert", {}),
    "bert-next": ("bert-next", "bert", {}),
    "distilbert": ("distilbert", "distilbert", {}),
    "roberta": ("roberta", "roberta", {}),
    "xlm-roberta": ("xlm-roberta", "xlm-roberta", {}),
    "bert-classes": ("bert-classes", "bert", {}),
    "roberta-classes": ("roberta-classes", "roberta", {}),
    "nllb": ("m2m100", "nllb", {}),
    "m2m100": ("m2m100", "m2m100", {}),
    "mbart": ("mbart", "mbart50", {}),
    "marian": (
        "marian",
        "marian",
        {"eos_token_id": 0, "pad_token_id": 619, "decoder_start_token_id": 619},
    ),
}
VOCAB = 620


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A folder as people have it, by its name in `WHOLE`: the older files of its tokenizer."""
    from tests.families import reference, tokenizers

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            case, kind, changes = WHOLE[name]
            folder = tmp_path_factory.mktemp("whole") / name
            folder.mkdir()
            tokenizers.KINDS[kind].make(folder)
            reference.save(reference.CASES[case].make(VOCAB, **changes), folder)
            made[name] = folder
        return made[name]

    return make


@pytest.mark.parametrize("name", WHOLE)
def test_a_folder_loads_is_inspected_and_converts(whole: Folders, tmp_path: Path, name: str) -> None:
    loaded = load(whole(name))
    lines, fits = inspect_folder(whole(name), Settings())
    assert fits
    assert f"parameters: {sum(p.numel() for p in loaded.model.parameters()):,}" in lines
    estimate = int8_bytes(loaded.config)
    convert(whole(name), tmp_path / "own")
    again = load(tmp_path / "own")
    assert again.config == loaded.config
    assert again.tokenizer.encode("I go home. 나는") == loaded.tokenizer.encode("I go home. 나는")
    for (ours, a), (theirs, b) in zip(
        loaded.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert ours == theirs
        assert torch.equal(a, b)
    assert inspect_folder(tmp_path / "own", Settings())[1]
    optimise(again.model, "int8")
    assert 0.8 * estimate < held_bytes([again.model]) <= estimate  # without biases, which it does not count


@pytest.mark.parametrize("name", ["bert-classes", "roberta-classes"])
def test_classes_are_those_of_the_reference(whole: Folders, name: str) -> None:
    from tests.families import reference

    loaded = load(whole(name))
    assert loaded.config.labels == ["bad", "so-so", "good"]
    theirs = reference.CASES[WHOLE[name][0]].make(VOCAB)
    ids = torch.tensor([loaded.tokenizer.text_ids("I go home."), loaded.tokenizer.text_ids("She opened")][:1])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids), theirs(input_ids=ids).logits, atol=1e-4, rtol=0)


def named(whole: Folders, *names: str) -> str:
    return ",".join(f"{name}={whole(name)}" for name in names)


async def test_every_endpoint_serves_them(whole: Folders) -> None:
    """Over HTTP: what comes back has the right shape, and what a model cannot do is refused by name."""
    app = create_app(
        Settings(
            n_threads=1,
            generate_slots=4,
            translate_slots=8,
            translate_model=named(whole, "nllb", "m2m100", "mbart", "marian"),
            fill_mask_model=named(whole, "bert", "roberta", "xlm-roberta", "distilbert", "bert-next"),
            generate_model=named(whole, "gpt2", "llama", "qwen3", "mistral"),
            classify_model=named(whole, "bert-classes", "roberta-classes"),
        )
    )
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):

        async def ask(path: str, model: str, inputs: Any, **parameters: Any) -> Any:
            body = {"inputs": inputs, "model": model, "parameters": parameters}
            answer = await client.post(path, json=body)
            return answer.json() if answer.status_code == 200 else answer.json()["error"]

        # The same direction, by the model's own codes and by ISO's.
        for model, src, tgt in (
            ("nllb", "eng_Latn", "kor_Hang"),
            ("m2m100", "en", "ko"),
            ("mbart", "en_XX", "ko_KR"),
            ("marian", "en", "ko"),
        ):
            own = await ask("/translate", model, "I go home.", src_lang=src, tgt_lang=tgt, max_new_tokens=9)
            iso = await ask(
                "/translate", model, "I go home.", src_lang="en", tgt_lang="kor", max_new_tokens=9
            )
            assert own == iso == [{"translation_text": own[0]["translation_text"], "finish_reason": "length"}]
        other = await ask("/translate", "nllb", "I go home.", src_lang="en", tgt_lang="zh", max_new_tokens=9)
        mine = await ask("/translate", "nllb", "I go home.", src_lang="en", tgt_lang="ko", max_new_tokens=9)
        assert other != mine
        refused = await ask("/translate", "marian", "나는 집에 간다.", src_lang="ko", tgt_lang="en")
        assert "no language 'ko'; there are en" in refused
        languages = (await client.get("/languages?model=marian")).json()
        assert [each["code"] for each in languages] == ["en", "ko"]

        for model, mask in (
            ("bert", "[MASK]"),
            ("distilbert", "[MASK]"),
            ("roberta", "<mask>"),
            ("xlm-roberta", "<mask>"),
        ):
            fillings = await ask("/fill-mask", model, f"I go {mask}.", top_k=3)
            assert len(fillings) == 3
            assert all(each["sequence"].startswith("I go") for each in fillings)
            assert "has no mask" in await ask("/fill-mask", model, "I go home.")
        pair = {"first": "I was hungry.", "second": "So I made a sandwich."}
        for model in ("bert", "bert-next"):
            assert 0 <= (await ask("/next-sentence", model, pair))["score"] <= 1
        assert "no head that tells" in await ask("/next-sentence", "roberta", pair)
        assert "no head that fills masks" in await ask("/fill-mask", "bert-next", "I go [MASK].")

        for model in ("gpt2", "llama", "qwen3", "mistral"):
            whole_text = await ask("/generate", model, "I go home", max_new_tokens=5)
            assert whole_text["generated_text"]
            assert await ask("/generate", model, "I go home", max_new_tokens=5) == whole_text
        for model in ("bert-classes", "roberta-classes"):
            scores = await ask("/classify", model, "I go home.")
            assert {each["label"] for each in scores} == {"bad", "so-so", "good"}
            assert sum(each["score"] for each in scores) == pytest.approx(1, abs=1e-5)


async def test_a_row_holds_no_more_than_is_allowed(whole: Folders) -> None:
    app = create_app(
        Settings(
            generate_model=str(whole("gpt2")),
            translate_model=str(whole("marian")),
            max_context=16,
            n_threads=1,
        )
    )
    async with app.router.lifespan_context(app):
        task = app.state.services.registry.generate.default
        assert task.lane.limits.max_prompt_tokens + 1 == task.lane.runner.cache.max_len == 16


def test_what_an_inspection_says(whole: Folders, tiny_folders: TinyFolders, tmp_path: Path) -> None:
    lines, _ = inspect_folder(whole("nllb"), Settings())
    assert lines[:3] == [
        "published model: m2m_100 (M2M100ForConditionalGeneration)",
        "translator, for translate",
        "3 encoder layers, 2 decoder layers, width 32, 4 heads of 8, 64 positions",
    ]
    assert "tokenizer: 620 ids; languages: ace_Arab eng_Latn kor_Hang zho_Hans zho_Hant" in lines
    assert inspect_folder(tiny_folders.translate, Settings())[1]
    broken = Path(shutil.copytree(whole("gpt2"), tmp_path / "broken"))
    values = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(values | {"n_layer": 4}))
    lines, fits = inspect_folder(broken, Settings())
    assert not fits
    assert "missing tensor decoder.blocks.3" in lines[-1]
    assert "cannot be served" in lines[-1]


def test_the_commands(whole: Folders, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "app", "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "config.json: no such file" in run.stdout
    main([str(whole("gpt2")), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert load(tmp_path / "out").config == load(whole("gpt2")).config
    with pytest.raises(SystemExit, match="is there already"):
        main([str(whole("gpt2")), str(tmp_path / "out")])
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nowhere", tmp_path / "new")


def test_languages_by_many_names() -> None:
    nllb = ["ace_Arab", "arb_Arab", "eng_Latn", "kor_Hang", "zho_Hans", "zho_Hant"]
    for code, wanted in {
        "kor_Hang": "kor_Hang",
        "KOR-hang": "kor_Hang",
        "ko": "kor_Hang",
        "kor": "kor_Hang",
        "ar": "arb_Arab",
        "zh": "zho_Hans",
        "zh-Hant": "zho_Hant",
        "ace": "ace_Arab",
        "ace_Latn": None,
        "fr": None,
        "": None,
    }.items():
        assert find_language(code, nllb) == wanted, code
    assert find_language("en-US", ["en", "ko"]) == "en"
    assert find_language("eng_Latn", ["en_XX", "ko_KR"]) is None
    assert (iso_code("ko_KR"), iso_code("pes_Arab"), iso_code("ast")) == ("ko", "fa", "ast")
    assert language_name("zho_Hant") == "Chinese (Hant)"
    assert (language_name("ko_KR"), language_name("ace_Arab")) == ("Korean", "ace_Arab")
