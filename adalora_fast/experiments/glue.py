"""One training run on a GLUE task: from what the user asked for to a folder, with every mistake found
before training.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from .models import resolve_model
from .progress import TrainingProgress
from .recipes import load_recipe, recipe_for
from .report import results_table
from .runs import RunSettings, open_run
from .tasks import Split, Task, get_task, load_split


def run_glue(
    *,
    task_name: str,
    model: str,
    data_dir: Path | None,
    output: Path | None,
    recipe: str | None,
    overrides: dict[str, Any],
    options: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Train and evaluate once; return result.json. `overrides` go into the recipe, `options` into the
    settings.
    """
    task = get_task(task_name)
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    settings = RunSettings(
        task=task.name,
        model=model,
        data_dir=None if data_dir is None else str(data_dir.expanduser().absolute()),
        recipe=load_recipe(recipe or recipe_for(model), task.name, **overrides),
        **options,
    )
    check_score(settings)
    folder = open_run(default_output(settings) if output is None else output, settings)
    if not folder.is_complete:
        resolve_model(model)
        splits = load_splits(task, data_dir)
    from .training import train_run

    with TrainingProgress(console=console) as progress:
        result = train_run(settings, task, lambda: splits, folder.path, progress)
    console.print(results_table([result], title=f"{task.name}, {model}"))
    for split, values in result["metrics"].items():
        console.print(
            f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), highlight=False
        )
    console.print(f"run  {folder.path}", highlight=False, markup=False, soft_wrap=True)
    return result


def check_score(settings: RunSettings) -> None:
    """ValueError where the score or its smoothing does not exist."""
    if settings.method != "adalora":
        return
    from adalora_fast.scores import get_score, resolve_smoothing

    resolve_smoothing(get_score(settings.score), settings.smoothing)


def default_output(settings: RunSettings) -> Path:
    """runs/<task>/<model>-<method>-seed<seed>"""
    return Path("runs") / settings.task / f"{Path(settings.model).name}-{settings.label}-seed{settings.seed}"


def load_splits(task: Task, data_dir: Path | None) -> dict[str, Split]:
    return {name: load_split(task, name, data_dir) for name in ("train", *task.evaluation)}
