"""The 8-bit product in C, as a program of its own: for this processor, and in an emulator for another."""

import shutil
import subprocess
from pathlib import Path

import pytest

from model import kernels

_PROGRAM = Path(__file__).with_name("eight_bits.c")
_FLAGS = ["-std=gnu11", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror"]


def run(tmp_path: Path, compiler: list[str], flags: list[str], emulator: list[str]) -> str:
    program = tmp_path / "eight_bits"
    subprocess.run([*compiler, *_FLAGS, *flags, str(_PROGRAM), "-o", str(program), "-lm"], check=True)
    ended = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_every_output_is_right_to_the_last_bit(tmp_path: Path) -> None:
    compiler = kernels._compiler()
    native = kernels.compiled()
    if compiler is None or native is None:
        pytest.skip("no C compiler")
    said = run(tmp_path, compiler, ["-march=native"], [])
    assert said == f"{420 if native.has_int8 else 0} cases, panels of {native.panel}\n"


@pytest.mark.parametrize(
    ("extension", "panel", "n_cases"), [("armv8.2-a+dotprod", 16, 420), ("armv8-a", 0, 0)]
)
def test_on_arm(tmp_path: Path, extension: str, panel: int, n_cases: int) -> None:
    """Debian: `apt install gcc-aarch64-linux-gnu qemu-user`."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler for another processor, or no emulator of it")
    said = run(tmp_path, [compiler], [f"-march={extension}", "-static"], [emulator, "-cpu", "max"])
    assert said == f"{n_cases} cases, panels of {panel}\n"
