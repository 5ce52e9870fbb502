"""How long a run takes: the seconds of all its parts, where it was interrupted and went on.

Every line of metrics.jsonl says how many seconds the run has taken so far. A run that goes on from a
checkpoint keeps the lines up to it, so its clock goes on from there too: steps that were lost and are
repeated count once.
"""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from adalora_fast.experiments.settings.files import read_object

from .folder import RunFolder
from .lines import read_lines
from .progress import TrainingProgress, duration


@dataclass(kw_only=True)
class Stopwatch:
    """Seconds of a run, earlier parts included.

    `step` is where it goes on (0: it begins). `seconds` and `train_seconds` are those of the earlier parts up
    to there, and `after` the seconds after each of them. `is_known` is false where an earlier version of this
    package, which wrote none, trained a part. `begins_again` is true where an interrupted attempt left no
    checkpoint.
    """

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    after: list[float] = field(default_factory=list)
    is_known: bool = True
    begins_again: bool = False

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        self._training: float | None = None

    @classmethod
    def of(cls, folder: RunFolder, checkpoint: str | None) -> "Stopwatch":
        """The watch of the run in `folder` that goes on from `checkpoint`; None: it begins, maybe again."""
        lines = read_lines(folder.working / "metrics.jsonl")
        if checkpoint is None:
            return cls(begins_again=bool(lines))
        step = int(Path(checkpoint).name.rpartition("-")[2])
        last = next((line for line in reversed(lines) if line["step"] <= step), {})
        config = folder.working / "config.json"
        parts = read_object(config).get("resumed", []) if config.is_file() else []
        after = [part.get("seconds") for part in parts]
        if None in after or "seconds" not in last:
            return cls(step=step, is_known=False)
        after.append(last["seconds"])
        return cls(step=step, seconds=after[-1], train_seconds=last["train_seconds"], after=after)

    @property
    def described(self) -> dict[str, Any]:
        """Where this part goes on, for config.json."""
        return {"step": self.step, "seconds": self.seconds if self.is_known else None}

    @property
    def parts(self) -> list[float]:
        """The seconds of every part that the run is made of, the one at work included."""
        ends = [0.0, *self.after, self.now()["seconds"]]
        lengths = [end - start for start, end in pairwise(ends)]
        return [round(seconds, 2) for seconds in lengths if seconds > 0]

    def announce(self, label: str, progress: TrainingProgress) -> None:
        """Say that the run goes on, or begins again."""
        if self.begins_again:
            progress.say(f"{label}: begins again, as what was interrupted left no checkpoint to go on from")
        elif self.step:
            spent = f", {duration(self.seconds)} so far" if self.is_known else ""
            progress.say(f"{label}: resumed after step {self.step}{spent}")

    def begin_training(self) -> None:
        self._training = time.perf_counter()

    def end_training(self) -> None:
        """From now on only the whole run's seconds go on."""
        self.train_seconds, self._training = self.now()["train_seconds"], None

    def now(self) -> dict[str, float]:
        """Seconds until now, for a line of metrics.jsonl."""
        now = time.perf_counter()
        training = 0.0 if self._training is None else now - self._training
        return {
            "train_seconds": round(self.train_seconds + training, 2),
            "seconds": round(self.seconds + now - self._started, 2),
        }

    def result(self) -> dict[str, Any]:
        """For result.json; `part_seconds` where there are several parts and the seconds of all are known."""
        own = {"part_seconds": self.parts} if self.step and self.is_known else {}
        return {**self.now(), **own}

    def parts_in_words(self) -> str:
        """What to say behind the seconds of the result."""
        if not self.step:
            return ""
        return f" in {len(self.parts)} parts" if self.is_known else " (of the last part)"
