"""The tasks as data, and how the rows of the GLUE ones are read (those of SQuAD: `squad`, of WMT:
`translation`).

Rows come from `DIR/<task>/<split>.parquet` with the column names of `nyu-mll/glue`, or from the hub. Where a
whole split is absent, `<split>_sample.parquet` is used and the result is marked as a sample.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pyarrow

HUB_DATASET = "nyu-mll/glue"
FROM_TRAIN = "_from_train_sample"  # ends the name of a split that is cut out of the training data


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    `kind` is classification, regression, question_answering or translation (`text_columns` are then the
    languages, from the first to the second). `labels` are the class names in the order of their codes; only a
    classification has any. `label_range` is that of a regression's numbers. The first of `metrics` is the one
    by which results are compared; `evaluation` names the splits that are evaluated.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    kind: str = "classification"
    evaluation: tuple[str, ...] = ("validation",)
    hub_dataset: str = HUB_DATASET
    hub_name: str = ""
    label_range: tuple[float, float] = (-math.inf, math.inf)

    @property
    def is_regression(self) -> bool:
        return self.kind == "regression"

    @property
    def num_labels(self) -> int:
        """Outputs of the classification head: one number for a regression."""
        return len(self.labels) or 1

    @property
    def hub_address(self) -> tuple[str, ...]:
        """What `datasets.load_dataset` is given."""
        part = self.hub_name or (self.name if self.hub_dataset == HUB_DATASET else "")
        return (self.hub_dataset, part) if part else (self.hub_dataset,)


_ENTAILMENT = ("entailment", "not_entailment")
_PARAPHRASE = ("not_equivalent", "equivalent")
_SENTENCES = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="mrpc", text_columns=_SENTENCES, labels=_PARAPHRASE, metrics=("accuracy", "f1")),
        Task(name="sst2", text_columns=("sentence",), labels=("negative", "positive"), metrics=("accuracy",)),
        Task(
            name="cola",
            text_columns=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
        ),
        Task(name="rte", text_columns=_SENTENCES, labels=_ENTAILMENT, metrics=("accuracy",)),
        Task(name="qnli", text_columns=("question", "sentence"), labels=_ENTAILMENT, metrics=("accuracy",)),
        Task(
            name="qqp",
            text_columns=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
        ),
        Task(
            name="wnli",
            text_columns=_SENTENCES,
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
        ),
        Task(
            name="stsb",
            text_columns=_SENTENCES,
            labels=(),
            metrics=("pearson_spearman", "pearson", "spearman"),
            kind="regression",
            label_range=(0.0, 5.0),
        ),
        Task(
            name="mnli",
            text_columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            evaluation=("validation_matched", "validation_mismatched"),
        ),
        Task(
            name="squad",
            text_columns=("question", "context"),
            labels=(),
            metrics=("f1", "exact_match"),
            kind="question_answering",
            hub_dataset="rajpurkar/squad",
        ),
        Task(
            name="squad_v2",
            text_columns=("question", "context"),
            labels=(),
            metrics=("f1", "exact_match"),
            kind="question_answering",
            hub_dataset="rajpurkar/squad_v2",
        ),
        Task(
            name="wmt16_ro_en",
            text_columns=("en", "ro"),
            labels=(),
            metrics=("bleu", "chrf"),
            kind="translation",
            hub_dataset="wmt/wmt16",
            hub_name="ro-en",
        ),
    )
}


class Rows(ABC):
    """What every split of data can do with its rows; a frozen dataclass with these fields."""

    source: str
    sample: bool

    @property
    def described(self) -> dict[str, Any]:
        """What result files say of it."""
        return {"rows": len(self), "source": self.source, "sample": self.sample}

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> Self:
        """These rows, in this order."""

    @property
    @abstractmethod
    def keys(self) -> list[Hashable]:
        """What must not be the same on both sides of `hold_out`, for every row."""

    def take(self, count: int | None) -> Self:
        """`count` rows, always the same ones, in the order of the file; then it is a sample."""
        if count is None or count >= len(self):
            return self
        return replace(self.select(some_rows(len(self), count)), sample=True)

    def without(self, others: "Rows") -> Self:
        """The rows whose key is none of theirs."""
        theirs = set(others.keys)
        return self.select([row for row, key in enumerate(self.keys) if key not in theirs])

    def hold_out(self, fraction: float) -> tuple[Self, Self]:
        """(the rest, about `fraction` of the rows), always the same ones, no key on both sides."""
        held = held_out_rows(self.keys, fraction)
        return self.select([row for row in range(len(self)) if row not in held]), self.select(sorted(held))


@dataclass(frozen=True, kw_only=True)
class Split(Rows):
    """Rows of one split: one column of texts per text column, and the labels.

    `source` is the file or hub address; `sample` is true where it is only part of the official split.
    """

    texts: tuple[list[str], ...]
    labels: list[int] | list[float]
    source: str
    sample: bool

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> "Split":
        """These rows, in this order."""
        texts = tuple([column[row] for row in rows] for column in self.texts)
        return replace(self, texts=texts, labels=[self.labels[row] for row in rows])

    @property
    def keys(self) -> list[Hashable]:
        """The text, or both texts."""
        return list(zip(*self.texts, strict=True))

    @property
    def label_counts(self) -> dict[str, int]:
        """How often each label occurs, by its code as a string."""
        return {str(label): self.labels.count(label) for label in sorted(set(self.labels))}


def some_rows(total: int, count: int) -> list[int]:
    """`count` of `total` rows, drawn once and for all, in increasing order."""
    return sorted(random.Random(0).sample(range(total), count))


def held_out_rows(keys: Sequence[Hashable], fraction: float) -> set[int]:
    """About `fraction` of the rows, always the same ones; rows with equal keys stay together.

    Raises:
        ValueError: the fraction is not between 0 and 1, or there are fewer than two keys.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the part held out is {fraction}; choose one between 0 and 1")
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if len(groups) < 2:
        raise ValueError("all rows have the same text, which cannot be on both sides; give more rows")
    order = list(groups.values())
    random.Random(0).shuffle(order)
    sizes = list(accumulate(len(rows) for rows in order[:-1]))
    count = 1 + min(range(len(sizes)), key=lambda i: abs(sizes[i] - fraction * len(keys)))
    return {row for rows in order[:count] for row in rows}


