"""The command line: a command turns words into a call of `pipeline` and its result into words."""

from . import align, evaluate, experiment, predict, teach
from .frame import cli

__all__ = ["align", "cli", "evaluate", "experiment", "main", "predict", "teach"]


def main() -> None:
    """Entry point of `mint`, `python -m mint` and `python cli.py`."""
    cli(prog_name="mint")
