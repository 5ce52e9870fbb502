"""What the page shows, as plain lists and objects.

A table is {"columns": [[heading, kind], ...], "rows": [[cell, ...], ...]}; kind is text, number or interval.
A cell is a text, or {"t": text, "v": what it is sorted by} and more that one kind of cell needs.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from adalora_fast.experiments.report.cells import Cell, averages, primary_cell
from adalora_fast.experiments.report.collect import Sweep, distinct, run_of
from adalora_fast.experiments.report.contrasts import AVERAGE, Contrast, Contrasts
from adalora_fast.experiments.report.sections_contrasts import (
    LATE,
    how_compared,
    probability,
    signed,
    verdict_words,
)
from adalora_fast.experiments.report.sections_results import chance, ties
from adalora_fast.experiments.report.sections_run import (
    SAMPLE,
    changed_warning,
    machine_of,
    run_facts,
    versions_of,
)
from adalora_fast.experiments.report.tables import (
    average_heading,
    task_heading,
    task_name,
    winners,
)
from adalora_fast.experiments.run.runs_table import load_results
from adalora_fast.integrations.model_card import shown_base

from .run_data import RunData, rounded

Table = dict[str, Any]
RUN_COLUMNS = (
    ("task", "text"), ("arm", "text"), ("seed", "number"), ("state", "text"), ("metric", "text"),
    ("points", "number"), ("best epoch", "number"), ("total rank", "number"), ("parameters", "number"),
    ("steps", "number"), ("seconds", "number"),
)  # fmt: skip


def sweep_content(sweep: Sweep, contrasts: Contrasts, remarks: tuple[str, ...] = ()) -> dict[str, Any]:
    """Of a sweep. `remarks` are of what could not be drawn."""
    plan, data = sweep.plan, RunData()
    runs = [data.of(run) for run in sweep.runs.values()]
    missing = [
        {"task": gap.task, "arm": gap.arm, "seed": gap.seed, "state": gap.state, "reason": gap.reason}
        for gap in sweep.missing
    ]
    notes = [changed_warning(plan), chance(sweep), ties(winners(sweep, contrasts))]
    notes += [f"\\* {SAMPLE}"] if any(map(sweep.is_sample, plan.tasks)) else []
    declared = [contrast for contrast in contrasts.all if contrast.is_declared]
    others = [contrast for contrast in contrasts.all if not contrast.is_declared]
    return {
        "kind": "sweep",
        "title": plan.name,
        "description": plan.description,
        "facts": [list(fact) for fact in run_facts(sweep)],
        "notes": list(filter(None, notes)),
        "results": results_table(sweep, contrasts),
        "contrasts": contrast_table(sweep, declared),
        "exploratory": contrast_table(sweep, others),
        "margin": plan.margin,
        "method": how_compared(sweep, contrasts),
        "all_runs": runs_table(runs, missing),
        "remarks": [
            *(f"{remark}." for remark in (*contrasts.remarks, *remarks)),
            *(f"Left out, as the plan does not name it: {name}." for name in sweep.unplanned),
        ],
        "order": {
            "task": [[task, task_name(task)] for task in plan.tasks],
            "arm": list(plan.arms),
            "seed": list(plan.seeds),
        },
        "runs": runs,
        "missing": missing,
        "grids": data.grids.values,
        "settings": data.settings.values,
    }


def runs_content(folder: Path, places: list[Path]) -> dict[str, Any]:
    """Of the runs in a folder that is no sweep's: nothing is compared there, each run is shown."""
    found = []
    for place, result in zip(places, load_results(places)):
        _check(place / "result.json", result)
        found.append(run_of(place, {"metrics": {}, "arm": result["method"]} | result))
    twice = Counter((run.task, run.arm, run.seed) for run in found)
    data, runs = RunData(), []
    for run in found:
        own = data.of(run)
        if twice[run.task, run.arm, run.seed] > 1:
            own["arm"] = f"{run.arm} ({run.folder.relative_to(folder).as_posix()})"
        runs.append(own)
    places_run = [run.environment for run in found]
    samples = any(run.result["sample"] for run in found)
    order = {name: list(dict.fromkeys(run[name] for run in runs)) for name in ("task", "arm", "seed")}
    return {
        "kind": "runs",
        "title": folder.resolve().name,
        "description": "",
        "facts": [
            ["model", distinct(shown_base(str(run.result.get("model", "unknown"))) for run in found)],
            ["runs", str(len(found))],
            ["commit", distinct(place.get("commit") or "unknown" for place in places_run)],
            ["machine", distinct(map(machine_of, places_run))],
            ["versions", distinct(map(versions_of, places_run))],
        ],
        "notes": [f"\\* {SAMPLE}"] if samples else [],
        "all_runs": runs_table(runs, []),
        "remarks": [],
        "order": order | {"task": [[task, task_name(task)] for task in order["task"]]},
        "runs": runs,
        "missing": [],
        "grids": data.grids.values,
        "settings": data.settings.values,
    }


