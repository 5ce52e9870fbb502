"""Tables made from result files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from .runs import read_json


def find_runs(folder: Path) -> list[Path]:
    """Every complete run below `folder` (itself included), by name; unfinished ones are left out."""
    files = folder.rglob("result.json")
    return sorted(path.parent for path in files if not any(part.endswith(".partial") for part in path.parts))


def load_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """result.json of every folder."""
    return [read_json(folder / "result.json") for folder in folders]


def results_table(results: list[dict[str, Any]], *, title: str = "", majority: float | None = None) -> Table:
    """One row per run; a star marks results on a sample of the official data. `majority` adds the trivial
    answer.
    """
    tasks = {result["task"] for result in results}
    metrics = sorted({result["primary_metric"] for result in results})
    table = Table(
        title=title or None, title_justify="left", caption=_caption(results), caption_justify="left"
    )
    if len(tasks) > 1:
        table.add_column("task")
    table.add_column("method")
    table.add_column(" or ".join(metrics), justify="right")
    table.add_column("parameters trained", justify="right")
    table.add_column("total rank", justify="right")
    table.add_column("seconds", justify="right")
    if majority is not None:
        table.add_row("majority class", f"{majority:.3f}", "0", "–", "–")
    for result in results:
        row = [
            result["method"] + (f" (seed {result['seed']})" if result["seed"] else ""),
            f"{result['primary']:.3f}" + ("*" if result["sample"] else ""),
            f"{result['trainable_parameters']:,}",
            str(result["total_rank"]) if result["total_rank"] else "–",
            f"{result['seconds']:.0f}",
        ]
        table.add_row(*([result["task"]] if len(tasks) > 1 else []), *row)
    return table


def _caption(results: list[dict[str, Any]]) -> str | None:
    if any(result["sample"] for result in results):
        return (
            "* trained or evaluated on a sample of the official data: not comparable with published numbers"
        )
    return None
