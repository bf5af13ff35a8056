"""The head of every table: on what, and with which versions, it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from app import __version__


def head(command: str, *packages: str, notes: tuple[str, ...] = ()) -> str:
    """Lines of markdown: command, date, machine, versions, notes."""
    found = [f"{name} {_version(name)}" for name in ("torch", *packages)]
    lines = [
        f"`{command}`",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, transformer-server {__version__}{_commit()}",
        f"- {device_name()}",
        f"- Python {platform.python_version()}, {', '.join(found)}",
        f"- load of the machine at the start: {os.getloadavg()[0]:.1f} (one-minute mean)",
        *(f"- {note}" for note in notes),
        "",
    ]
    return "\n".join(lines)


def device_name() -> str:
    """The processor, its usable cores and memory, and the GPU where there is one."""
    text = f"{_processor()}, {n_cores()} cores, {_memory_gib():.0f} GiB, {platform.system()}"
    if torch.cuda.is_available():
        text += f"; {torch.cuda.get_device_name()}, driver CUDA {torch.version.cuda}"
    return text


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def read_bandwidth(n_threads: int, n_bytes: int = 512 * 2**20, rounds: int = 5) -> float:
    """Bytes a second that `n_threads` threads read from memory: the best of some sums over a large buffer."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    buffer = torch.ones(n_bytes // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        buffer.sum()
        best = max(best, n_bytes / (time.perf_counter() - started))
    torch.set_num_threads(before)
    return best


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that is checked out, with a plus where files differ from it; empty outside a repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return f" at {commit}{'+' if _git(root, 'status', '--porcelain', '--untracked-files=no') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return f"{values.get('model name', platform.machine())} ({', '.join(f for f in wanted if f in flags)})"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