def get_task(name: str) -> Task:
    """The task of this name; ValueError listing all of them where there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load_split(task: Task, split: str | Path, data_dir: Path | None) -> Split:
    """Read one split from `data_dir`, or from the hub where it is None, and check every label. A Path as
    `split` is that parquet file.
    """
    table, source, sample = read_table(task, split, data_dir, (*task.text_columns, "label"))
    labels = table.column("label").to_pylist()
    _check_labels(task, labels, source)
    texts = tuple(table.column(column).to_pylist() for column in task.text_columns)
    for column, values in zip(task.text_columns, texts, strict=True):
        bad = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
        if bad is not None:
            raise ValueError(
                f"{source} row {bad}: {column} is {values[bad]!r}, not a text; remove or fix that row"
            )
    return Split(texts=texts, labels=labels, source=source, sample=sample)


def read_table(
    task: Task, split: str | Path, data_dir: Path | None, columns: Sequence[str]
) -> tuple["pyarrow.Table", str, bool]:
    """(the table, where it is from, whether it is a sample) of one split that has these columns and some
    rows. A Path as `split` is that file.
    """
    if isinstance(split, Path):
        if not split.is_file():
            raise FileNotFoundError(f"there is no file {split}; check --file")
        table, source, sample = _read_parquet(split), str(split), False
    elif data_dir is None:
        table, source, sample = _read_hub(task, split), f"{'/'.join(task.hub_address)}:{split}", False
    else:
        path = find_split_file(task, split, Path(data_dir).expanduser())
        table, source, sample = _read_parquet(path), str(path), path.stem != split
    for column in columns:
        if column not in table.column_names:
            raise ValueError(
                f"{source} has no column {column!r} (it has {', '.join(table.column_names)}); "
                f"rename its columns to {', '.join(columns)}"
            )
    if not table.num_rows:
        raise ValueError(f"{source} has no rows; give a file with at least one")
    return table, source, sample


def find_split_file(task: Task, split: str, data_dir: Path) -> Path:
    """`<split>.parquet`, else a sample of it; FileNotFoundError naming what was looked for."""
    folder = data_dir / task.name
    names = [f"{split}.parquet", f"{split}_sample.parquet", f"{split}{FROM_TRAIN}.parquet"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {names[0]} or {names[1]} in {folder}; check --data-dir, task and split")


def _read_parquet(path: Path) -> "pyarrow.Table":
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:  # OSError: a damaged page
        raise ValueError(
            f"{path} is not readable parquet ({str(error).splitlines()[0]}); write it again"
        ) from error


def _read_hub(task: Task, split: str) -> "pyarrow.Table":
    import datasets

    try:
        return datasets.load_dataset(*task.hub_address, split=split).data.table
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, offline mode, or nothing cached
        why = " ".join(str(error).split())[:120]
        raise FileNotFoundError(
            f"{task.hub_dataset} ({task.name}, {split}) is not reachable ({why}); give a local folder with "
            "--data-dir or ADALORA_FAST_DATA"
        ) from error


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_labels(task: Task, labels: list, source: str) -> None:
    if task.is_regression:
        low, high = task.label_range
        allowed = f"a number from {low:g} to {high:g}"
        bad = [row for row, y in enumerate(labels) if not _is_number(y, int | float) or not low <= y <= high]
    else:
        allowed = f"an integer from 0 to {task.num_labels - 1}"
        bad = [row for row, y in enumerate(labels) if not _is_number(y, int) or not 0 <= y < task.num_labels]
    if bad and all(label == -1 for label in labels):
        raise ValueError(
            f"{source} has no labels: all are -1, as in the test splits of GLUE, whose labels are not "
            "published; give labelled rows"
        )
    if bad:
        raise ValueError(
            f"{source} row {bad[0]}: label {labels[bad[0]]!r} is not {allowed}; fix or remove that row"
        )
