"""One tidy progress display for any number of training runs: all of them, and the one at work."""

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


class TrainingProgress:
    """`with TrainingProgress(...) as progress:` then `start_run`, `advance` per step and `finish_run` per
    run.

    Where nobody is looking (a log file), one line per finished run is printed instead of bars.
    """

    def __init__(self, *, console: Console, runs: int = 1) -> None:
        self.console = console
        self._runs = runs
        self._finished = 0
        self._known: list[int] = []  # steps of every run so far
        note = TextColumn("{task.fields[note]:<13}")
        self.bars = progress_bars(console, note, disable=not is_watched(console))
        self._all: TaskID | None = None
        self._one: TaskID | None = None

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
        if self._runs > 1:
            # The others are taken to be as long, on the mean, as those that trained here.
            mean = sum(self._known) / len(self._known)
            before = mean * (self._finished - len(self._known) + 1) + sum(self._known[:-1])
            total = before + steps + mean * (self._runs - self._finished - 1)
            if self._all is None:
                self._all = self.bars.add_task("all runs", total=total, note="")
            note = f"run {self._finished + 1} of {self._runs}"
            self.bars.update(self._all, total=total, completed=before + done, note=note)
        self._one = self.bars.add_task(label, total=steps, completed=done, note="")

    def advance(self) -> None:
        for bar in (self._all, self._one):
            if bar is not None:
                self.bars.advance(bar)

    def note(self, text: str) -> None:
        """A few words beside the bar of the run at work, such as its loss."""
        if self._one is not None:
            self.bars.update(self._one, note=text)

    def finish_run(self, line: str) -> None:
        """Replace the bar of the run at work by one line that stays."""
        self._finished += 1
        if self._one is not None:
            self.bars.remove_task(self._one)
            self._one = None
        self.bars.console.print(line, highlight=False, markup=False)

    def count(self, description: str, done: int, total: int) -> None:
        """A bar for something short before training, such as reading files; it goes away when it is full."""
        if self._one is None:
            self._one = self.bars.add_task(description, total=total, note="")
        self.bars.update(self._one, completed=done)
        if done == total:
            self.bars.remove_task(self._one)
            self._one = None
