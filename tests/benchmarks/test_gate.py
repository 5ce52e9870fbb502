"""The correctness tests that come before timings: a gate per op, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gate
from benchmarks.digest import code_digest
from tests.ops.test_kernel_marks import WITHOUT, launches_kernels


@pytest.fixture
def tests_in(tmp_path, monkeypatch):
    """Lets the gate run a file of tests of its own."""

    def write(content: str) -> None:
        (tmp_path / "test_small.py").write_text(f"import pytest, time\n{content}")
        options = ("-p", "no:cacheprovider", "-o", "markers=gpu\nslow", "-q")
        monkeypatch.setattr(gate, "TESTS", ("-m", "pytest", *options))
        monkeypatch.setattr(gate, "files", lambda group: [str(tmp_path)])

    return write


@pytest.mark.parametrize(
    ("body", "seconds", "verdict", "counts"),
    [
        ("pass", 60, "passed", {"passed": 1}),
        ("assert False", 60, "failed", {"failed": 1}),
        ("pytest.skip()", 60, "failed", {"skipped": 1}),
        ("time.sleep(60)", 2, "out of time", {}),
    ],
)
def test_the_gates_verdict(tests_in, body, seconds, verdict, counts):
    tests_in(f"@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    found = gate.run("adapter", seconds)
    assert found["verdict"] == verdict and found["counts"] == counts
    assert gate.has_passed(found) == (verdict == "passed") != ("tail" in found)


def test_the_gate_may_collect_only(tests_in):
    tests_in("@pytest.mark.gpu\ndef test_it(): pass\ndef test_other(): pass\n")
    found = gate.run("adapter", 60, collect_only=True)
    assert found["verdict"] == "collected" and found["counts"] == {"collected": 2}


def test_tests_that_take_long_have_a_gate_of_their_own(tests_in):
    tests_in(
        "@pytest.mark.gpu\n@pytest.mark.slow\ndef test_slow(): pass\n@pytest.mark.gpu\ndef test_it(): pass\n"
    )
    for group in ("adapter", "slow"):
        assert gate.run(group, 60)["counts"]["passed"] == 1


def test_a_gate_runs_in_parallel(tests_in):
    pytest.importorskip("xdist")
    marks = "@pytest.mark.gpu\n@pytest.mark.parametrize('n', range(2))\n"
    tests_in(f"{marks}def test_it(n, worker_id): assert worker_id != 'master'\n")
    found = gate.run("adapter", 60, processes=2)
    assert found["verdict"] == "passed" and "-n 2" in found["command"]


def test_every_file_belongs_to_one_op():
    each = {op: set(gate.files(op)) for op in gate.OPS}
    assert all(each.values())
    assert sum(map(len, each.values())) == len(set().union(*each.values()))
    assert set().union(*each.values()) == set(gate.files("slow"))
    assert "tests/ops/test_cuda_allocation.py" in each["allocation"]
    assert "tests/allocator/test_kernels.py" in each["steps"]


def test_the_gates_need_few_packages(tmp_path):
    """A machine with a GPU may have nothing but PyTorch, Triton, PEFT and pytest."""
    for name in ("hypothesis", "tyro", "rich", "matplotlib", "xdist", "pytest_timeout"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('absent')")
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    files = gate.files("slow")  # those of all ops
    done = subprocess.run(
        [sys.executable, *gate.TESTS, "-m", "gpu", *files, "-p", "tests.helpers.pretended_gpu",
         "--collect-only"],
        cwd=gate.ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert sum("::" in line for line in done.stdout.splitlines()) > 500


def test_the_gates_have_every_gpu_test(request):
    """The files whose tests carry the mark in this session, and those that launch kernels, which carry it
    where there is a GPU.
    """
    rooms = [gate.ROOT / "tests" / room for room in ("ops", "nn", "allocator")]
    marked = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    launching = {path for room in rooms for path in room.rglob("test_*.py") if launches_kernels(path)}
    wanted = {path for path in marked | launching if any(map(path.is_relative_to, rooms))}
    missing = {str(path.relative_to(gate.ROOT)) for path in wanted} - {*gate.files("slow"), *WITHOUT}
    assert {Path(name).name for name in missing} <= set(gate.LEFT_OUT) and launching


def test_gates_of_other_code_do_not_count(tmp_path):
    def write(op: str, code: str) -> None:
        content = {"verdict": "passed", "counts": {"passed": 2}, "seconds": 1.0, "code": code}
        (tmp_path / f"gate-{op}.json").write_text(json.dumps(content))

    write("adapter", "now")
    write("allocation", "before")
    gates = gate.read_all(tmp_path, "now")
    assert list(gates) == ["adapter"]
    assert gate.why_not(gates, ["adapter"]) is None
    reason = "not run: the correctness tests of allocation have not passed (not run)"
    assert gate.why_not(gates, ["adapter", "allocation"]) == reason
    whole = gate.together(gates)
    assert whole["verdict"].startswith("importance not run") and whole["counts"] == {"passed": 2}
    for op in gate.OPS:
        write(op, "now")
    assert gate.together(gate.read_all(tmp_path, "now"))["verdict"] == "passed"


def test_the_command_leaves_a_file_per_op(tests_in, tmp_path, monkeypatch):
    tests_in("@pytest.mark.gpu\ndef test_it(): assert False\n")
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["gate", "adapter", "allocation", "--output", str(out), "--workers", "1"]
    )
    began = time.monotonic()
    assert gate.main() == 1
    assert time.monotonic() - began < 60
    for op in ("adapter", "allocation"):
        found = json.loads((out / f"gate-{op}.json").read_text())
        assert found["verdict"] == "failed" and found["code"] == code_digest()
