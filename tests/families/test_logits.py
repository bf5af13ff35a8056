"""Every family's logits are those of the reference library, in float32, padding and long rows included."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import CheckpointError, Folder
from model.models import CausalLM, MaskedLM, Translator
from tests.families.conftest import VOCAB, Pair

Make = Callable[[str], Pair]
N = 64  # the longest row that the models take

DECODERS = [
    *("gpt2", "gpt2-relu", "llama", "llama-biased-tied", "llama-llama3", "llama-linear", "llama-yarn"),
    *("mistral", "mistral-full", "qwen2", "qwen2-window", "qwen3"),
]
MASKED = ["bert", "bert-both", "roberta", "xlm-roberta", "distilbert"]
TRANSLATORS = ["marian", "m2m100", "mbart"]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def load(pair: Pair) -> Any:
    return Folder(pair.folder).model("cpu", torch.float32)


def rows(*shape: int) -> Tensor:
    """Ordinary token ids."""
    return torch.randint(8, VOCAB, shape, generator=torch.Generator().manual_seed(3))


def padded(pad_id: int) -> tuple[Tensor, Tensor]:
    """Three rows, the longest that the models take, one of them short, and the mask of what is real."""
    ids, real = rows(3, N), torch.ones(3, N, dtype=torch.long)
    ids[1, 40:], real[1, 40:] = pad_id, 0
    ids[2, 5:], real[2, 5:] = pad_id, 0
    return ids, real


def same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.5  # or the comparison says little
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder(pair: Make, name: str) -> None:
    found, ids = pair(name), rows(2, N)
    model = load(found)
    assert isinstance(model, CausalLM)
    same(model(ids), found.model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("name", MASKED)
def test_an_encoder(pair: Make, name: str) -> None:
    found = pair(name)
    model = load(found)
    assert isinstance(model, MaskedLM)
    ids, real = padded(model.config.pad_id)
    segments = (torch.arange(N) > 30).long().expand_as(ids) if model.config.n_segments > 1 else None
    extra = {} if segments is None else {"token_type_ids": segments}
    out = found.model(input_ids=ids, attention_mask=real, **extra)
    logits = out.logits if "logits" in out else out.prediction_logits
    same(model.mlm_head(model.encode(ids, segments))[real.bool()], logits[real.bool()])


@pytest.mark.parametrize("name", ["bert-both", "bert-next"])
def test_the_next_sentence(pair: Make, name: str) -> None:
    """Their first class is that the sentence follows, ours the second."""
    found = pair(name)
    model = load(found)
    ids, real = padded(0)
    segments = (torch.arange(N) > 30).long().expand_as(ids)
    out = found.model(input_ids=ids, attention_mask=real, token_type_ids=segments)
    logits = out.logits if "logits" in out else out.seq_relationship_logits
    same(model.nsp_head(model.encode(ids, segments)).flip(-1), logits)


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_translator(pair: Make, name: str) -> None:
    found = pair(name)
    model = load(found)
    assert isinstance(model, Translator)
    ids, real = padded(model.config.pad_id)
    tgt = rows(3, N).flip(0)
    same(model(ids, tgt), found.model(input_ids=ids, attention_mask=real, decoder_input_ids=tgt).logits)


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
def test_a_window_matters(pair: Make, name: str) -> None:
    found, ids = pair(name), rows(1, N)
    model = load(found)
    before = model(ids)
    model.decoder.window = N
    after = model(ids)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-2)


def test_shards_load_like_one_file(pair: Make, tmp_path: Path) -> None:
    found = pair("llama")
    found.model.save_pretrained(tmp_path, max_shard_size="20KB")
    folder = Folder(tmp_path)
    assert len(folder.files) > 2
    one, many = load(found), folder.model("cpu", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))
    folder.files[1].unlink()
    with pytest.raises(CheckpointError, match=r"no such file, but model\.safetensors\.index\.json names it"):
        Folder(tmp_path).model("cpu", torch.float32)


def test_an_index_stays_in_its_folder(pair: Make, tmp_path: Path) -> None:
    shutil.copy(pair("llama").folder / "config.json", tmp_path)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file beside it"):
        _ = Folder(tmp_path).files


def test_weights_arrive_in_the_number_format_asked_for(pair: Make) -> None:
    model = Folder(pair("gpt2").folder).model("cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_names_of_the_bare_model_are_understood(pair: Make, tmp_path: Path) -> None:
    """The oldest checkpoints leave out the prefix, and carry buffers."""
    found = pair("gpt2")
    tensors = load_file(found.folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, N, N)
    shutil.copy(found.folder / "config.json", tmp_path)
    save_file(bare, tmp_path / "model.safetensors")
    ids = rows(1, N)
    same(Folder(tmp_path).model("cpu", torch.float32)(ids), found.model(input_ids=ids).logits)


def test_norms_of_old_checkpoints(pair: Make, tmp_path: Path) -> None:
    found = pair("bert")
    tensors = load_file(found.folder / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    shutil.copy(found.folder / "config.json", tmp_path)
    save_file(renamed, tmp_path / "model.safetensors")
    ids = rows(1, N)
    model: Any = Folder(tmp_path).model("cpu", torch.float32)
    same(model.mlm_head(model.encode(ids)), found.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type: 'mamba' is not supported; there are .*gpt2"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "architectures: .* is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is not"),
        ("gpt2", {"activation_function": "mish"}, "activation_function: 'mish' is not supported"),
        ("gpt2", {"n_layer": "3"}, "n_layer: '3' is not a whole number"),
        ("gpt2", {"n_embd": None}, "missing key: n_embd"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: quantised checkpoints"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}},
            "rope_type: 'dynamic' is not supported",
        ),
        ("qwen2-window", {"layer_types": ["sliding_attention"] + ["full_attention"] * 2}, "layer_types: "),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder: True is not supported"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings: False"),
        ("marian", {"decoder_ffn_dim": 8}, "decoder_ffn_dim: 8 is not supported, only 48"),
        ("marian", {"eos_token_id": [2, 3]}, "eos_token_id: a translator with several ends"),
        ("m2m100", {"d_model": 30}, "d_model: 30 is not a multiple of n_heads 4"),
    ],
)
def test_what_is_not_supported_is_named(
    pair: Make, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(pair(name).folder, tmp_path / name))
    (folder / "generation_config.json").unlink(missing_ok=True)  # which would have the last word on ids
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError, match=message):
        _ = Folder(folder).config


def test_a_pickle_is_refused(pair: Make, tmp_path: Path) -> None:
    shutil.copy(pair("gpt2").folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle, which can run code"):
        _ = Folder(tmp_path).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": torch.zeros(2)}, r"unknown tensor extra\.weight"),
        ({"model.layers.7.mlp.up_proj.weight": torch.zeros(48, 32)}, r"unknown tensor model\.layers\.7"),
        ({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}, r"unknown tensor model\.layers\.0.*bias"),
        ({"model.norm.weight": torch.zeros(8)}, r"model\.norm\.weight has shape \(8,\), .* wants \(32,\)"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "norm.weight holds I8, not floating"),
        ({"model.norm.weight": None}, r"missing tensor decoder\.norm\.weight \(1 in all\)"),
    ],
)
def test_tensors_that_do_not_fit(pair: Make, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(pair("llama").folder, tmp_path / "llama"))
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Folder(folder).model("cpu", torch.float32)
