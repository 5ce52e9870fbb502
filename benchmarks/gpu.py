"""Ten minutes on a GPU, in one command: a plan of parts, the most valuable first, none of which blocks the
next.

    python benchmarks/gpu.py [--output FOLDER] [--minutes 9.5] [--parts NAME ...] [--skip NAME ...]
                             [--no-compiled] [--list] [--dry-run]

Each part is a process with a limit and a log of its own (benchmarks/plan.py). Everything is written below
FOLDER (default: runs/gpu-<date>-<code>): results.json (all timings), step.json and graph.json (a whole
step), gate-OP.json (the correctness tests of an op, without which ours is not timed), tuned/ (plans of this
GPU), proof.json (captured steps), plan.json (how far the plan is), and the logs. The same command with the
same folder goes on with timings that there was no time for. ``--dry-run`` walks through the plan on a CPU
at tiny sizes.

Exits with 0 where every part is done, with 1 where one failed or had no time, with 2 without a GPU.
"""

import argparse
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # as a script: the repository is searched for modules, this folder is not
    sys.path[0] = str(ROOT)

from benchmarks import plan  # noqa: E402
from benchmarks.digest import code_digest  # noqa: E402
from benchmarks.plan import Part, python  # noqa: E402

MINUTES = 9.5
NEEDS_GPU = "it needs a GPU"
SHAPES = ("768x768", "768x3072", "3072x768", "3072x3072")
PATIENCE = 4  # times the limits in a dry run
REST = 3600.0  # the last parts take what time is left
GATES = {"adapter": 120, "importance": 40, "orthogonality": 40, "allocation": 30, "steps": 30}  # seconds
MACHINE = """
import shutil, subprocess, sys
if {gpu}:
    subprocess.run(["nvidia-smi"], check=False)
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], check=False)
from adalora_fast.__main__ import main
main()
from adalora_fast.ops import native
reasons = [native.refusal("_C")]
if {gpu} and shutil.which("nvcc"):
    reasons.append(native.refusal("_C_cuda"))
sys.exit("; ".join(filter(None, reasons)) or 0)
"""


def parts(folder: Path, dry: bool = False, compiled: bool = True) -> list[Part]:
    """The plan, in the order of worth."""
    results, tuned = folder / "results.json", folder / "tuned"
    tiny, walked = (("--tiny", "--rounds", "2"), ("--dry-run",)) if dry else ((), ())
    only_gpu = NEEDS_GPU if dry else None
    environment = {"ADALORA_FAST_TUNED": str(tuned)}

    def step(*options: str) -> list[str]:
        return python("-m", "benchmarks.whole_step", *options, *tiny)

    def timings(*options: str) -> list[str]:
        fixed = ("--output", str(results), "--minutes", "{minutes}")
        return python("-m", "benchmarks.timings", *fixed, *options, *walked)

    def gate(group: str, seconds: float) -> Part:
        options = ("--output", str(folder), "--seconds", "{seconds}", *walked)
        what = f"correctness tests of {group}" if group != "slow" else "correctness tests that take long"
        return Part(
            name=f"gate-{group}", what=what, seconds=seconds,
            command=python("-m", "benchmarks.gate", group, *options),
        )  # fmt: skip

    def timing(name: str, what: str, seconds: float, *options: str) -> Part:
        command = timings(*options)
        return Part(name=name, what=what, seconds=seconds, command=command, environment=environment)

    listed = [
        Part(name="machine", what="the device; the C++ and CUDA kernels are built", seconds=60,
             command=python("-c", MACHINE.format(gpu=not dry))),
        Part(name="step", what="a whole training step, eager", seconds=100,
             command=step("--output", str(folder / "step.json"))),
        Part(name="graph", what="the same step as one CUDA graph", seconds=90,
             command=step("--graph", "--output", str(folder / "graph.json"))),
        *(gate(op, seconds) for op, seconds in GATES.items()),
        Part(name="tuning", what="the fastest plans of the four layers", seconds=100, refusal=only_gpu,
             command=python("-m", "adalora_fast.ops.adapter.tuning", "--shapes", *SHAPES, "--rows", "4096",
                            "--ranks", "16", "--folder", str(tuned))),
        timing("goals", "the layers that the goals speak of", 100,
               "--only", "adapter", "--goals", "--no-compiled"),
        timing("bookkeeping", "importance, orthogonality, allocation", 60,
               "--only", "importance", "orthogonality", "allocation", "--no-compiled"),
        Part(name="capture", what="whether captured steps equal eager ones", seconds=50, refusal=only_gpu,
             command=python("-m", "benchmarks.capture", "--json", str(folder / "proof.json"))),
        Part(name="launches", what="launches of what was timed, in a profiler", seconds=60,
             command=timings("--launches", "--no-compiled"), environment=environment),
        timing("rest", "every other case", REST, "--no-compiled"),
        gate("slow", 120),
    ]  # fmt: skip
    if compiled:
        listed.append(timing("compiled", "compiled peers", REST, "--compiled-only"))
    if dry:  # a machine without a GPU may have other work
        listed = [replace(part, seconds=PATIENCE * part.seconds) for part in listed]
    return listed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of everything that is written")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"the time there is (default {MINUTES})"
    )
    parser.add_argument("--parts", nargs="+", metavar="NAME", default=(), help="these parts alone")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=(), help="all but these parts")
    parser.add_argument("--no-compiled", action="store_true", help="leave compiled peers out")
    parser.add_argument("--list", action="store_true", help="show the parts, run none")
    parser.add_argument("--dry-run", action="store_true", help="walk the plan on a CPU with tiny sizes")
    return parser.parse_args()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    arguments = _arguments()
    name = f"gpu-{datetime.now(UTC).date().isoformat()}-{code_digest()[:8]}"
    folder = (arguments.output or ROOT / "runs" / name).resolve()
    try:
        listed = parts(folder, arguments.dry_run, not arguments.no_compiled)
        chosen = plan.choose(listed, arguments.parts, arguments.skip)
    except ValueError as error:
        return _refuse(str(error))
    if arguments.list:
        print(plan.listing(chosen))
        return 0
    if not arguments.dry_run and not _has_gpu():
        return _refuse("no CUDA device is visible; --dry-run needs none")
    os.chdir(ROOT)  # the parts are modules of the repository
    print(
        f"{len(chosen)} parts in {arguments.minutes:g} minutes; everything is written to {folder}", flush=True
    )
    outcomes = plan.run(chosen, folder, 60 * arguments.minutes)
    print(f"\n{plan.table(chosen, outcomes)}\n\nWritten to {folder}")
    return plan.exit_code(chosen, outcomes)


def _refuse(reason: str) -> int:
    print(f"gpu.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
