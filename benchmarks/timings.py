"""Every suite on a GPU, the most important cases first, in one file of results.

    python -m benchmarks.timings --output FILE [--gates FOLDER | --skip-gate] [--only SUITE ...] [--goals]
                                 [--quick] [--no-compiled | --compiled-only] [--launches]
                                 [--minutes 9] [--rounds 20] [--dry-run]

The file is written after every contestant, and the same command on the same code goes on with it. Of a
case, contestants of ours run only if the correctness tests of their ops have passed (python -m
benchmarks.gate OP); the others' timings do not depend on those. ``--launches`` times nothing: it counts the
kernels of what was timed, in a profiler, which would slow down what is timed after it. Exits with 2 without
a GPU, with 3 where there was no time for all of it.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.plan import UNFINISHED

BOOKKEEPING = ("importance", "allocation")
EVERYTHING = ("adapter", "importance", "orthogonality", "allocation", "steps")
NEEDS = {  # suite → the ops that it runs; growth has two kinds of cases
    "adapter": ("adapter",),
    "importance": ("importance",),
    "orthogonality": ("orthogonality",),
    "allocation": ("importance", "allocation"),
    "inference": ("adapter",),
    "step": EVERYTHING,
    "memory": EVERYTHING,
}


def needed(suite: str, what: dict) -> tuple[str, ...]:
    """The ops whose tests must have passed before a case of ours is timed."""
    if suite == "growth":
        return BOOKKEEPING if what["part"] == "bookkeeping" else ("adapter",)
    if suite == "allocation" and what["work"] == "select":
        return ("allocation",)
    return NEEDS[suite]


def blocked_by(gates: dict) -> Callable[[object, str], str | None]:
    """Why a contestant of a case may not be timed after these gates; others' code is not what they test."""
    from benchmarks import gate

    def blocked(case, name: str) -> str | None:
        ours = name.startswith("adalora_fast") and name != "adalora_fast reference"
        return gate.why_not(gates, needed(case.suite, case.what)) if ours else None

    return blocked


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the file of results")
    parser.add_argument("--gates", type=Path, help="folder of the gates (default: that of --output)")
    parser.add_argument("--skip-gate", action="store_true", help="time ours whatever the tests say")
    parser.add_argument("--only", nargs="+", metavar="SUITE", default=(), help="these suites alone")
    parser.add_argument("--goals", action="store_true", help="of the adapter only the layers of the goals")
    parser.add_argument("--quick", action="store_true", help="a few cases of every kind")
    parser.add_argument("--no-compiled", action="store_true", help="leave compiled peers out")
    parser.add_argument("--compiled-only", action="store_true", help="the compiled peers alone")
    parser.add_argument("--launches", action="store_true", help="count the launches of what was timed")
    parser.add_argument("--minutes", type=float, default=9.0, help="the time there is (default 9)")
    parser.add_argument("--rounds", type=int, help="timed rounds of each contestant (default 20; dry run: 2)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    return parser.parse_args()


def main() -> int:
    began = time.monotonic()
    arguments = _arguments()
    if arguments.dry_run:  # both are read when kernels are imported
        os.environ.update(TRITON_INTERPRET="1", ADALORA_FAST_BACKEND="triton")

    import torch

    from benchmarks import gate, roofline, runner

    if not arguments.dry_run and not torch.cuda.is_available():
        return _refuse("no CUDA device is visible; --dry-run needs none")
    warnings.filterwarnings("ignore", module="(peft|transformers)")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    scale = "tiny" if arguments.dry_run else "quick" if arguments.quick else "full"
    try:
        cases = chosen(runner.plan(scale, device, arguments.only), arguments)
        results, path = runner.open_results(
            runner.new_results(device, scale), arguments.output, arguments.output.parent
        )
    except ValueError as error:
        return _refuse(str(error))
    print(f"{results.device}, commit {results.environment['commit']}, {len(cases)} cases of scale {scale}")
    if results.rows:
        print(f"Going on with {path}, which has {len(results.done())} cases", flush=True)
    rounds = arguments.rounds or (2 if arguments.dry_run else 20)
    run = runner.Run(results, path, device, runner.Clock(arguments.minutes, began), rounds)
    if not arguments.skip_gate:
        gates = gate.read_all(arguments.gates or arguments.output.parent, results.environment["code"])
        results.gate, run.blocked = gate.together(gates), blocked_by(gates)
        print(f"Correctness tests: {results.gate['verdict']}", flush=True)
    if arguments.launches:
        run.count_launches(cases)
    else:
        results.ceilings = results.ceilings or roofline.measure(device).as_dict()
        run(cases)
    runner.show(results, path)
    return UNFINISHED if runner.no_time_left(results, cases) else 0


def chosen(cases: list, arguments: argparse.Namespace) -> list:
    """The cases that the switches leave."""
    from benchmarks.suites import is_compiled

    if arguments.goals:
        cases = [case for case in cases if case.suite != "adapter" or case.what["goal"]]
    if arguments.no_compiled:
        cases = [case for case in cases if not is_compiled(case)]
    if arguments.compiled_only:
        cases = [case for case in cases if is_compiled(case)]
    return cases


def _refuse(reason: str) -> int:
    print(f"benchmarks.timings: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
