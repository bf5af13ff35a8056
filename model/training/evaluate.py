"""Being written."""
import argparse
def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None: ...
def evaluate_command(arguments: argparse.Namespace) -> int: return 1
