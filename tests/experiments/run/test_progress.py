"""The progress display: lines in a log, bars on a terminal."""

import io

import pytest
from rich.console import Console

from adalora_fast.experiments.run import progress as module
from adalora_fast.experiments.run.progress import TrainingProgress
from tests.helpers.tiny import printed, quiet_console


def terminal():
    return Console(file=io.StringIO(), width=120, force_terminal=True)


def two_runs(progress, steps=3):
    for label in ("first", "second"):
        progress.start_run(label, steps)
        for _ in range(steps):
            progress.advance()
            progress.note("loss 0.5")
        progress.finish_run(f"{label}: done")


def test_without_a_terminal_one_line_per_run():
    console = quiet_console()
    with TrainingProgress(runs=2, console=console) as progress:
        progress.count("reading", 1, 2)
        progress.count("reading", 2, 2)
        two_runs(progress)
    assert printed(console) == "first: done\nsecond: done\n"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by when they are told to."""
    time = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_without_a_terminal_a_line_a_minute_with_the_time_left(clock):
    console = quiet_console()
    with TrainingProgress(console=console) as progress:
        progress.start_run("fisher", 100, done=10)
        for step in range(90):
            clock[0] += 7
            progress.note(f"loss {step}.5")
            progress.advance()
        for _ in range(10):  # the last evaluation has no steps
            clock[0] += 7
            progress.pulse("evaluating")
        progress.finish_run("fisher: done")
    said = printed(console).splitlines()
    assert said[:2] == [
        "fisher: step 19 of 100, loss 8.5, 9 min left",
        "fisher: step 28 of 100, loss 17.5, 8 min left",
    ]
    assert said[-2:] == ["fisher: step 100 of 100, evaluating", "fisher: done"]
    assert len(said) == 12


def test_without_a_terminal_the_time_left_of_all_runs(clock):
    console = quiet_console()
    with TrainingProgress(runs=3, console=console) as progress:
        for label in ("first", "second", "third"):
            progress.start_run(label, 20)
            for _ in range(20):
                clock[0] += 20
                progress.advance()
            progress.finish_run(f"{label}: done")
    said = printed(console).splitlines()
    assert said[0] == "run 1 of 3, first: step 3 of 20, 6 min left (19 min left of all)"
    assert said[7] == "run 2 of 3, second: step 3 of 20, 6 min left (12 min left of all)"
    assert sum("second" in line for line in said) == 7  # six of them, and the last one


def test_reading_files_says_how_far_it_is(clock):
    console = quiet_console()
    with TrainingProgress(console=console) as progress:
        for done in range(1, 11):
            clock[0] += 30
            progress.count("reading", done, 10)
    assert printed(console).splitlines()[0] == "reading: 2 of 10"


def test_bars_of_all_runs_and_of_the_one_at_work():
    with TrainingProgress(runs=2, console=terminal()) as progress:
        progress.start_run("first", 10)
        for _ in range(4):
            progress.advance()
        progress.note("loss 0.5")
        whole, one = progress.bars.tasks
        assert (whole.total, whole.completed, whole.fields["note"]) == (20, 4, "run 1 of 2")
        assert (one.total, one.completed, one.fields["note"]) == (10, 4, "loss 0.5")
        progress.finish_run("first: done")
        progress.start_run("second", 10, done=3)
        whole, one = progress.bars.tasks
        assert (whole.completed, whole.fields["note"]) == (13, "run 2 of 2")
        assert (one.description, one.completed) == ("second", 3)


def test_a_single_run_has_one_bar():
    with TrainingProgress(console=terminal()) as progress:
        progress.start_run("only", 5, done=2)
        assert [(bar.description, bar.completed, bar.total) for bar in progress.bars.tasks] == [
            ("only", 2, 5)
        ]


def test_runs_that_were_complete_count():
    with TrainingProgress(runs=3, console=terminal()) as progress:
        progress.finish_run("first: already complete")
        progress.start_run("second", 10)
        assert progress.bars.tasks[0].completed == 10
        assert progress.bars.tasks[0].fields["note"] == "run 2 of 3"


def test_the_bar_of_a_count_goes_away():
    with TrainingProgress(console=terminal()) as progress:
        progress.count("reading", 0, 2)
        progress.count("reading", 1, 2)
        assert [(bar.description, bar.completed, bar.total) for bar in progress.bars.tasks] == [
            ("reading", 1, 2)
        ]
        progress.count("reading", 2, 2)
        assert progress.bars.tasks == []


def test_the_display_ends_with_an_error():
    console = terminal()
    with pytest.raises(RuntimeError, match="stop"), TrainingProgress(console=console) as progress:
        progress.start_run("only", 5)
        raise RuntimeError("stop")
    assert progress.bars.live.is_started is False


def test_on_a_terminal_the_lines_stay():
    console = terminal()
    with TrainingProgress(runs=2, console=console) as progress:
        two_runs(progress)
    shown = printed(console)
    assert "first: done" in shown and "second: done" in shown


@pytest.mark.parametrize("line", ["run in /a/[b]/c", "done [/x]", "[bold]"])
def test_brackets_are_text(line):
    console = quiet_console()
    with TrainingProgress(console=console) as progress:
        progress.finish_run(line)
    assert printed(console) == line + "\n"
