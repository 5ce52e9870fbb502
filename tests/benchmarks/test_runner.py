"""The plan of a benchmark run: its order, its time, going on where one stopped, and the commands."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adalora_fast.bench.results import Results, read
from benchmarks import gate, gpu, runner
from benchmarks.roofline import Ceilings
from benchmarks.suites import Case, Contestant, Work

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
COMMITTED = [
    path
    for path in sorted((ROOT / "benchmarks/results").glob("*/*.json"))
    if "format" in json.loads(path.read_text())
]


def case_of(name: str, call=lambda: None, build=None) -> Case:
    """A case with one contestant and a copy of it."""
    work = Work({who: lambda: Contestant([call]) for who in ("ours", "theirs")}, lambda who: None)
    return Case(
        suite="adapter", name=name, what={"goal": True}, baseline="theirs", build=build or (lambda: work),
        contestants=("ours", "theirs"),
    )  # fmt: skip


def raising(error: BaseException):
    def build() -> Work:
        raise error

    return build


@pytest.fixture(autouse=True)
def ceilings_at_once(monkeypatch):
    """Nothing here is about what this machine can do at best."""
    known = Ceilings(1e10, {"float32": 1e11, "float16": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr(runner.roofline, "measure", lambda device: known)


def run_of(path: Path | None, results: Results | None = None, minutes: float | None = None) -> runner.Run:
    results = results or runner.new_results(CPU, "tiny")
    return runner.Run(results, path, CPU, runner.Clock(minutes), rounds=2)


def test_the_order_of_the_plan():
    cases = runner.plan("tiny", CPU)
    assert [case.suite for case in cases[:2]] == ["adapter", "adapter"]
    assert list(dict.fromkeys(case.suite for case in cases)) == list(runner.SUITES)
    assert cases[-1].suite == "adapter" and not cases[-1].what["goal"]
    assert {case.suite for case in runner.plan("tiny", CPU, ["allocation"])} == {"allocation"}


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"no suite alocation; choose from adapter, step"):
        runner.plan("tiny", CPU, ["alocation"])


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "results.json"
    calls = []
    cases = [case_of(f"case {number}", lambda number=number: calls.append(number)) for number in range(4)]
    dying = [*cases[:2], case_of("case 2", build=raising(KeyboardInterrupt())), cases[3]]
    with pytest.raises(KeyboardInterrupt):
        run_of(path)(dying)
    assert [row.case for row in read(path).rows] == ["case 0"] * 2 + ["case 1"] * 2

    fresh = runner.new_results(CPU, "tiny")
    results, found = runner.open_results(fresh, path, tmp_path)
    assert found == path and len(results.done()) == 2
    calls.clear()
    run_of(path, results)(cases)
    assert set(calls) == {2, 3}
    assert [row.case for row in read(path).rows] == [f"case {n}" for n in range(4) for _ in range(2)]


def test_what_there_was_no_time_for_is_tried_again(tmp_path):
    path = tmp_path / "results.json"
    cases = [case_of("first"), case_of("second")]
    run_of(path, minutes=0)(cases)
    found = read(path)
    assert {row.missing for row in found.rows} == {"no time left in 0 minutes; the same command goes on"}
    assert runner.unfinished(found) == 2
    run_of(path, found)(cases[:1])  # another plan leaves the other rows alone
    found = read(path)
    assert [row.case for row in found.rows if row.missing] == ["second"] * 2
    run_of(path, found)(cases)
    assert runner.unfinished(read(path)) == 0


def test_a_case_that_takes_too_long_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "UNKNOWN_CASE", 0.0)
    began = time.monotonic()
    run = run_of(tmp_path / "results.json", minutes=4 / 60)
    run([case_of("quick"), case_of("endless", lambda: time.sleep(60)), case_of("late")])
    assert time.monotonic() - began < 20
    assert [row.case for row in run.results.rows if row.value is not None] == ["quick"] * 2
    assert all(row.missing.startswith("no time left") for row in run.results.rows[2:])


def test_a_case_is_not_started_when_the_suites_last_one_took_longer_than_what_is_left():
    run = run_of(None, minutes=1)
    run.longest["adapter"] = 61.0
    run([case_of("long")])
    assert runner.unfinished(run.results) == 1


def test_an_error_is_a_row_and_not_tried_again(tmp_path):
    path = tmp_path / "results.json"
    cases = [case_of("broken", build=raising(RuntimeError("out of luck\nand more"))), case_of("sound")]
    run_of(path)(cases)
    found = read(path)
    assert [row.missing for row in found.rows] == ["RuntimeError: out of luck"] * 2 + [None] * 2
    assert runner.unfinished(found) == 0


def test_nothing_runs_on_a_gpu_that_failed():
    run = run_of(None)
    run.broken = "adapter: case 7"
    run([case_of("next")])
    assert (
        run.results.rows[0].missing == "not run: the GPU failed in adapter: case 7; the same command goes on"
    )
    assert runner.unfinished(run.results) == 1


@pytest.mark.parametrize("changed", ["code", "commit", "versions"])
def test_other_code_has_its_own_file(tmp_path, changed):
    fresh = runner.new_results(CPU, "tiny")
    _, first = runner.open_results(fresh, None, tmp_path)
    fresh.write(first)
    assert runner.open_results(fresh, None, tmp_path)[1] == first
    other = replace(fresh, environment={**fresh.environment, changed: {"torch": "0"}})
    results, second = runner.open_results(other, None, tmp_path)
    assert second != first and not second.exists() and results is other
    with pytest.raises(ValueError, match="name another file"):
        runner.open_results(other, first, tmp_path)


def test_files_of_another_kind_are_passed_by(tmp_path):
    (tmp_path / "step.json").write_text('{"benchmark": "step_cpu"}')
    fresh = runner.new_results(CPU, "tiny")
    results, path = runner.open_results(fresh, None, tmp_path)
    assert results is fresh and path.name != "step.json"


def test_the_code_digest_sees_an_edit(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "benchmarks/a.py"
    file.write_text("1")
    before = runner.code_digest(tmp_path)
    file.write_text("2")
    assert runner.code_digest(tmp_path) != before


# The tests before any timing


@pytest.fixture
def tests_in(tmp_path, monkeypatch):
    """Lets the gate run a file of tests of its own."""

    def write(content: str) -> None:
        (tmp_path / "test_small.py").write_text(f"import pytest, time\n{content}")
        options = ("-p", "no:cacheprovider", "-m", "gpu", "-o", "markers=gpu", "-q")
        monkeypatch.setattr(gate, "TESTS", ("-m", "pytest", *options))
        monkeypatch.setattr(gate, "files", lambda: [str(tmp_path)])

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
    found = gate.run(seconds)
    assert found["verdict"] == verdict and found["counts"] == counts
    assert gate.has_passed(found) == (verdict == "passed") != ("tail" in found)


def test_the_gate_may_collect_only(tests_in):
    tests_in("@pytest.mark.gpu\ndef test_it(): pass\ndef test_other(): pass\n")
    found = gate.run(60, collect_only=True)
    assert found["verdict"] == "collected" and found["counts"] == {"collected": 1}


def test_the_gate_has_every_gpu_test_and_needs_few_packages(tmp_path):
    """All that pytest finds with the mark, but for the proof of what is refused without it."""
    for name in ("hypothesis", "tyro", "rich", "matplotlib", "xdist", "pytest_timeout"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('absent')")

    def collected(*arguments: str, **variables: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, *arguments, "--collect-only"],
            cwd=gate.ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        return {line for line in done.stdout.splitlines() if "::" in line}

    bare = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = collected(*gate.TESTS, *gate.files(), **bare)
    every = collected("-m", "pytest", "-m", "gpu", "-q", "tests")
    assert len(found) > 100
    assert {line for line in every - found if not line.startswith("tests/test_capture_gpu.py")} == set()


def test_nothing_is_timed_where_a_test_fails(monkeypatch, tmp_path, capsys):
    failed = {"command": "", "counts": {"failed": 1}, "verdict": "failed", "seconds": 1.0, "tail": "E assert"}
    monkeypatch.setattr(gate, "run", lambda *arguments, **options: failed)
    path = tmp_path / "results.json"
    arguments = Namespace(skip_gate=False, minutes=9.0, dry_run=False)
    assert gpu._run(run_of(path), [case_of("a", build=raising(AssertionError()))], arguments) == 1
    found = read(path)
    assert found.gate == failed and found.rows == []
    assert "nothing is timed" in capsys.readouterr().err


# The commands


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses():
    done = command("benchmarks/gpu.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu.py: no CUDA device is visible; --dry-run needs none\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run(tmp_path):
    path = tmp_path / "plan.json"
    options = ("--dry-run", "--skip-gate", "--only", "allocation", "--output", str(path))
    done = command("benchmarks/gpu.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(path)
    assert found.scale == "tiny" and found.gate is None and len(found.done()) == 3
    assert all(row.missing is None and row.what["backend"] == "triton" for row in found.rows)
    assert "[3/3] allocation: " in done.stdout


def test_the_cpu_command_takes_threads_and_refuses_unknown_suites():
    done = command("-m", "benchmarks.cpu", "--only", "nothing")
    assert done.returncode == 1 and "there is no suite nothing; choose from adapter" in done.stderr


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results_are_valid(path):
    found = read(path)
    assert found.rows and found.device == path.parent.name