def _check(path: Path, result: dict[str, Any]) -> None:
    """ValueError where what the page computes with is of another kind."""
    kinds = {"task": str, "method": str, "seed": int, "primary_metric": str, "primary": int | float}
    for name, kind in kinds.items():
        if not isinstance(result[name], kind) or isinstance(result[name], bool):
            raise ValueError(f"{path}: {name} is {result[name]!r}, which no run writes; run it again")
    if not -1 <= result["primary"] <= 1:
        raise ValueError(f"{path}: primary is {result['primary']!r}, not a fraction; run it again")


def results_table(sweep: Sweep, contrasts: Contrasts) -> Table:
    """Arm × task at the end of training, as in report.md, with the number of seeds in every cell."""
    best, tasks, arms = winners(sweep, contrasts), sweep.plan.tasks, sweep.plan.arms
    heads = [task_heading(sweep, task) for task in tasks]
    if len(tasks) > 1:
        heads.append(average_heading(sweep))
    rows = []
    for arm in arms:
        cells = {task: primary_cell(sweep, task, arm) for task in tasks}
        if len(tasks) > 1:
            cells[AVERAGE] = averages(sweep, arm).here
        rows.append([arm, *(_mean(cell, best[task] == [arm]) for task, cell in cells.items())])
    return {"columns": [["arm", "text"], *([head, "number"] for head in heads)], "rows": rows}


def _mean(cell: Cell, is_best: bool) -> dict[str, Any]:
    if cell.mean is None:
        return {"t": "–", "v": None}
    text = f"{cell.mean:.2f}" + (f" ± {cell.std:.2f}" if cell.std is not None else "")
    seeds = f"n = {cell.seeds}" + ("" if cell.is_whole else f" of {cell.planned}")
    return {"t": text, "v": rounded(cell.mean), "n": seeds} | ({"best": True} if is_best else {})


def contrast_table(sweep: Sweep, found: list[Contrast]) -> Table:
    """The columns of report.md; the interval has its ends, 95 % and 90 %, to be drawn."""
    late = {frozenset(pair) for pair in sweep.plan.seen_contrasts}
    rows = []
    for contrast in found:
        mean, bounds = contrast.estimate.value, contrast.estimate.bounds
        mark = f" {LATE}" if {contrast.a, contrast.b} in late and contrast.is_declared else ""
        ends = (bounds.low, bounds.high, bounds.low90, bounds.high90)
        row: list[Any] = [
            task_name(contrast.task),
            f"{contrast.a} − {contrast.b}{mark}",
            verdict_words(contrast),
            {"t": str(contrast.seeds), "v": contrast.seeds},
            {"t": signed(mean), "v": rounded(mean)},
            {"t": f"{signed(bounds.low)} to {signed(bounds.high)}", "v": rounded(mean),
             "ends": list(map(rounded, ends)), "kind": _kind(contrast.verdict)},
            {"t": probability(bounds.p), "v": rounded(bounds.p)},
        ]  # fmt: skip
        if contrast.holm_p is not None:
            row.append({"t": probability(contrast.holm_p), "v": rounded(contrast.holm_p)})
        rows.append(row)
    columns = [["task", "text"], ["arms", "text"], ["verdict", "text"], ["seeds", "number"]]
    columns += [["difference", "number"], ["95 % interval", "interval"], ["p", "number"]]
    columns += [["Holm's p", "number"]] if any(contrast.is_declared for contrast in found) else []
    return {"columns": columns, "rows": rows}


def _kind(verdict: str) -> str:
    """How the interval looks, by how the verdict begins."""
    kinds = ("differs", "equivalent", "not decided", "exploratory")
    return next(kind for kind in kinds if verdict.startswith(kind)).split()[0]


def runs_table(runs: list[dict[str, Any]], missing: list[dict[str, Any]]) -> Table:
    """Every run, those that are not complete with their state and reason; "run" is its place among `runs`."""
    rows = []
    for number, run in enumerate(runs):
        counts = [
            _count(run["counts"].get(name)) for name in ("total_rank", "parameters", "steps", "seconds")
        ]
        rows.append([
            task_name(run["task"]) + ("*" if run["sample"] else ""), {"t": run["arm"], "run": number},
            {"t": str(run["seed"]), "v": run["seed"]}, "complete", run["words"],
            _points(run["primary"]), _points(run["best"]), *counts,
        ])  # fmt: skip
    for gap in missing:
        state = gap["state"] + (f": {gap['reason']}" if gap["reason"] else "")
        rows.append([
            task_name(gap["task"]), gap["arm"], {"t": str(gap["seed"]), "v": gap["seed"]}, state, "–",
            *[{"t": "–", "v": None}] * 6,
        ])  # fmt: skip
    return {"columns": [list(column) for column in RUN_COLUMNS], "rows": rows}


def _points(value: float | None) -> dict[str, Any]:
    return {"t": "–" if value is None else f"{value:.2f}", "v": value}


def _count(value: float | None) -> dict[str, Any]:
    return {"t": "–" if value is None else f"{value:,.0f}", "v": value}
