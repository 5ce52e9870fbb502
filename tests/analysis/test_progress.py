"""Bars on a terminal, and elsewhere a line now and then."""

import io

import pytest
from rich.console import Console

from adalora_fast.analysis import progress
from adalora_fast.analysis.progress import AnalysisProgress, Silent
from adalora_fast.experiments.run.progress import duration
from tests.helpers.tiny import printed, quiet_console


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by when they are told to."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_lines_now_and_then(clock):
    console = quiet_console()
    with AnalysisProgress(console, seconds=60).steps("paths", 100) as advance:
        for _ in range(100):
            clock[0] += 7
            advance()
    assert printed(console).splitlines()[:2] == [
        "paths: 9 of 100, 11 min left",
        "paths: 18 of 100, 10 min left",
    ]
    assert len(printed(console).splitlines()) == 11


def test_nothing_of_what_is_soon_done(clock):
    console = quiet_console()
    with AnalysisProgress(console).steps("paths", 3) as advance:
        for _ in range(3):
            advance()
    assert printed(console) == ""
    with Silent().steps("paths", 1) as advance:
        advance()


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with AnalysisProgress(console).steps("paths", 8) as advance:
        for _ in range(4):
            advance()
    assert "paths" in printed(console) and "left" in printed(console) and "8" in printed(console)


def test_durations():
    assert [duration(s) for s in (4.4, 119, 125, 7200, 3 * 3600 + 299)] == [
        "4 s",
        "2 min",
        "2 min",
        "2 h 00 min",
        "3 h 05 min",
    ]
