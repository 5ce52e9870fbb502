"""One run for the page: its numbers, rank maps and curves, rounded and thinned.

A curve is {"x": steps, "y": values}, with "of" how many were logged where not all are there; null is a value
that is not finite. Rank maps are lists of ranks in the
order of the run's grid; null stands for the same map as before.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from adalora_fast.experiments.models.families import locate_matrix
from adalora_fast.experiments.report.collect import Run, read_lines
from adalora_fast.experiments.report.masks import KINDS, churn_of
from adalora_fast.experiments.report.sections_run import machine_of
from adalora_fast.experiments.report.tables import metric_name

MOST_MAPS = 100  # of one run; a longer one is shown at every n-th log step
MOST_POINTS = 200  # of one curve
Curve = dict[str, Any]


class Distinct:
    """Values that many runs share, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        """Where this value stands in `values`."""
        key = json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


class RunData:
    """Collects what runs have in common: grids of layers and matrices, and settings."""

    def __init__(self) -> None:
        self.grids = Distinct()
        self.settings = Distinct()

    def of(self, run: Run) -> dict[str, Any]:
        """Everything that the page shows of one run, and in "notes" what its folder does not have.

        ValueError naming the file and the line that no run of this package wrote.
        """
        result, notes = run.result, []
        best = result.get("best_epoch") or {}
        own: dict[str, Any] = {
            "task": run.task, "arm": run.arm, "seed": run.seed, "sample": bool(result["sample"]),
            "words": metric_name(result["primary_metric"]), "primary": rounded(run.points),
            "best": rounded(100 * best["primary"]) if best else None,
            "metrics": [
                [_metric_words(run, split, name), rounded(value if name == "loss" else 100 * value)]
                for split, values in result["metrics"].items()
                for name, value in values.items()
            ],
            "counts": {
                "total_rank": result.get("total_rank") or None,
                "parameters": result.get("trainable_parameters"),
                "steps": result.get("steps"), "seconds": result.get("seconds"),
            },
            "facts": _facts(run), "settings": self.settings.place(_settings(run)),
        }  # fmt: skip
        if not (run.folder / "config.json").is_file():
            notes.append("It has no config.json: its settings, commit and machine are not known.")
        lines = read_lines(run.folder / "allocation.jsonl")
        log = read_lines(run.folder / "metrics.jsonl")
        own |= self._ranks(run, lines, notes) | _masks(run, lines, notes) | _log(run, lines, log, notes)
        return own | {"notes": notes}

    def _ranks(self, run: Run, lines: list[dict], notes: list[str]) -> dict[str, Any]:
        """Final ranks, and the maps at log steps."""
        if not run.ranks:
            exists = (run.folder / "ranks.json").is_file()
            notes.append(
                "Nothing in it has ranks." if exists else "It has no ranks.json: no ranks are known."
            )
            return {}
        final = list(run.ranks.values())
        own = {"init_r": run.init_r, "grid": self.grids.place(grid(list(run.ranks))), "final": final}
        logged = {line["step"]: line["ranks"] for line in lines if "ranks" in line}
        if not logged:
            notes.append(
                "It has no allocation.jsonl (a method without allocation, or an older version): of its ranks "
                "only the final ones are known."
            )
            return own
        for step, ranks in logged.items():
            is_map = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
            if not is_map or len(ranks) != len(final):
                raise ValueError(
                    f"{run.folder / 'allocation.jsonl'}: the ranks of step {step} are not {len(final)} whole "
                    "numbers, as ranks.json has them; delete that line"
                )
        steps = sorted(logged)
        shown = thin(steps, MOST_MAPS)
        maps = [logged[step] for step in shown]
        same = [None if before == after else after for before, after in zip([None, *maps], maps)]
        return own | {"maps": {"steps": shown, "ranks": same, "logged": len(steps)}}


def grid(names: list[str]) -> dict[str, Any]:
    """{"rows": layers, "columns": matrices, "places": [[row, column], ...] of the names}. Matrices that are
    not all in places of their own in numbered layers are one column, with their names as rows.
    """
    found = [locate_matrix(name) for name in names]
    located = [place for place in found if place is not None]
    if len(set(located)) < len(names):
        return {"rows": names, "columns": ["rank"], "places": [[i, 0] for i in range(len(names))]}
    layers = sorted({layer for layer, _ in located})
    matrices = list(dict.fromkeys(matrix for _, matrix in located))
    places = [[layers.index(layer), matrices.index(matrix)] for layer, matrix in located]
    return {"rows": [str(layer) for layer in layers], "columns": matrices, "places": places}


