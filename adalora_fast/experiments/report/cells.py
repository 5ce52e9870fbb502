"""One arm on one task over its seeds, and averages over tasks, in points."""

from dataclasses import dataclass

from .collect import Run, Sweep
from .estimates import mean_std
from .published import COLUMNS, CONVENTIONS, glue_average


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Mean and standard deviation (n - 1) over the `seeds` of `planned` that are complete; None without."""

    mean: float | None
    std: float | None
    seeds: int
    planned: int

    @property
    def is_whole(self) -> bool:
        return self.seeds == self.planned

    def text(self, digits: int = 2) -> str:
        """Such as "81.25 ± 0.40", "81.25 (1 of 3 seeds)", or "–"."""
        if self.mean is None:
            return "–"
        shown = f"{self.mean:.{digits}f}" + (f" ± {self.std:.{digits}f}" if self.std is not None else "")
        return shown if self.is_whole else f"{shown} ({self.seeds} of {self.planned} seeds)"


def _cell(values: list[float], planned: int) -> Cell:
    mean, std = mean_std(values) if values else (None, None)
    return Cell(mean=mean, std=std, seeds=len(values), planned=planned)


def primary_cell(sweep: Sweep, task: str, arm: str) -> Cell:
    """The primary metric at the end of training."""
    values = [run.points for run in sweep.of(task, arm).values()]
    return _cell(values, len(sweep.plan.seeds))


def checkpoint_cell(sweep: Sweep, task: str, arm: str) -> Cell:
    """The primary metric of the epoch with the best one, of the runs that recorded it."""
    best = [run.result.get("best_epoch") for run in sweep.of(task, arm).values()]
    return _cell([100 * entry["primary"] for entry in best if entry], len(sweep.plan.seeds))


def metric_of(run: Run, split: str, metric: str) -> float | None:
    """One metric of one split in points; None where the run does not have it."""
    value = run.result["metrics"].get(split, {}).get(metric)
    return None if value is None else 100 * value


def metric_cell(sweep: Sweep, task: str, arm: str, split: str, metric: str) -> Cell:
    values = [metric_of(run, split, metric) for run in sweep.of(task, arm).values()]
    return _cell([value for value in values if value is not None], len(sweep.plan.seeds))


def metric_names(sweep: Sweep, task: str) -> list[tuple[str, str]]:
    """(split, metric) of everything but the loss that the task's runs measured."""
    return list(dict.fromkeys(
        (split, name)
        for run in sweep.task_runs(task)
        for split, values in run.result["metrics"].items()
        for name in values
        if name != "loss" and not name.endswith("_thresh")  # thresholds are no share of anything
    ))  # fmt: skip


def column_cells(sweep: Sweep, arm: str) -> dict[str, Cell]:
    """Cells by column key of published tables, of the tasks whose every seed is complete."""
    cells = {}
    for column in COLUMNS:
        if column.task in sweep.plan.tasks and sweep.is_whole(column.task, arm):
            cell = metric_cell(sweep, column.task, arm, column.split, column.metric)
            if cell.is_whole and cell.mean is not None:
                cells[column.key] = cell
    return cells


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Of one arm: the mean over the sweep's tasks of the primary metric with its standard deviation over
    seeds, None where a run is missing; and the GLUE average by convention, None unless all its tasks are
    here.
    """

    here: Cell
    glue: dict[str, float | None]


def averages(sweep: Sweep, arm: str) -> Averages:
    """The average of seed s is over its runs of all tasks; only arms without a missing run have one."""
    planned = len(sweep.plan.seeds)
    if not all(sweep.is_whole(task, arm) for task in sweep.plan.tasks):
        return Averages(here=_cell([], planned), glue=dict.fromkeys(CONVENTIONS))
    by_seed = [
        sum(sweep.runs[task, arm, seed].points for task in sweep.plan.tasks) / len(sweep.plan.tasks)
        for seed in sweep.plan.seeds
    ]
    values = {key: cell.mean for key, cell in column_cells(sweep, arm).items()}
    return Averages(
        here=_cell(by_seed, planned), glue={name: glue_average(values, name) for name in CONVENTIONS}
    )
