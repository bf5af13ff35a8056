"""A real server in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from app.settings import PREFIX
from benchmarks.load import Call, Plan, Results

ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 300.0


class ServerFailed(Exception):
    """The server did not come up; the message is the end of its log."""


@contextlib.contextmanager
def serving(settings: dict[str, str]) -> Iterator[int]:
    """`python -m app` with these settings over the environment's own; yields its port once it is ready."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    variables = {f"{PREFIX}{name}".upper(): value for name, value in (settings | {"port": str(port)}).items()}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app"], cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log
        )
        try:
            if not _ready(port, process):
                log.seek(0)
                raise ServerFailed(log.read().decode(errors="replace")[-2000:])
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(URLError, OSError),
            urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as r,
        ):
            if r.status == 200:
                return True
        time.sleep(0.1)
    return False


def send(port: int, calls: list[Call], n_clients: int = 0) -> Results:
    """Run the load in its own process; see `benchmarks.load`."""
    plan, before = json.dumps(asdict(Plan(port, calls, n_clients))), _cpu_seconds(port)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        cwd=ROOT,
        input=plan,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr[-2000:]}")
    spent = _cpu_seconds(port) - before
    return Results.from_dict(json.loads(done.stdout) | {"server_cpu_seconds": spent})


def _cpu_seconds(port: int) -> float:
    """What the server has taken of its processors, its engine included."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as r:
        lines = r.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("process_cpu_seconds_total ")).split()[1])
