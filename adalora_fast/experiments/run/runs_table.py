"""Tables made from result files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from adalora_fast.experiments.settings.files import read_object

COLUMNS = {
    "task",
    "method",
    "seed",
    "sample",
    "primary",
    "primary_metric",
    "trainable_parameters",
    "total_rank",
    "seconds",
}


def find_runs(folder: Path) -> list[Path]:
    """Every complete run below `folder` (itself included), by name; unfinished ones are left out."""
    found = []
    for path in folder.rglob("result.json"):
        below = path.relative_to(folder).parts
        if not any(part.startswith(".") and part.endswith(".partial") for part in below):
            found.append(path.parent)
    return sorted(found)


def load_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """result.json of every folder; ValueError naming one that no run of this package wrote."""
    results = []
    for folder in folders:
        path = folder / "result.json"
        result = read_object(path)
        missing = COLUMNS - result.keys()
        if missing:
            raise ValueError(
                f"{path} has no {sorted(missing)[0]!r}: it is no result of a run; look elsewhere"
            )
        results.append(result)
    return results


def results_table(results: list[dict[str, Any]], *, title: str = "", majority: float | None = None) -> Table:
    """One row per run; a star marks results on a sample of the official data. `majority` adds the trivial
    answer.
    """
    tasks = {result["task"] for result in results}
    metrics = sorted({result["primary_metric"] for result in results})
    table = Table(
        title=escape(title) if title else None,
        title_justify="left",
        caption=_caption(results),
        caption_justify="left",
    )
    if len(tasks) > 1:
        table.add_column("task")
    table.add_column("method")
    table.add_column(" or ".join(metrics), justify="right")
    table.add_column("parameters trained", justify="right")
    table.add_column("total rank", justify="right")
    table.add_column("seconds", justify="right")
    if majority is not None:
        table.add_row(*([""] if len(tasks) > 1 else []), "majority class", f"{majority:.3f}", "0", "–", "–")
    for result in results:
        row = [
            result["method"] + (f" (seed {result['seed']})" if result["seed"] else ""),
            f"{result['primary']:.3f}" + ("*" if result["sample"] else ""),
            f"{result['trainable_parameters']:,}",
            str(result["total_rank"]) if result["total_rank"] else "–",
            f"{result['seconds']:.0f}",
        ]
        table.add_row(*map(escape, ([result["task"]] if len(tasks) > 1 else []) + row))
    return table


def _caption(results: list[dict[str, Any]]) -> str | None:
    if any(result["sample"] for result in results):
        return (
            "* trained or evaluated on a sample of the official data: not comparable with published numbers"
        )
    return None
