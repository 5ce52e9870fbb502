"""The bookkeeping kernels compile for sm_80 and sm_90 and do not spill; a sample of them."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("op", ["importance", "orthogonality", "allocation"])
def test_compiles_without_spilling(op):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot_bookkeeping", "--op", op, "--sample", "--workers", "1"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " 0 faults" in ran.stdout and "_kernel" in ran.stdout
