"""How the engine grows: the formula, and the command on a tiny model."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from benchmarks import growth
from benchmarks.growth import cache_bytes_per_token
from benchmarks.workload import TINY, decoder_config, make_folder
from model.models import make_cache
from tests.tiny import tiny_config


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_formula_is_the_size_of_the_cache(dtype: torch.dtype, itemsize: int) -> None:
    config = tiny_config("causal_lm", n_kv_heads=2)
    cache = make_cache(config, 3, 50, "cpu", dtype)
    assert cache.n_bytes == 3 * 50 * cache_bytes_per_token(config, itemsize)


def test_the_command_prints_a_table_an_axis(capsys: pytest.CaptureFixture[str]) -> None:
    growth.main(["--tiny", "--device", "cpu", "--threads", "1", "--parts", "rows", "context", "vocabulary"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    points = [row for row in rows if row[0][2:].isdigit()]
    assert [row[0] for row in points] == ["| 1", "| 8", "| 64", "| 256", "| 1000", "| 4000"]
    for row in points:
        assert float(row[1]) > 0
    for first in points[::2]:
        assert first[3] == "1.00 |"


def test_a_process_tells_what_it_holds_with_full_rows(tmp_path: Path) -> None:
    config = decoder_config(**TINY, n_decoder_layers=1, max_len=32)
    folder = make_folder(tmp_path / "model", config)
    ours, theirs = multiprocessing.Pipe()
    settings = {"device": "cpu", "n_threads": 1, "generate_slots": 2}
    growth._fill_and_tell(theirs, folder, config, settings, 2)
    assert 0 < ours.recv() <= growth.resident_bytes() * 2
