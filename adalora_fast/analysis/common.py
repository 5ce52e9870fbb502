"""What every comparison begins and ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adalora_fast.environment import environment, writing_to
from adalora_fast.experiments.data.tasks import Task, get_task
from adalora_fast.experiments.settings.settings import RunSettings

from .groups import groups_of, in_order
from .rows import AnyRows, RowSet
from .saved import SavedRun, names_of, open_runs
from .shared import SharedModel
from .translations import PairSet


def open_in_order(folders: Sequence[Path | str], model: str | None) -> tuple[list[SavedRun], RunSettings]:
    """The runs in these folders, in the order of `groups.in_order`, and the settings that they have in
    common; `model` in place of the base model that they name.
    """
    runs = in_order(open_runs(folders))
    settings = runs[0].settings
    return runs, settings if model is None else replace(settings, model=model)


def data_of(
    settings: RunSettings, parts: Mapping[str, AnyRows], shared: SharedModel, generate: bool = False
) -> RowSet | PairSet:
    """The rows, ready for the model.

    Raises:
        ValueError: `generate` for a task that generates nothing.
    """
    if get_task(settings.task).kind == "translation":
        return PairSet(settings, parts, shared.tokenizer, shared.device, generates=generate)
    if generate:
        raise ValueError(f"generate is for translations, and these runs are on {settings.task}; leave it out")
    return RowSet(settings, parts, shared.tokenizer, shared.device)


def some_of(part: AnyRows, rows: int | None) -> AnyRows:
    """So many rows, always the same ones; ValueError for fewer than two."""
    if rows is not None and rows < 2:
        raise ValueError(f"{rows} rows are too few to compare runs on; take 2 or more")
    return part.take(rows)


def make_folder(output: Path | None) -> None:
    """Before anything slow: a place that cannot be written to is said at once."""
    if output is None:
        return
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)


def header(runs: list[SavedRun], settings: RunSettings, precision: str) -> dict[str, Any]:
    """What was compared, for result files: `metrics` are those that a run wrote of itself, by split, and
    `rows` says on how many.
    """
    return {
        "task": settings.task,
        "model": settings.model,
        "precision": precision,
        "runs": [
            {
                "name": name,
                "folder": str(run.path),
                "method": run.settings.label,
                "group": group,
                "seed": run.settings.seed,
                "target_r": run.settings.recipe.target_r,
                "primary": run.result.get("primary"),
                "metrics": run.result.get("metrics", {}),
                "rows": {name: part["rows"] for name, part in run.result.get("splits", {}).items()},
            }
            for run, name, group in zip(runs, names_of(runs), groups_of(runs), strict=True)
        ],
        "environment": environment(),
    }


def of_split(part: AnyRows, split: str | None, task: Task) -> dict[str, Any]:
    """Which rows, for result files."""
    return {"split": split or task.evaluation[0], **part.described}