def _masks(run: Run, lines: list[dict], notes: list[str]) -> dict[str, Any]:
    """Churn in per cent, without the first mask, before which nothing was pruned; the shares of λ, P and Q in
    Σ |term|, in per cent.
    """
    masks = [line for line in lines if isinstance(line.get("mask"), dict)]
    if lines and not masks:
        notes.append(
            "Its allocation.jsonl has no lines of masks (an older version): churn and shares are not known."
        )
    if not masks:
        return {}
    try:
        churn = {line["step"]: 100 * churn_of(line) for line in masks[1:]}
        terms = {line["step"]: line["terms"]["share"] for line in masks if line.get("terms")}
        shares = {kind: {step: 100 * own[kind] for step, own in terms.items()} for kind in KINDS}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run.folder / 'allocation.jsonl'} has a mask without kept, revived or shares ({error}); delete "
            "that line"
        ) from error
    own: dict[str, Any] = {"churn": curve(churn)} if churn else {}
    if terms:
        return own | {"share": {kind[-1]: curve(values) for kind, values in shares.items()}}
    notes.append("Its masks have no shares of λ, P and Q: its ranks do not come of scores.")
    return own


def _log(run: Run, lines: list[dict], log: list[dict], notes: list[str]) -> dict[str, Any]:
    """Budget, losses and metrics by step; metrics in points."""
    if not log:
        notes.append("It has no metrics.jsonl: neither losses nor metrics by step are known.")
    budget = _column(lines, "budget") or _column(log, "adalora/budget")
    loss = _column(log, "loss")
    if any(value is not None and not math.isfinite(value) for value in loss.values()):
        notes.append("Its loss was not finite at some steps; the curve has gaps there.")
    losses, metrics = [], []
    for split, values in run.result["metrics"].items():
        for name in values:
            found = _column(log, f"eval_{split}_{name}")
            words = _metric_words(run, split, name)
            if found and name == "loss":
                losses.append({"name": words, **curve(found)})
            elif found and not name.endswith("_thresh"):  # thresholds are no share of anything
                metrics.append({"name": words, **curve({step: 100 * v for step, v in found.items()})})
    own = {"budget": curve(budget)} if budget else {}
    losses = ([{"name": "training", **curve(loss)}] if loss else []) + losses
    return own | {"loss": losses, "curves": metrics}


def _metric_words(run: Run, split: str, name: str) -> str:
    """Such as "accuracy", with the split where there are several."""
    several = len(run.result["metrics"]) > 1
    words = "evaluation loss" if name == "loss" else metric_name(name)
    return f"{words} ({split})" if several else words


def _facts(run: Run) -> list[list[str]]:
    settings, environment = run.settings, run.environment
    facts = {
        "score": settings.get("score"),
        "smoothing": settings.get("smoothing"),
        "attention": run.result.get("attention"),
        "started": environment.get("started"),
        "commit": environment.get("commit"),
        "machine": machine_of(environment) if environment else None,
    }
    return [[name, str(value)] for name, value in facts.items() if value is not None]


def _settings(run: Run) -> list[list[str]]:
    recipe = run.settings.get("recipe") or {}
    return [
        [name, f"{value:g}" if isinstance(value, float) else str(value)]
        for name, value in recipe.items()
        if value is not None
    ]


def _column(lines: list[dict], key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in lines if isinstance(line.get(key), int | float)}


def curve(values: dict[int, float]) -> Curve:
    steps = thin(sorted(values), MOST_POINTS)
    own: Curve = {"x": steps, "y": [rounded(values[step]) for step in steps]}
    return own if len(steps) == len(values) else own | {"of": len(values)}


def thin(steps: Sequence[int], most: int) -> list[int]:
    """Every n-th of the steps, with the smallest n that leaves no more than `most`; the last always."""
    if len(steps) <= most:
        return list(steps)
    stride = -(-(len(steps) - 1) // (most - 1))
    return [*steps[:-1:stride], steps[-1]]


def rounded(value: float | None, digits: int = 6) -> float | None:
    """To significant digits, as an int where it is whole; None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() else short
