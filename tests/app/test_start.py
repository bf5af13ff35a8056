"""What must be so before torch is loaded."""

import subprocess
import sys


def test_the_command_sets_how_threads_wait_before_torch_is_loaded() -> None:
    code = """
import os, sys
import app.__main__ as command
assert "torch" not in sys.modules
sys.modules["app.main"] = None  # stops where the application, and with it torch, would be loaded
try:
    command.serve(command.Settings())
except ImportError:
    print(os.environ["OMP_WAIT_POLICY"])
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert run.stdout.strip() == "PASSIVE"
