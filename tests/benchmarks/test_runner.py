"""The plan of a benchmark run: its order, its time, going on where one stopped, and the commands."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import digest, runner, timings
from benchmarks.report.results import Results, read
from benchmarks.roofline import Ceilings
from benchmarks.suites import Case, Contestant, Work, apart, is_compiled

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
    compiled = [case for case in cases if is_compiled(case)]
    assert compiled and cases[-len(compiled) :] == compiled
    assert all(case.contestants == (case.baseline, "peft compiled") for case in compiled)
    last = cases[-len(compiled) - 1]
    assert last.suite == "adapter" and not last.what["goal"]
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


class Gpu:
    """Stands for a device on which contestants are timed one after the other."""

    type = "cuda"


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A run on a pretended GPU, whose clock is the contestant's own call."""
    monkeypatch.setattr(runner, "_works", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def on_gpu(contestant, rounds):
        try:
            contestant.calls[0]()
        except Exception as error:
            return runner.measure.reason(error)
        return {"value": 2.0, "clock": "events"}

    monkeypatch.setattr(runner.measure, "on_gpu", on_gpu)

    def run(path, results=None, minutes=None):
        found = run_of(path, results, minutes)
        found.device = Gpu()
        return found

    return run


def interrupting(error: BaseException) -> Case:
    """Of three contestants the second is interrupted."""

    def end():
        raise error

    makers = {
        "ours": lambda: Contestant([end]),
        "theirs": lambda: Contestant([lambda: None]),
        "third": lambda: Contestant([lambda: None]),
    }
    case = case_of("case", build=lambda: Work(makers, lambda who: None))
    return replace(case, contestants=tuple(makers))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), runner.OutOfTime()], ids=["Ctrl-C", "out of time"])
def test_an_interrupted_case_keeps_who_is_done_and_goes_on_with_the_others(tmp_path, pretended_gpu, error):
    path = tmp_path / "results.json"
    case = interrupting(error)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            pretended_gpu(path)([case])
    else:
        pretended_gpu(path, minutes=9)([case])
    found = read(path)
    assert {row.contestant: row.value for row in found.rows if row.value} == {"theirs": 2.0}  # the baseline
    assert all(row.missing.startswith("no time left") for row in found.rows if row.missing)

    calls = []
    makers = {name: lambda name=name: Contestant([lambda: calls.append(name)]) for name in case.contestants}
    again = replace(case, build=lambda: Work(makers, lambda who: None))
    pretended_gpu(path, found)([again])
    rows = {row.contestant: row for row in read(path).rows}
    assert calls == ["ours", "third"] and set(rows) == set(case.contestants)
    assert all(row.ratio == 1.0 for row in rows.values())  # the baseline's figure is the stored one


def test_a_contestant_that_the_gpu_does_not_survive_costs_no_figure_before_it(monkeypatch, pretended_gpu):
    works = iter([True, False])
    monkeypatch.setattr(runner, "_works", lambda: next(works))
    run = pretended_gpu(None)
    run([interrupting(RuntimeError("an illegal memory access")), case_of("next")])
    rows = {(row.case, row.contestant): row for row in run.results.rows}
    assert rows["case", "theirs"].value == 2.0
    assert rows["case", "ours"].missing == "RuntimeError: an illegal memory access"
    for key in (("case", "third"), ("next", "ours"), ("next", "theirs")):
        assert rows[key].missing.startswith("not run: the GPU failed in adapter: case, ours")


def test_a_profiler_runs_only_where_nothing_is_timed(monkeypatch, tmp_path, pretended_gpu):
    """Launches are counted afterwards, by a command that times nothing."""
    monkeypatch.setattr(runner.measure, "kernel_launches", lambda call: pytest.fail("a profiler ran"))
    path = tmp_path / "results.json"
    pretended_gpu(path)([case_of("case")])
    found = read(path)
    assert [row.launches for row in found.rows] == [None, None]
    monkeypatch.setattr(runner.measure, "kernel_launches", lambda call: 3)
    pretended_gpu(path, found).count_launches([case_of("case")])
    assert [(row.launches, row.value) for row in read(path).rows] == [(3, 2.0)] * 2


def test_compiled_contestants_are_cases_of_their_own():
    makers = {name: lambda: Contestant([lambda: None]) for name in ("ours", "theirs", "peft compiled")}
    whole = replace(case_of("case", build=lambda: Work(makers, lambda who: None)), contestants=tuple(makers))
    plain, alone = apart(whole)
    assert (plain.name, plain.contestants) == ("case", ("ours", "theirs"))
    assert (alone.name, alone.contestants) == ("case, peft compiled", ("theirs", "peft compiled"))
    run = run_of(None)
    run([plain, alone])
    assert [row.ratio is not None for row in run.results.rows] == [True] * 4
    assert apart(plain) == [plain]


GATES = {op: {"verdict": "passed"} for op in timings.EVERYTHING}


@pytest.mark.parametrize("failed", timings.EVERYTHING)
def test_an_op_whose_tests_fail_blocks_its_own_timings_only(failed):
    blocked = timings.blocked_by({**GATES, failed: {"verdict": "failed"}})
    stopped = set()
    for case in runner.plan("tiny", CPU):
        reasons = {name: blocked(case, name) for name in case.contestants}
        for name, reason in reasons.items():
            if reason is not None:
                assert name.startswith("adalora_fast") and name != "adalora_fast reference"
                assert reason == f"not run: the correctness tests of {failed} have not passed (failed)"
                stopped.add(case.suite)
    whole = {"step", "memory"}
    assert (
        stopped
        == whole
        | {
            "adapter": {"adapter", "inference", "growth"},
            "importance": {"importance", "allocation", "growth"},
            "orthogonality": {"orthogonality"},
            "allocation": {"allocation", "growth"},
            "steps": set(),
        }[failed]
    )


def test_who_is_blocked_is_a_row_and_is_tried_again(tmp_path):
    path = tmp_path / "results.json"
    run = run_of(path)
    run.blocked = lambda case, name: "not run: its tests failed" if name == "ours" else None
    run([case_of("case")])
    found = read(path)
    assert {row.contestant: row.missing for row in found.rows} == {
        "ours": "not run: its tests failed", "theirs": None,
    }  # fmt: skip
    run_of(path, found)([case_of("case")])
    assert all(row.value is not None for row in read(path).rows)


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
    before = digest.code_digest(tmp_path)
    file.write_text("2")
    assert digest.code_digest(tmp_path) != before


# The commands


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_timings_without_a_gpu_are_refused(tmp_path):
    done = command("-m", "benchmarks.timings", "--output", str(tmp_path / "results.json"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks.timings: no CUDA device is visible; --dry-run needs none\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cpu_command_takes_threads_and_refuses_unknown_suites():
    done = command("-m", "benchmarks.cpu", "--only", "nothing")
    assert done.returncode == 1 and "there is no suite nothing; choose from adapter" in done.stderr


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results_are_valid(path):
    found = read(path)
    assert found.rows and found.device == path.parent.name
