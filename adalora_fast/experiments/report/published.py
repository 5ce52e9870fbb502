"""Numbers that others published, as they stand in their papers: published.json, read and checked."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table: one metric on one split."""

    task: str
    split: str
    metric: str
    heading: str

    @property
    def key(self) -> str:
        """What published.json calls it."""
        return f"{self.task}/{self.split}/{self.metric}"


COLUMNS = tuple(
    Column(task=task, split=split, metric=metric, heading=heading)
    for task, split, metric, heading in (
        ("mrpc", "validation", "accuracy", "MRPC acc"),
        ("sst2", "validation", "accuracy", "SST-2 acc"),
        ("cola", "validation", "matthews", "CoLA mcc"),
        ("qqp", "validation", "accuracy", "QQP acc"),
        ("qqp", "validation", "f1", "QQP F1"),
        ("qnli", "validation", "accuracy", "QNLI acc"),
        ("rte", "validation", "accuracy", "RTE acc"),
        ("mnli", "validation_matched", "accuracy", "MNLI m"),
        ("mnli", "validation_mismatched", "accuracy", "MNLI mm"),
        ("stsb", "validation", "pearson_spearman", "STS-B corr"),
        ("squad", "validation", "exact_match", "SQuAD EM"),
        ("squad", "validation", "f1", "SQuAD F1"),
        ("squad_v2", "validation", "exact_match", "SQuAD 2 EM"),
        ("squad_v2", "validation", "f1", "SQuAD 2 F1"),
        ("wmt16_ro_en", "validation", "bleu", "En-Ro BLEU"),
    )
)
GLUE_TASKS = ("mrpc", "sst2", "cola", "qqp", "qnli", "rte", "mnli", "stsb")
CONVENTIONS = ("nine", "eight")


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One method's numbers in points by column key; `arm` is the arm of ours that it corresponds to."""

    label: str
    arm: str
    values: dict[str, float]
    average: float | None


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A published table, of runs of `model`. `convention` is how its averages are taken (see `glue_average`):
    None where it has none.
    """

    key: str
    title: str
    source: str
    convention: str | None
    seeds: str
    notes: str
    rows: tuple[PublishedRow, ...]
    model: str = "deberta-v3-base"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that this table has, in the order of `COLUMNS`."""
        return tuple(column for column in COLUMNS if any(column.key in row.values for row in self.rows))


@cache
def published_tables() -> tuple[PublishedTable, ...]:
    """Every table of published.json."""
    return tuple(
        PublishedTable(**table | {"rows": tuple(PublishedRow(**row) for row in table["rows"])})
        for table in json.loads(FILE.read_text(encoding="utf-8"))
    )


def glue_average(values: dict[str, float], convention: str) -> float | None:
    """The GLUE average of one method's values by column key; None unless every task is there.

    nine:  mean of MRPC, SST-2, CoLA, QQP accuracy, QNLI, RTE, MNLI matched, MNLI mismatched, STS-B
    eight: mean of MRPC, SST-2, CoLA, mean(QQP accuracy, QQP F1), QNLI, RTE, mean(MNLI m, mm), STS-B

    WNLI is in neither. ValueError for another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; choose one of {', '.join(CONVENTIONS)}")
    groups: list[list[float | None]] = []
    for task in GLUE_TASKS:
        own = [values.get(column.key) for column in COLUMNS if column.task == task]
        if convention == "eight":
            groups.append(own)
        else:
            groups.extend([[value] for value in (own[:1] if task == "qqp" else own)])
    if any(value is None for group in groups for value in group):
        return None
    return sum(sum(group) / len(group) for group in groups) / len(groups)
