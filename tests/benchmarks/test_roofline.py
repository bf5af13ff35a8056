"""The bytes and the operations that a roofline counts, and the command on tiny models."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.roofline import LARGE, layer_weights, pass_operations, step_bytes
from benchmarks.workload import decoder_config
from model.block import WeightsTap
from model.models import CausalLM, MaskedLM
from tests.tiny import tiny_config


@pytest.mark.parametrize("changes", [{}, {"gated": True, "bias": False, "norm": "rms", "n_kv_heads": 2}])
def test_weights_of_the_layers_are_those_of_the_model(changes: dict[str, object]) -> None:
    config = tiny_config("causal_lm", **changes)
    model = CausalLM(config)
    matrices = [p.numel() for p in model.decoder.blocks.parameters() if p.dim() == 2]
    assert layer_weights(config) == sum(matrices)
    n_bytes = step_bytes(config, rows=3, context=10, weight=2, cache=4)
    cached = 2 * config.n_decoder_layers * config.kv_heads * config.head_dim
    assert n_bytes == 2 * (sum(matrices) + config.vocab_size * config.d_model) + 3 * 10 * 4 * cached


def test_operations_are_those_that_torch_counts() -> None:
    config = tiny_config("masked_lm")
    model, ids = MaskedLM(config).eval(), torch.randint(6, 40, (2, 16))
    # The readable attention: torch does not count its fused kernel on a CPU.
    with torch.no_grad(), WeightsTap(model), FlopCounterMode(display=False) as counted:
        model.encode(ids)
    assert pass_operations(config, 2, 16, causal=False) == counted.get_total_flops()


def test_the_large_shape_has_the_sizes_it_is_named_for() -> None:
    config = decoder_config(**LARGE)
    n_weights = layer_weights(config) + config.vocab_size * config.d_model
    assert 6.5e9 < n_weights < 7e9


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--tiny",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--shapes",
        "shipped",
        "7b",
        "--sequences",
        "1",
        "2",
    ]
    roofline.main(words)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    steps = [row for row in rows if "bytes" in row[0]]
    assert [row[1] for row in steps] == ["1", "2", "1", "2"]
    assert all(float(row[3]) > 0 for row in steps)
    assert any("prefill" in row[0] for row in rows)
    assert any("encoder" in row[0] for row in rows) == Path("weights/fill-mask").is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("words", [["--device", "cuda"], ["--device", "cpu", "--shapes", "7b"]])
def test_without_a_gpu_the_command_says_so(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        roofline.parse(words)
    assert ended.value.code


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--tiny", "--device", "cuda", "--sequences", "1", "2"])
    assert "copy bandwidth of the GPU" in capsys.readouterr().out
