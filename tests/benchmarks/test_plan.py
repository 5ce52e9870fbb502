"""The plan of parts: what a part does to the others, and what is left of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, plan
from benchmarks.plan import Part, python

ROOT = Path(__file__).parents[2]
HANGS = """
import pathlib, time
pathlib.Path("partial.json").write_text("half")
print("began", flush=True)
time.sleep(60)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def part(name: str, code: str, seconds: float = 20.0, **options) -> Part:
    return Part(name=name, what=f"what {name} does", seconds=seconds, command=python("-c", code), **options)


def outcomes_of(parts, folder, seconds=60.0, **options):
    return {one.name: one for one in plan.run(parts, folder, seconds, mercy=0.5, **options)}


def test_no_part_blocks_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = [
        part("hangs", HANGS, seconds=2),
        part("fails", "import sys; print('what went wrong'); sys.exit(7)"),
        part("sound", "import os; print('fine', os.environ['WORD'])", environment={"WORD": "here"}),
        part("unfinished", f"import sys; sys.exit({plan.UNFINISHED})"),
        part("elsewhere", "1 / 0", refusal="it needs a GPU"),
        Part(name="absent", what="no such program", seconds=5, command=["/no/such/program"]),
    ]
    began = time.monotonic()
    found = outcomes_of(parts, tmp_path / "out")
    assert time.monotonic() - began < 20
    assert {name: one.verdict for name, one in found.items()} == {
        "hangs": "out of time", "fails": "failed", "sound": "done", "unfinished": "out of time",
        "elsewhere": "not run", "absent": "failed",
    }  # fmt: skip
    assert (tmp_path / "partial.json").read_text() == "half"
    assert (tmp_path / "out/hangs.log").read_text() == "began\n"
    assert (tmp_path / "out/sound.log").read_text() == "fine here\n"
    saved = json.loads((tmp_path / "out/plan.json").read_text())
    assert [one["name"] for one in saved] == [one.name for one in parts]
    assert saved[1]["why"] == "exit code 7"
    shown = capsys.readouterr().out
    assert "=== fails: failed (exit code 7)" in shown and "    what went wrong" in shown
    outcomes = list(found.values())
    assert plan.exit_code(parts, outcomes) == 1
    assert plan.exit_code([parts[2], parts[4]], [found["sound"], found["elsewhere"]]) == 0
    table = plan.table(parts, outcomes)
    assert "ended after 2 s" in table and "[it needs a GPU]" in table and "exit code 7" in table


def test_what_a_part_started_ends_with_it(tmp_path):
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {DEAF!r}])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    found = outcomes_of([part("parent", code, seconds=2)], tmp_path)
    assert found["parent"].verdict == "out of time"
    number = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{number}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and nobody has asked how
            return
        time.sleep(0.1)
    pytest.fail("a process of an ended part is still there")


def test_the_plan_ends_in_time(tmp_path):
    parts = [part("first", "import time; time.sleep(60)"), part("second", "print(1)")]
    found = outcomes_of(parts, tmp_path, seconds=4)
    assert found["first"].verdict == "out of time" and found["first"].seconds < 10
    assert found["second"].verdict == "not run" and found["second"].why == "no time left"
    assert plan.exit_code(parts, list(found.values())) == 1


def test_a_part_knows_its_time(tmp_path):
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "{seconds}", "{minutes}"]
    parts = [Part(name="asks", what="", seconds=12.5, command=command)]
    outcomes_of(parts, tmp_path)
    assert (tmp_path / "asks.log").read_text() == "['12', '0.2']\n"


def test_an_interruption_ends_the_part_and_leaves_the_others_out(tmp_path):
    parts = [part("first", "import time; time.sleep(60)"), part("second", "print(1)")]
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    found = outcomes_of(parts, tmp_path)
    assert found["first"].verdict == "interrupted"
    assert found["second"].why == "the plan was interrupted"
    assert plan.exit_code(parts, list(found.values())) == 130


def test_parts_are_chosen_by_name():
    parts = [part(name, "") for name in ("step", "gate-adapter", "gate-steps", "rest")]

    def names(**options):
        return [one.name for one in plan.choose(parts, **options)]

    assert names(only=["rest", "gate"]) == ["gate-adapter", "gate-steps", "rest"]
    assert names(skip=["gate-adapter", "step"]) == ["gate-steps", "rest"]
    with pytest.raises(ValueError, match="there is no part stop; choose from step, gate-adapter"):
        names(skip=["stop"])


# The plan for a GPU


def test_the_plan_is_in_the_order_of_worth():
    names = [one.name for one in gpu.parts(Path("out"))]
    wanted = [
        "step",
        "graph",
        "gate-adapter",
        "tuning",
        "goals",
        "bookkeeping",
        "capture",
        "rest",
        "compiled",
    ]
    assert [name for name in names if name in wanted] == wanted
    assert names[0] == "machine" and names[-1] == "compiled"
    assert "compiled" not in [one.name for one in gpu.parts(Path("out"), compiled=False)]


def test_everything_is_written_to_one_folder():
    for one in gpu.parts(Path("/somewhere/else")):
        if one.name == "machine":
            continue
        places = [word for word in one.command if word.startswith("/somewhere/else")]
        assert places, f"{one.name} does not write to the folder"


def test_only_the_compiled_part_has_compiled_peers():
    for one in gpu.parts(Path("out")):
        if "benchmarks.timings" in one.command:
            assert ("--compiled-only" if one.name == "compiled" else "--no-compiled") in one.command


def test_tuned_plans_are_those_of_the_folder():
    timed = [one for one in gpu.parts(Path("/out")) if "benchmarks.timings" in one.command]
    assert len(timed) == 5
    assert all(one.environment == {"ADALORA_FAST_TUNED": "/out/tuned"} for one in timed)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=290, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses():
    done = command()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu.py: no CUDA device is visible; --dry-run needs none\n"
    assert command("--dry-run", "--parts", "stop").returncode == 2


def test_the_list():
    done = command("--list", "--skip", "gate", "--no-compiled")
    assert done.returncode == 0 and "a whole training step, eager" in done.stdout
    assert "gate" not in done.stdout and "compiled peers" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run(tmp_path):
    chosen = ("--parts", "graph", "tuning", "bookkeeping")
    done = command("--dry-run", "--output", str(tmp_path), *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = {one["name"]: one["verdict"] for one in json.loads((tmp_path / "plan.json").read_text())}
    assert saved["graph"] == "done" and saved["tuning"] == "not run" and saved["bookkeeping"] == "done"
    figures = json.loads((tmp_path / "graph.json").read_text())["contestants"]
    assert all("needs a CUDA device" in one["missing"] for one in figures.values())
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert results["scale"] == "tiny" and all(row["what"]["backend"] == "triton" for row in rows)
    assert {row["suite"] for row in rows if row["value"]} == {"importance", "orthogonality", "allocation"}
    assert "Written to" in done.stdout and (tmp_path / "bookkeeping.log").exists()
