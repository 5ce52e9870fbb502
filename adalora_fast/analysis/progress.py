"""What a long comparison says while it works: a bar with the time left, or a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS = 60.0  # between lines
Advance = Callable[[], None]


class AnalysisProgress:
    """`with progress.steps("paths", 780) as advance:` then `advance()` after each; `say` for a line that
    stays.

    Where nobody is looking (a log file), `steps` prints a line every `seconds`, and none if it is done
    sooner.
    """

    def __init__(self, console: Console | None = None, *, seconds: float = SECONDS) -> None:
        self.console = console or Console(file=sys.stderr)
        self.seconds = seconds

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, description: str, total: int) -> Iterator[Advance]:
        """Steps of which there are `total`, all about equally long."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            yield self._lines(description, total)
            return
        with Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            transient=True,
            speed_estimate_period=600,  # a step may take longer than the 30 seconds that are usual
        ) as bars:
            bar = bars.add_task(description, total=total)
            yield lambda: bars.advance(bar)

    def _lines(self, description: str, total: int) -> Advance:
        started = said = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said >= self.seconds and done < total:
                said = now
                left = (now - started) / done * (total - done)
                self.say(f"{description}: {done} of {total}, {duration(left)} left")

        return advance


class Silent(AnalysisProgress):
    """Says nothing, for calls from Python."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
