"""What mixtures of runs came to, kept in a file line by line, so that an interrupted command goes on.

A line is one evaluation, under what it was made of: `rows` (a hash of the base model's weights, the rows, how
they are tokenised, and the precision) and `mixture` (which runs, by what they trained, and their weights).

    {"rows": "...", "mixture": [["<run>", 0.3], ["<run>", 0.7]], "loss": 0.41, "metrics": {...}}

Lines of other rows or other runs stay, and are found again by the command that they are of.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from adalora_fast.environment import writing_to
from adalora_fast.experiments.data.rows import vocabulary_of
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.locks import locked

from .features import hash_of_base
from .rows import AnyRows, Evaluation, content_of
from .shared import SharedModel

Mixture = tuple[tuple[str, float], ...]


def mixture_of(runs: Sequence[str], weights: Sequence[float]) -> Mixture:
    """Fingerprints of runs with their weights, in an order of their own: a mixture is the same both ways."""
    # The weights of a path and of its way back differ in their last digits.
    return tuple(sorted((run, round(weight, 9)) for run, weight in zip(runs, weights, strict=True) if weight))


def hash_of_rows(shared: SharedModel, rows: AnyRows, settings: RunSettings, generate: bool = False) -> str:
    """A hash of everything but the runs that decides a loss, and of what is generated beside it."""
    recipe = settings.recipe
    content = [hash_of_base(shared.model), shared.precision, settings.task, content_of(rows)]
    content += [vocabulary_of(shared.tokenizer), recipe.max_length, recipe.stride]
    content += [recipe.n_best, recipe.max_answer_length]
    content += [recipe.beams] if generate else []
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Evaluations:
    """Evaluations by mixture: `with Evaluations(path, rows) as done:` then `get`, `add`.

    `path` of None keeps them for as long as this lives. `others` is how many lines are of other rows, and
    `damaged` how many are none; the last line of a file that was cut off while it was written is taken away.

    Raises:
        BlockingIOError: another process is at work on the file.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | None, rows: str) -> None:
        self.path, self.rows = path, rows
        self.others = self.damaged = 0
        self._known: dict[Mixture, Evaluation] = {}
        self._file: IO[bytes] | None = None  # for appending, without a buffer
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> "Evaluations":
        if self.path is not None:
            with ExitStack() as opened:
                with writing_to(self.path):
                    self._file = opened.enter_context(self.path.open("a+b", buffering=0))
                opened.enter_context(locked(self.path))
                self._read(self._file)
                self._close = opened.pop_all().close
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __contains__(self, mixture: Mixture) -> bool:
        return mixture in self._known

    def get(self, mixture: Mixture) -> Evaluation:
        """KeyError where it has not been evaluated."""
        return self._known[mixture]

    def add(self, mixture: Mixture, evaluation: Evaluation) -> None:
        """Keep one; it is in the file when this returns."""
        self._known[mixture] = evaluation
        if self._file is not None:
            line = {"rows": self.rows, "mixture": mixture, **asdict(evaluation)}
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def _read(self, file: IO[bytes]) -> None:
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
        for text in content[:whole].splitlines():
            line = _parsed(text)
            if line is None:
                self.damaged += 1
            elif line[0] != self.rows:
                self.others += 1
            else:
                self._known[line[1]] = line[2]


def _parsed(text: bytes) -> tuple[str, Mixture, Evaluation] | None:
    """None where it is no line of this file's."""
    try:
        line: dict[str, Any] = json.loads(text)
        mixture = tuple((str(run), float(weight)) for run, weight in line["mixture"])
        metrics = {str(name): float(value) for name, value in line["metrics"].items()}
        return str(line["rows"]), mixture, Evaluation(loss=float(line["loss"]), metrics=metrics)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
