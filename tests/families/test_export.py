"""Our models leave: the reference library loads what is exported, without a word, and computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.checkpoint import Checkpoint, load
from model.export import ExportError, export, main
from model.models import build_model
from model.tokenizer import Tokenizer
from tests.engine.rig import load_bold
from tests.families.conftest import Pair
from tests.tiny import TinyFolders, fitting_config

N = 64
WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def exported(checkpoint_: Checkpoint, folder: Path) -> tuple[Any, Any]:
    """The reference's model and tokenizer of a model that was exported."""
    from tests.families.reference import read_exported

    checkpoint.save(folder / "own", checkpoint_.model, checkpoint_.tokenizer, torch.float32)
    name = export(folder / "own", folder / "theirs")
    model, tokenizer, amiss = read_exported(name, folder / "theirs")
    assert amiss == {}
    return model, tokenizer


def rows(checkpoint_: Checkpoint) -> torch.Tensor:
    return torch.randint(20, checkpoint_.config.vocab_size, (2, N))


def test_a_decoder(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    ours = load_bold(tiny_folders.generate)
    model, tokenizer = exported(ours, tmp_path)
    ids = rows(ours)
    torch.testing.assert_close(model(ids).logits, ours.model(ids), atol=1e-4, rtol=0)
    text = "She opened the door. 나는"
    assert tokenizer(text)["input_ids"] == ours.tokenizer.prompt_ids(ours.tokenizer.encode(text))


def test_an_encoder(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    ours = load_bold(tiny_folders.fill_mask)
    model, tokenizer = exported(ours, tmp_path)
    ids = rows(ours)
    real = torch.ones_like(ids)
    ids[1, 40:], real[1, 40:] = ours.config.pad_id, 0
    found = model(ids, attention_mask=real).logits[real.bool()]
    wanted = ours.model.mlm_head(ours.model.encode(ids))[real.bool()]  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    text = "I drink [MASK] in the [MASK]."
    assert tokenizer(text)["input_ids"] == ours.tokenizer.masked_ids(text)[0]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_translator(tokenizer: Tokenizer, tmp_path: Path, norm_first: bool, activation: str) -> None:
    config = fitting_config("translator", tokenizer, norm_first=norm_first, activation=activation)
    ours = Checkpoint(build_model(config).eval(), tokenizer, config, "tiny", "0" * 64)
    model, their_tokenizer = exported(ours, tmp_path)
    src, tgt = rows(ours), rows(ours)
    found = model(input_ids=src, decoder_input_ids=tgt).logits
    torch.testing.assert_close(found, ours.model(src, tgt), atol=1e-4, rtol=0)
    ids = their_tokenizer("<tag:everyday><2ko>I go home.")["input_ids"]
    assert ids == tokenizer.source_ids(tokenizer.encode("I go home."), "ko")


def test_the_decoder_that_ships(tmp_path: Path) -> None:
    from tests.families.reference import read_exported

    folder = WEIGHTS / "generate"
    name = export(folder, tmp_path / "theirs")
    model, tokenizer, _ = read_exported(name, tmp_path / "theirs")
    ids = tokenizer("She opened the door and", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, load(folder).model(ids), atol=1e-4, rtol=0)


def test_a_translators_own_loop_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With transformers' own loop of generation, in words."""
    config = fitting_config("translator", tokenizer)
    ours = Checkpoint(build_model(config).eval(), tokenizer, config, "tiny", "0" * 64)
    model, their_tokenizer = exported(ours, tmp_path)
    ids = their_tokenizer("<tag:everyday><2ko>I go home.", return_tensors="pt")["input_ids"]
    start = tokenizer.languages["ko"]
    said = model.generate(ids, num_beams=2, max_new_tokens=20, decoder_start_token_id=start)[0]
    memory, mask = ours.model.encode(ids)  # type: ignore[operator]
    wanted = ours.model.head(ours.model.decode(said[None], memory, mask))  # type: ignore[operator]
    found = model(input_ids=ids, decoder_input_ids=said[None]).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    text = "나는 집에 간다."
    assert their_tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_the_translator_that_ships_stays(tmp_path: Path) -> None:
    """Pegasus does not turn its queries and keys."""
    with pytest.raises(ExportError, match="positions is 'rotary', but Pegasus"):
        export(WEIGHTS / "translate", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("causal_lm", {"positions": "learned"}, "positions is 'learned', but GPT-NeoX can do only 'rotary'"),
        ("causal_lm", {"positions": "rotary", "n_kv_heads": 2}, "n_kv_heads is 2"),
        ("causal_lm", {"positions": "rotary", "norm": "rms"}, "norm is 'rms'"),
        ("masked_lm", {"positions": "sinusoidal"}, "positions is 'sinusoidal', but ESM"),
        ("masked_lm", {"positions": "rotary", "norm_first": False}, "norm_first is False"),
        ("translator", {"gated": True}, "gated is True, but Pegasus"),
    ],
)
def test_what_no_class_computes(
    tokenizer: Tokenizer, tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    model = build_model(fitting_config(architecture, tokenizer, **changes))
    checkpoint.save(tmp_path / "own", model, tokenizer)
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "own", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_came_from_there_is_not_exported(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="only whole models in this project's own layout"):
        export(pair("gpt2").folder, tmp_path / "out")


def test_the_command(tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_folders.generate), str(tmp_path / "out")])
    assert "loads as GPTNeoXForCausalLM" in capsys.readouterr().out
    for arguments, message in (
        ([str(tiny_folders.generate), str(tmp_path / "out")], "is there already"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "new")], r"config\.json: no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
