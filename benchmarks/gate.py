"""The correctness tests that come before any timing on a GPU: one gate per op, each in processes of its own.

    python -m benchmarks.gate OP [OP ...] --output FOLDER [--seconds 110] [--workers 12] [--dry-run]

A gate is ``pytest -m gpu`` over the files of one op, in parallel where pytest-xdist is installed (a kernel
takes about a second to compile). It leaves FOLDER/gate-OP.json. An op whose tests do not pass blocks the
timings of what runs it, and nothing else. ``slow`` are the tests that take long, of all ops; they block
nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPS = ("adapter", "importance", "orthogonality", "allocation", "steps")  # steps: whole ones, of all ops
GROUPS = (*OPS, "slow")
# Without the project's own options for pytest, which ask for plugins that are not needed here.
TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
MARKS = re.compile(r"\b(NEEDS_GPU|ON_DEVICE|NO_BFLOAT16|BFLOAT16|mark\.gpu)\b")
LEFT_OUT = ("test_capture_gpu.py",)  # what is refused until it is proved is not part of what is timed
COUNT = re.compile(r"(\d+)(?:/\d+)? (passed|failed|errors?|skipped|tests? collected)")
TAIL = 3000  # characters of the output that are kept where a test failed
MOST_WORKERS = 12


def files(group: str) -> list[str]:
    """The files with GPU tests of an op; others may import what a machine with a GPU does not have."""
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.name not in LEFT_OUT)
    marked = [path for path in found if MARKS.search(path.read_text())]
    if group != "slow":
        marked = [path for path in marked if _op(path.stem) == group]
    return [str(path.relative_to(ROOT)) for path in marked]


def _op(stem: str) -> str:
    return next((op for op in OPS if op in stem), "steps")


def workers() -> int:
    """Processes that a gate uses: the host compiles the kernels."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))


def command(group: str, processes: int = 1, collect_only: bool = False) -> list[str]:
    """What runs the tests of a group, without the interpreter."""
    chosen = "slow" if group == "slow" else "not slow"
    if not collect_only:  # without a GPU most kernel tests have no mark
        chosen = f"gpu and {chosen}"
    parallel = ("-n", str(processes)) if processes > 1 and find_spec("xdist") is not None else ()
    return [*TESTS, "-m", chosen, *parallel, *files(group), *(["--collect-only"] if collect_only else [])]


def run(group: str, seconds: float, processes: int = 1, collect_only: bool = False) -> dict[str, Any]:
    """Command, counts, verdict and seconds; of tests that did not pass the end of the output as ``tail``.

    The verdict is ``passed``, ``failed``, ``out of time``, or with ``collect_only`` ``collected``.
    """
    arguments = command(group, processes, collect_only)
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = _text(error.stdout) + _text(error.stderr), None
    lines = output.strip().splitlines()
    counts = _counts(lines[-20:])
    wanted = "collected" if collect_only else "passed"
    verdict = "out of time" if code is None else wanted if code == 0 and counts.get(wanted) else "failed"
    gate = {
        "command": " ".join(["python", *arguments]),
        "counts": counts,
        "verdict": verdict,
        "seconds": round(time.monotonic() - began, 1),
    }
    return gate if verdict == wanted else {**gate, "tail": output[-TAIL:]}


def has_passed(gate: dict[str, Any] | None) -> bool:
    return gate is not None and gate["verdict"] in ("passed", "collected")


def summary(gate: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in gate["counts"].items())
    return f"{gate['verdict']} in {gate['seconds']:.0f} s ({counts or 'no counts'})"


def read_all(folder: Path, code: str) -> dict[str, dict[str, Any]]:
    """op → its gate, of those that ran in this folder on the code with this digest."""
    found = {}
    for op in OPS:
        path = folder / f"gate-{op}.json"
        if path.is_file():
            gate = json.loads(path.read_text())
            if gate.get("code") == code:
                found[op] = gate
    return found


def together(gates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All gates as one: it has passed if every op's has; ``ops`` holds each."""
    verdicts = {op: gates[op]["verdict"] if op in gates else "not run" for op in OPS}
    bad = [f"{op} {verdict}" for op, verdict in verdicts.items() if verdict not in ("passed", "collected")]
    verdict = ", ".join(bad) or next(iter(verdicts.values()))
    counts: dict[str, int] = {}
    for gate in gates.values():
        for name, number in gate["counts"].items():
            counts[name] = counts.get(name, 0) + number
    seconds = sum(gate["seconds"] for gate in gates.values())
    return {"verdict": verdict, "counts": counts, "seconds": seconds, "ops": gates}


def why_not(gates: dict[str, dict[str, Any]], ops: Iterable[str]) -> str | None:
    """Why what runs these ops may not be timed; None where all of their tests passed."""
    for op in ops:
        if not has_passed(gates.get(op)):
            verdict = gates[op]["verdict"] if op in gates else "not run"
            return f"not run: the correctness tests of {op} have not passed ({verdict})"
    return None


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _counts(lines: list[str]) -> dict[str, int]:
    """From pytest's last lines: ``212 passed, 3 skipped in 60.1s``, ``40/900 tests collected``."""
    found: dict[str, int] = {}
    for line in lines:
        for number, word in COUNT.findall(line):
            name = "collected" if "collected" in word else "errors" if word == "error" else word
            found[name] = int(number)
    return found


def main() -> int:
    from benchmarks.digest import code_digest

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=GROUPS, metavar="OP", help=", ".join(GROUPS))
    parser.add_argument("--output", type=Path, required=True, help="folder of gate-OP.json")
    parser.add_argument("--seconds", type=float, default=110.0, help="what a gate may take (default 110)")
    parser.add_argument("--workers", type=int, default=workers(), help="processes (default: cores - 2)")
    parser.add_argument("--dry-run", action="store_true", help="collect the tests, run none")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    passed = True
    for group in arguments.groups:
        gate = run(group, arguments.seconds, arguments.workers, arguments.dry_run)
        text = json.dumps({**gate, "code": code_digest()}, indent=1)
        (arguments.output / f"gate-{group}.json").write_text(text + "\n")
        print(gate.get("tail", ""), f"{group}: {summary(gate)}", sep="\n", flush=True)
        passed = passed and has_passed(gate)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
