"""The trainer's speed, part by part; docs/trainer-speed.md explains the figures."""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from services.common.benchmarks import provenance, write_figures
from services.common.settings import exit_with
from services.contracts.errors import FedwardError
from trainer.bench import aggregation, start, steps
from trainer.bench.visits import SEED

PROGRAM = "python -m trainer.bench"
PARTS = {"steps": steps.rows, "start": start.rows, "aggregation": aggregation.rows}
LIBRARIES = ("flwr", "numpy", "torch", "transformers", "peft", "accelerate")


def main(argv: Sequence[str]) -> int:
    """Measure, print a line for each figure, and write figures and plot; returns the exit code."""
    parser = ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each figure is measured (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/trainer.json"), help="the plot goes beside it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is a whole number above 0")
    try:
        measured = {part: list(PARTS[part](options.rounds)) for part in options.parts}
        summary = provenance(LIBRARIES, {"replies": aggregation.SEED, "models": SEED}) | {
            "command": shlex.join([*PROGRAM.split(), *argv]),
            "adapter_bytes": sum(array.nbytes for array in aggregation.blank_adapter().values()),
            **measured,
        }
        write_figures(options.out, summary)
        if "aggregation" in measured:
            options.out.with_suffix(".png").write_bytes(aggregation.plot(measured["aggregation"]))
    except FedwardError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
