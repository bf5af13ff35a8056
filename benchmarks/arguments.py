"""What the command lines share."""

from __future__ import annotations

import argparse
import sys

import torch

from app.settings import Settings
from benchmarks.machine import n_cores


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's text as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --threads."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--threads", type=int, default=n_cores(), help="threads of a step (CPU)")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--settings, as a list of pairs."""
    parser.add_argument("--settings", nargs="*", type=_setting, default=[], metavar="SETTING=VALUE")


def check_device(device: str) -> None:
    """Ends the command where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here")


def command_line(module: str, words: list[str] | None) -> str:
    """The command as it was given, for the head of its output."""
    return " ".join([f"python -m benchmarks.{module}", *(sys.argv[1:] if words is None else words)])


def _setting(text: str) -> tuple[str, str]:
    name, middle, value = text.partition("=")
    if name not in Settings.model_fields or not middle:
        raise argparse.ArgumentTypeError(f"{text}: not setting=value")
    return name, value
