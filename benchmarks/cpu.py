"""Every suite on this machine's CPU, contestants in turns.

    python -m benchmarks.cpu [--quick] [--only SUITE ...] [--threads 1] [--rounds 20] [--output FILE]

Writes benchmarks/results/cpu/<date>.json after every case; the same command on the same code goes on where
one stopped. There is no test run before: each contestant passes its case's own gate before it is timed.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import runner
from benchmarks.digest import ROOT

DEVICE = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of every kind")
    parser.add_argument("--only", nargs="+", metavar="SUITE", default=(), help=", ".join(runner.SUITES))
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default 1)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--output", type=Path, help="the file of results, instead of one named by the date")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="(peft|transformers)")
    torch.set_num_threads(arguments.threads)
    scale = "quick" if arguments.quick else "full"
    try:
        cases = runner.plan(scale, DEVICE, arguments.only)
        results, path = runner.open_results(
            runner.new_results(DEVICE, scale), arguments.output, ROOT / "benchmarks/results/cpu"
        )
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    runner.Run(results, path, DEVICE, runner.Clock(), arguments.rounds, seconds=2.0)(cases)
    runner.show(results, path)


if __name__ == "__main__":
    main()
