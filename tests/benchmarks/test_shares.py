"""Where a step's time goes, on tiny models."""

import re

import pytest

from benchmarks import shares


@pytest.mark.parametrize("task", ["generate", "translate"])
def test_the_shares_of_a_step_are_a_whole(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    shares.main(["--tiny", "--task", task, "--device", "cpu", "--threads", "1", "--sequences", "2"])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2"))
    _, step, operations, outside = (cell.strip() for cell in row.strip("|").split("|"))
    assert float(step) > 0
    listed = [int(share) for share in re.findall(r" (\d+)%", operations)]
    assert listed == sorted(listed, reverse=True)
    assert 0 < sum(listed) + int(outside.removesuffix("%")) <= 105  # the ten largest, rounded
