"""Runs on the tiny task, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.run.progress import TrainingProgress
from adalora_fast.experiments.settings.settings import RunSettings
from tests.helpers.tiny import RECIPE, quiet_console

TASK = TASKS["sst2"]


class StopAfter(TrainingProgress):
    """The user presses Ctrl-C in step `steps` + 1."""

    def __init__(self, steps: int) -> None:
        super().__init__(console=quiet_console())
        self.left = steps

    def advance(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


def settings(encoder: Path, data_dir: Path, method: str = "adalora", **options: Any) -> RunSettings:
    values = {"task": "sst2", "model": str(encoder), "data_dir": str(data_dir), "recipe": RECIPE}
    return RunSettings(method=method, **{**values, **options})


def train(
    run: RunSettings, output: Path, *, progress: TrainingProgress | None = None, **options: Any
) -> dict[str, Any]:
    """One run of `train_run` on the task of `run`."""
    from adalora_fast.experiments.data.workloads import load_workload
    from adalora_fast.experiments.run.training import train_run

    with progress or TrainingProgress(console=quiet_console()) as progress:
        return train_run(run, load_workload(run), output, progress, **options)


def strict_json(text: str) -> Any:
    """JSON as other programs read it: without NaN and Infinity, which Python's own reader lets pass."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read(folder: Path, name: str) -> Any:
    return strict_json((folder / name).read_text())


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [strict_json(line) for line in (folder / name).read_text().splitlines()]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl or a result, less what a clock has measured."""
    clock = ("runtime", "per_second", "seconds")
    return {name: value for name, value in line.items() if not name.endswith(clock)}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
