"""One training run: from what the user asked for to a folder, with every mistake found before training."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from adalora_fast.experiments.data.tasks import get_task
from adalora_fast.experiments.methods.bottleneck import check_bottlenecks
from adalora_fast.experiments.methods.fusion import open_sources
from adalora_fast.experiments.methods.nulls import check_null, register_nulls
from adalora_fast.experiments.models.packages import resolve_model
from adalora_fast.experiments.settings.recipes import load_recipe, model_of, read_recipe, recipe_for
from adalora_fast.experiments.settings.settings import RunSettings

from .folder import is_main_process, open_run
from .progress import TrainingProgress


def run_single(
    *,
    task_name: str,
    model: str | None,
    data_dir: Path | None,
    output: Path | None,
    recipe: str | None,
    overrides: dict[str, Any],
    options: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Train and evaluate once; return result.json. `overrides` go into the recipe, `options` into the
    settings; without a `model` it is the recipe's.
    """
    task = get_task(task_name)
    recipe = recipe or recipe_for(model, task.name)
    model = model or model_of(read_recipe(recipe), recipe)
    settings = RunSettings(
        task=task.name,
        model=whole_path(model),
        data_dir=whole_folder(data_dir),
        **options,
    )
    settings = replace(settings, recipe=load_recipe(recipe, task.name, settings.arm, **overrides))
    check_score(settings)
    check_bottlenecks(settings)
    if not is_main_process():
        console = Console(quiet=True)
    folder = open_run(default_output(settings) if output is None else output, settings)
    with TrainingProgress(console=console) as progress:
        if folder.is_complete:
            progress.finish_run(f"{settings.label}: already complete in {folder.path}")
            result = folder.result
        else:
            resolve_model(model)
            open_sources(settings)
            result = start_run(settings, folder.path, progress)
    from .runs_table import results_table

    console.print(results_table([result], title=f"{task.name}, {model}"))
    for split, values in result["metrics"].items():
        console.print(
            f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), highlight=False
        )
    console.print(f"run  {folder.path}", highlight=False, markup=False, soft_wrap=True)
    return result


def start_run(settings: RunSettings, output: Path, progress: TrainingProgress) -> dict[str, Any]:
    """Read the data of these settings and train."""
    from adalora_fast.experiments.data.workloads import load_workload

    from .training import train_run

    with open_run(output, settings).locked():
        pass  # if another process is at work on it, that is said before the data are read
    return train_run(settings, load_workload(settings), output, progress)


def whole_path(model: str) -> str:
    """A local folder's whole path, so that a run means the same from everywhere; names stay names."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def whole_folder(data_dir: Path | None) -> str | None:
    """The whole path of the data, spelled in one way; None, for the hub, stays."""
    return None if data_dir is None else os.path.abspath(data_dir.expanduser())


def check_score(settings: RunSettings) -> None:
    """ValueError where the score or its smoothing does not exist."""
    if settings.method != "adalora":
        return
    from adalora_fast.allocator.scores import get_score, resolve_smoothing

    register_nulls()
    check_null(settings)
    resolve_smoothing(get_score(settings.score), settings.smoothing)


def default_output(settings: RunSettings) -> Path:
    """runs/<task>/<model>-<method>-seed<seed>"""
    return Path("runs") / settings.task / f"{Path(settings.model).name}-{settings.label}-seed{settings.seed}"
