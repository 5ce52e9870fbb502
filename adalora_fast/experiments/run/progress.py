"""One tidy progress display for any number of training runs: all of them, and the one at work. Bars on a
terminal; a plain line now and then where nobody is looking (a log file, a pipe).
"""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS = 60.0  # between lines


def is_watched(console: Console) -> bool:
    """Whether a bar that moves is of use there."""
    return console.is_terminal and not console.is_dumb_terminal


def progress_bars(console: Console, *more: ProgressColumn, **options: Any) -> Progress:
    """What is done and the time left, in the same form in every command."""
    return Progress(
        TextColumn("{task.description:<28}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), *more,
        console=console, expand=True, **options,
    )  # fmt: skip


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class Pace:
    """The time left of `total` equal steps, `done` of them from before, by the speed of those since."""

    def __init__(self, total: float, done: float = 0) -> None:
        self.total, self.done = total, done
        self._before, self._started = done, time.monotonic()

    def left(self) -> str:
        """Such as "12 min left"; "" before the first step and after the last one."""
        here = self.done - self._before
        if here <= 0 or self.done >= self.total:
            return ""
        return f"{duration((time.monotonic() - self._started) / here * (self.total - self.done))} left"


class TrainingProgress:
    """`with TrainingProgress(...) as progress:` then `start_run`, `advance` per step and `finish_run` per
    run.

    Where nobody is looking, a line every `seconds` takes the place of the bars, none where it is done sooner.
    """

    def __init__(self, *, console: Console, runs: int = 1, seconds: float = SECONDS) -> None:
        self.console = console
        self.seconds = seconds
        self._runs = runs
        self._finished = 0
        self._known: list[int] = []  # steps of every run so far
        note = TextColumn("{task.fields[note]:<13}")
        self._watched = is_watched(console)
        self.bars = progress_bars(console, note, disable=not self._watched)
        self._all: TaskID | None = None
        self._one: TaskID | None = None
        self._label, self._note = "", ""
        self._pace, self._pace_of_all = Pace(0), Pace(0)
        self._said = time.monotonic()

    def __enter__(self) -> "TrainingProgress":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bars.stop()

    def start_run(self, label: str, steps: int, done: int = 0) -> None:
        """A run of `steps` optimizer steps begins, `done` of them from an earlier attempt."""
        self._known.append(steps)
        self._label, self._note, self._pace = label, "", Pace(steps, done)
        if self._runs > 1:
            # The others are taken to be as long, on the mean, as those that trained here.
            mean = sum(self._known) / len(self._known)
            before = mean * (self._finished - len(self._known) + 1) + sum(self._known[:-1])
            total = before + steps + mean * (self._runs - self._finished - 1)
            if self._all is None:
                self._all = self.bars.add_task("all runs", total=total, note="")
                self._pace_of_all = Pace(total, before + done)
            note = f"run {self._finished + 1} of {self._runs}"
            self.bars.update(self._all, total=total, completed=before + done, note=note)
            self._pace_of_all.total = total
        self._one = self.bars.add_task(label, total=steps, completed=done, note="")

    def advance(self) -> None:
        for bar in (self._all, self._one):
            if bar is not None:
                self.bars.advance(bar)
        self._pace.done += 1
        self._pace_of_all.done += 1
        self.pulse()

    def pulse(self, doing: str = "") -> None:
        """Say how far the run at work is, and what it is `doing` if that is no step, where a line is due."""
        if self._label:
            now = (doing or self._note, self._pace.left())
            self._say_now_and_then(
                f"{self._label}: step {self._pace.done:.0f} of {self._pace.total:.0f}", *now
            )

    def note(self, text: str) -> None:
        """A few words beside the bar of the run at work, such as its loss."""
        self._note = text
        if self._one is not None:
            self.bars.update(self._one, note=text)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def finish_run(self, line: str) -> None:
        """Replace the bar of the run at work by one line that stays."""
        self._finished += 1
        self._label, self._said = "", time.monotonic()
        if self._one is not None:
            self.bars.remove_task(self._one)
            self._one = None
        self.say(line)

    def count(self, description: str, done: int, total: int) -> None:
        """A bar for something short before training, such as reading files; it goes away when it is full."""
        if self._one is None:
            self._one = self.bars.add_task(description, total=total, note="")
        self.bars.update(self._one, completed=done)
        if done == total:
            self.bars.remove_task(self._one)
            self._one = None
        else:
            self._say_now_and_then(f"{description}: {done} of {total}")

    def _say_now_and_then(self, *parts: str) -> None:
        now = time.monotonic()
        if self._watched or now - self._said < self.seconds:
            return
        self._said = now
        line = ", ".join(filter(None, parts))
        if self._runs > 1 and self._label:
            left = self._pace_of_all.left()
            line = f"run {self._finished + 1} of {self._runs}, {line}" + (f" ({left} of all)" if left else "")
        self.say(line)
