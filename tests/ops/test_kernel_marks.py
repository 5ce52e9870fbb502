"""Every test that launches a kernel is marked ``gpu`` where there is a GPU, for ``pytest -m gpu`` there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Who imports one of these launches kernels, or sees that they are launched.
HELPERS = {"counted", "launched", "needs_triton", "planned", "triton_backend"}
WITHOUT = {  # file, or test of a file → why it has no mark
    "tests/ops/test_kernel_marks.py": "names the helpers only",
    "tests/ops/dispatch/test_launch.py": "how a launch is handed on, with stand-ins for kernels",
    "tests/ops/test_adapter_plans.py": "which launches a plan makes; none runs",
    "tests/ops/test_adapter_aot.py": "compiles for GPUs without one",
    "tests/ops/test_adapter_tuning.py": "the tuning's own logic, with a clock that is given",
    "tests/allocator/test_capture.py": "what a captured step refuses",
    "tests/allocator/test_kernels.py::test_a_graph_capture_is_refused_until_it_is_proven": "launches nothing",
    "tests/allocator/test_kernels.py::test_importing_the_package_does_not_import_triton": "launches nothing",
}


def launches_kernels(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            if node.module.startswith("tests.") and names & HELPERS:
                return True
            if node.module.startswith("adalora_fast.ops") and ("triton" in names or "triton" in node.module):
                return True
        if isinstance(node, ast.Constant) and re.fullmatch(r"adalora_fast\.ops\..*triton", str(node.value)):
            return True  # pytest.importorskip
    return False


def test_every_kernel_test_runs_on_a_gpu():
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if launches_kernels(path))
    files = [name for name in (str(path.relative_to(ROOT)) for path in found) if name not in WITHOUT]
    for op in ("adapter", "importance", "orthogonality", "allocation"):
        assert any(op in name for name in files), f"no kernel test of {op} was found"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.helpers.pretended_gpu",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    done = subprocess.run(
        [*command, "--collect-only", "-m", "not gpu", *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 5), (done.stdout + done.stderr)[-2000:]  # 5: nothing is left
    unmarked = [line for line in done.stdout.splitlines() if "::" in line]
    assert [name for name in unmarked if name not in WITHOUT] == []
