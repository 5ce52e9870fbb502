"""What a long comparison says while it works: a bar with the time left, or a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from adalora_fast.experiments.run.progress import SECONDS, Pace, is_watched, progress_bars

Advance = Callable[[], None]


class AnalysisProgress:
    """`with progress.steps("paths", 780) as advance:` then `advance()` after each; `say` for a line that
    stays.

    Where nobody is looking (a log file), `steps` prints a line every `seconds`, and none if it is done
    sooner.
    """

    def __init__(self, console: Console, *, seconds: float = SECONDS) -> None:
        self.console = console
        self.seconds = seconds

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, description: str, total: int) -> Iterator[Advance]:
        """Steps of which there are `total`, all about equally long."""
        if not is_watched(self.console):
            yield self._lines(description, total)
            return
        # A step may take longer than the 30 seconds over which the speed is usually estimated.
        with progress_bars(self.console, transient=True, speed_estimate_period=600) as bars:
            bar = bars.add_task(description, total=total)
            yield lambda: bars.advance(bar)

    def _lines(self, description: str, total: int) -> Advance:
        said, pace = time.monotonic(), Pace(total)

        def advance() -> None:
            nonlocal said
            pace.done += 1
            now = time.monotonic()
            if now - said >= self.seconds and pace.done < total:
                said = now
                self.say(f"{description}: {pace.done} of {total}, {pace.left()}")

        return advance


class Silent(AnalysisProgress):
    """Says nothing, for calls from Python."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
