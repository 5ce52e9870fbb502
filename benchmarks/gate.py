"""The correctness tests that come before any timing on a GPU: ``pytest -m gpu`` in a process of its own."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Without the project's own options for pytest, which ask for plugins that are not needed here.
TESTS = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
# kernel_cases has most of them
MARKS = re.compile(r"\b(NEEDS_GPU|ON_DEVICE|NO_BFLOAT16|BFLOAT16|mark\.gpu)\b")
LEFT_OUT = ("test_capture_gpu.py",)  # what is refused until it is proved is not part of what is timed
COUNT = re.compile(r"(\d+)(?:/\d+)? (passed|failed|errors?|skipped|tests? collected)")
TAIL = 3000  # characters of the output that are kept where a test failed


def files() -> list[str]:
    """The files with GPU tests; others may import what is not installed where only a GPU is needed."""
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.name not in LEFT_OUT)
    return [str(path.relative_to(ROOT)) for path in found if MARKS.search(path.read_text())]


def run(seconds: float, collect_only: bool = False) -> dict[str, Any]:
    """Command, counts, verdict and seconds; of tests that did not pass the end of the output as ``tail``.

    The verdict is ``passed``, ``failed``, ``out of time``, or with ``collect_only`` ``collected``.
    """
    command = [sys.executable, *TESTS, *files(), *(["--collect-only"] if collect_only else [])]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = _text(error.stdout) + _text(error.stderr), None
    lines = output.strip().splitlines()
    counts = _counts(lines[-20:])
    wanted = "collected" if collect_only else "passed"
    verdict = "out of time" if code is None else wanted if code == 0 and counts.get(wanted) else "failed"
    gate = {
        "command": " ".join(["python", *command[1:]]),
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
