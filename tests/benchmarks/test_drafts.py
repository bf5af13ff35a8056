from __future__ import annotations

import pytest

from benchmarks.drafts import Tally, circling, count_steps, find_draft, main
from benchmarks.workload import TINY, decoder_config, make_folder


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 9, 2, 3], [9, 2]),  # two tokens before
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], [7, 2]),  # three that match go before two that are nearer
        ([5, 6, 1, 5, 6, 2, 5, 6], [2, 5]),  # of the same length the nearest
        ([4, 4, 4], [4]),
        ([1], []),
    ],
)
def test_find_draft(tokens: list[int], draft: list[int]) -> None:
    assert find_draft(tokens, 2) == draft


def test_count_steps() -> None:
    assert count_steps([1, 2], [3, 4, 5], 4) == Tally(3, 3, 0)
    # 3; then 1, 2; what followed them, 3 1 2, is right but for the last token, which a step gives by itself.
    assert count_steps([1, 2, 3], [1, 2, 3, 1, 2], 4) == Tally(5, 3, 1)
    assert count_steps([1, 2, 3], [1, 2, 9, 8], 4) == Tally(4, 4, 1)


def test_circling() -> None:
    assert circling(range(20)) == 0
    assert circling([1, 2, 3] * 4) == 4


def test_the_command(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path_factory.mktemp("weights") / "model", decoder_config(**TINY))
    words = ["--weights", str(folder), "--length", "12", "--steps", "2", "--rounds", "1", "--device", "cpu"]
    main(words)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| greedy", "| drawn"))]
    assert len(rows) == 3
    assert all(0 < float(row.split("|")[5]) <= 5 for row in rows)
