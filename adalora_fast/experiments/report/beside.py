"""Published numbers beside this sweep's own, and whether the two are of the same model."""

import re
from dataclasses import dataclass

from .cells import Cell, averages, column_cells
from .collect import Sweep
from .published import Column, PublishedRow, PublishedTable, published_tables


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The part of a published table that has to do with a sweep: its columns and rows, our cells by arm and
    column key, and our averages by arm in the table's convention, without a spread (none without the whole of
    GLUE).
    """

    table: PublishedTable
    columns: tuple[Column, ...]
    rows: tuple[PublishedRow, ...]
    own: dict[str, dict[str, Cell]]
    averages: dict[str, Cell]
    same_model: bool


def tables_beside(sweep: Sweep) -> list[Beside]:
    """The published tables with a task of the sweep and an arm whose runs of it are complete; those of the
    sweep's model first.
    """
    parts = (_part(sweep, table) for table in published_tables())
    return sorted((part for part in parts if part is not None), key=lambda part: not part.same_model)


def models_of(sweep: Sweep) -> list[str]:
    """The models of the sweep's runs."""
    return sorted({run.result["model"] for run in sweep.runs.values()})


def _part(sweep: Sweep, table: PublishedTable) -> Beside | None:
    columns = tuple(column for column in table.columns if column.task in sweep.plan.tasks)
    keys = {column.key for column in columns}
    arms = {row.arm for row in table.rows}
    found = {arm: column_cells(sweep, arm) for arm in sweep.plan.arms if arm in arms}
    own = {arm: cells for arm, cells in found.items() if keys & cells.keys()}
    if not own:
        return None
    glue = {arm: averages(sweep, arm).glue.get(table.convention) for arm in own}
    planned = len(sweep.plan.seeds)
    return Beside(
        table=table,
        columns=columns,
        rows=tuple(row for row in table.rows if keys & row.values.keys()),
        own=own,
        averages={
            arm: Cell(mean=value, std=None, seeds=planned, planned=planned)
            for arm, value in glue.items()
            if value is not None
        },
        same_model=all(_is_of(model, table.model) for model in models_of(sweep)),
    )


def _is_of(model: str, published: str) -> bool:
    """Whether a model's name or path says that it is the published one: distilbert-base is no bert-base."""
    return re.search(rf"(?<![a-z]){re.escape(published)}", model.lower()) is not None
