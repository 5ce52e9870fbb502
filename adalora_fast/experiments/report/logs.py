"""What a run logged on its way: budget, development metric and importance scores by step."""

from dataclasses import dataclass

import numpy as np

from .collect import Run, read_lines

QUANTILES = ("p10", "p50", "p90", "lowest_kept")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity at some optimizer steps: mean, lowest and highest over seeds, each [steps]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ArmCurves:
    """Of one arm: the budget in triplets, the primary metric in points, and quantiles of the scores; None
    and {} where nothing was logged.
    """

    budget: Curve | None
    metric: Curve | None
    scores: dict[str, Curve]


def arm_curves(runs: list[Run]) -> ArmCurves:
    """The curves of one arm's runs, at the steps that all of them logged."""
    allocations = [read_lines(run.folder / "allocation.jsonl") for run in runs]
    logs = [read_lines(run.folder / "metrics.jsonl") for run in runs]
    budgets = [
        _column(lines, "budget") or _column(log, "adalora/budget") for lines, log in zip(allocations, logs)
    ]
    scores = {
        name: join([{step: entry[name] for step, entry in _scores(lines).items()} for lines in allocations])
        for name in QUANTILES
    }
    return ArmCurves(
        budget=join(budgets),
        metric=join([_evaluations(run, log) for run, log in zip(runs, logs)]),
        scores={name: curve for name, curve in scores.items() if curve is not None},
    )


def _column(lines: list[dict], key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in lines if isinstance(line.get(key), int | float)}


def _scores(lines: list[dict]) -> dict[int, dict[str, float]]:
    """The quantiles at the steps that have all of them."""
    found = {}
    for line in lines:
        entry = line.get("scores")
        if isinstance(entry, dict) and all(isinstance(entry.get(name), int | float) for name in QUANTILES):
            found[line["step"]] = entry
    return found


def _evaluations(run: Run, log: list[dict]) -> dict[int, float]:
    """The primary metric in points at every step at which all splits were evaluated."""
    keys = [f"eval_{split}_{run.result['primary_metric']}" for split in run.result["metrics"]]
    by_step: dict[int, dict[str, float]] = {}
    for line in log:
        by_step.setdefault(line["step"], {}).update({key: line[key] for key in keys if key in line})
    return {
        step: 100 * float(np.mean(list(values.values())))
        for step, values in by_step.items()
        if len(values) == len(keys)
    }


def join(seeds: list[dict[int, float]]) -> Curve | None:
    """The curve over the steps that all seeds have; None where there are none."""
    steps = sorted(set.intersection(*(set(own) for own in seeds))) if seeds else []
    if not steps:
        return None
    values = np.array([[own[step] for step in steps] for own in seeds], dtype=float)  # [seeds, steps]
    return Curve(
        steps=np.array(steps), mean=values.mean(axis=0), low=values.min(axis=0), high=values.max(axis=0)
    )
