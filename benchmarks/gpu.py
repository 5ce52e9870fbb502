"""Everything there is to measure on a GPU, in one command that ends inside nine minutes.

    python benchmarks/gpu.py [--quick] [--only SUITE ...] [--minutes 9] [--rounds 20] [--output FILE]
                             [--skip-gate] [--dry-run]

In this order: what the device can do at best; the correctness tests, without which nothing is timed; every
suite, the most important cases first; a table. The file of results is written after every case, and the same
command on the same code goes on with what there was no time for. ``--dry-run`` walks through all of it on a
CPU with tiny sizes, kernels in Triton's interpreter, and writes nothing unless ``--output`` says where.

Needs PyTorch, Triton, transformers, PEFT and pytest (with hypothesis the correctness tests are a few more).
Exits with 1 where a test failed, with 2 without a GPU.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks import runner

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # as a script: the repository is searched for modules, this folder is not
    sys.path[0] = str(ROOT)

GATE_SHARE = 0.5  # of the minutes that the tests may take


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of every kind")
    parser.add_argument("--only", nargs="+", metavar="SUITE", default=(), help="these suites alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="the time there is (default 9)")
    parser.add_argument("--rounds", type=int, help="timed rounds of each contestant (default 20; dry run: 2)")
    parser.add_argument("--output", type=Path, help="the file of results, instead of one named by the date")
    parser.add_argument("--skip-gate", action="store_true", help="do not run the correctness tests first")
    parser.add_argument("--dry-run", action="store_true", help="walk the plan on a CPU with tiny sizes")
    return parser.parse_args()


def main() -> int:
    began = time.monotonic()
    arguments = _arguments()
    if arguments.dry_run:  # both are read when kernels are imported
        os.environ.update(TRITON_INTERPRET="1", ADALORA_FAST_BACKEND="triton")

    import torch

    from benchmarks import runner

    if not arguments.dry_run and not torch.cuda.is_available():
        return _refuse("no CUDA device is visible; --dry-run needs none")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    scale = "tiny" if arguments.dry_run else "quick" if arguments.quick else "full"
    fresh = runner.new_results(device, scale)
    results, path = fresh, None
    try:
        cases = runner.plan(scale, device, arguments.only)
        if arguments.output is not None or not arguments.dry_run:
            folder = ROOT / "benchmarks/results" / fresh.device
            results, path = runner.open_results(fresh, arguments.output, folder)
    except ValueError as error:
        return _refuse(str(error))
    commit = fresh.environment["commit"]
    print(f"{fresh.device}, commit {commit}, {len(cases)} cases of scale {scale}", flush=True)
    if results is not fresh:
        print(f"Going on with {path}, which has {len(results.done())} cases", flush=True)
    rounds = arguments.rounds or (2 if arguments.dry_run else 20)
    clock = runner.Clock(arguments.minutes, began)
    return _run(runner.Run(results, path, device, clock, rounds), cases, arguments)


def _refuse(reason: str) -> int:
    print(f"gpu.py: {reason}", file=sys.stderr)
    return 2


def _run(run: "runner.Run", cases: list, arguments: argparse.Namespace) -> int:
    import warnings

    from benchmarks import gate, roofline, runner

    warnings.filterwarnings("ignore", module="(peft|transformers)")
    results = run.results
    if results.ceilings is None:
        results.ceilings = roofline.measure(run.device).as_dict()
    if not arguments.skip_gate and not gate.has_passed(results.gate):
        results.gate = gate.run(60 * GATE_SHARE * arguments.minutes, collect_only=arguments.dry_run)
        run.write()
        print(f"Correctness tests: {gate.summary(results.gate)}; {run.clock}", flush=True)
        if not gate.has_passed(results.gate):
            print(results.gate["tail"], file=sys.stderr)
            print("gpu.py: nothing is timed, because the correctness tests did not pass", file=sys.stderr)
            return 1
    run(cases)
    runner.show(results, run.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
