"""Every kernel that runs on a GPU compiles for sm_80 and sm_90 without one: no spill, shared memory within
the limit, matrix instructions for half types.

In a process of its own for each kind of layer: kernels are interpreted in this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "bfloat16-highest"])
def test_what_runs_compiles(kind):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot_adapter", "--kinds", kind, "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    last = done.stdout.strip().splitlines()[-1]
    count, _, rest = last.partition(" ")
    assert int(count) > 50 and rest == "specialisations, 0 faults", last
