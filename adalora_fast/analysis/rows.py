"""The rows on which runs are compared, and the loss and metrics of a model on them.

The loss is that of training, computed from the logits in float64, as a mean over all rows: cross-entropy,
mean squared error, or the mean of the cross-entropies of start and end. Those are over a window's own tokens,
so that no loss depends on the padding of a batch.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding

from adalora_fast.experiments.data.question_answering import QuestionAnswering
from adalora_fast.experiments.data.squad import QuestionSplit, load_questions
from adalora_fast.experiments.data.tasks import Split, Task, get_task, held_out_rows, load_split
from adalora_fast.experiments.data.translation import PairSplit, load_pairs
from adalora_fast.experiments.data.workloads import Classification, Workload
from adalora_fast.experiments.settings.settings import RunSettings

PADDING = -100.0  # of logits, as in transformers' Trainer
# Tokens of a batch, padding included: what fits a processor's cache, and what fills an accelerator.
TOKENS = {"cpu": 2048, "other": 32768}
Logits = tuple[np.ndarray, ...]
AnyRows = Split | QuestionSplit | PairSplit
LOADERS = {"question_answering": load_questions, "translation": load_pairs}  # by kind of task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss and the task's metrics (fractions)."""

    loss: float
    metrics: dict[str, float]


def read_rows(settings: RunSettings, split: str | None = None, data_dir: Path | None = None) -> AnyRows:
    """A split of the run's task; None is the first one that is evaluated. `train` is read whole.

    Raises:
        ValueError: the task has no such split.
    """
    task = get_task(settings.task)
    split = split or task.evaluation[0]
    if split not in (*task.evaluation, "train"):
        raise ValueError(f"{task.name} has no split {split!r} to compare on; choose {_or(task.evaluation)}")
    if data_dir is None and settings.data_dir is not None:
        data_dir = Path(settings.data_dir)
    return LOADERS.get(task.kind, load_split)(task, split, data_dir)


def selection_and_report(
    settings: RunSettings, kind: str, split: str | None = None, data_dir: Path | None = None
) -> tuple[AnyRows, AnyRows]:
    """(rows to choose by, rows to report on), with no text on both sides.

    Args:
        kind: halves (of the evaluation split, with equally many rows of a class in both), or held_out (the
            part of the training data that these runs were not trained on, and the evaluation split).

    Raises:
        ValueError: another kind, or held_out where the runs were trained on all of the training data.
    """
    if kind == "halves":
        return halves(read_rows(settings, split, data_dir))
    if kind != "held_out":
        raise ValueError(f"unknown selection {kind!r}; choose halves or held_out")
    if not settings.held_out:
        raise ValueError(
            "these runs were trained on all of the training data, so none of it is held out; choose halves"
        )
    held = read_rows(settings, "train", data_dir).hold_out(settings.held_out)[1]
    return held, read_rows(settings, split, data_dir)


def halves(rows: AnyRows) -> tuple[AnyRows, AnyRows]:
    """Two parts of about the same size, always the same ones, no text in both; of a class (rows with one
    text count as the first of them) each has a half. One class can be left with a single text, which is then
    in the second part.
    """
    keys = rows.keys
    labels = (
        list(rows.labels) if isinstance(rows, Split) and isinstance(rows.labels[0], int) else [0] * len(rows)
    )
    class_of: dict[Hashable, int] = {}
    for key, label in zip(keys, labels, strict=True):
        class_of.setdefault(key, label)
    chosen: set[int] = set()
    for label in sorted(set(class_of.values())):
        own = [row for row, key in enumerate(keys) if class_of[key] == label]
        if len({keys[row] for row in own}) > 1:
            chosen |= {own[row] for row in held_out_rows([keys[row] for row in own], 0.5)}
    if not chosen:
        raise ValueError("every class has one text only, which cannot be in both halves; give more rows")
    rest = [row for row in range(len(rows)) if row not in chosen]
    return rows.select(sorted(chosen)), rows.select(rest)


class RowSet:
    """Named parts of the data, tokenised and put into batches of `tokens` once, for one device."""

    def __init__(
        self,
        settings: RunSettings,
        parts: Mapping[str, Split | QuestionSplit],
        tokenizer: Any,
        device: torch.device,
        *,
        tokens: int | None = None,
    ) -> None:
        task = get_task(settings.task)
        self.task: Task = task
        self.parts = dict(parts)
        self.workload = _workload(task, settings, self.parts)
        data = self.workload.prepare(tokenizer, settings.recipe)
        self._labels = {
            part: [np.asarray(data[part][name]) for name in self.workload.label_names] for part in parts
        }
        self._batches: dict[str, list[tuple[list[int], dict[str, torch.Tensor]]]] = {}
        self._lengths: dict[str, np.ndarray] = {}
        collate = DataCollatorWithPadding(tokenizer)
        for part in parts:
            rows = data[part].remove_columns(self.workload.label_names).to_list()
            lengths = [len(row["input_ids"]) for row in rows]
            self._batches[part] = [
                (batch, dict(collate([rows[row] for row in batch]).to(device)))
                for batch in batches_of(lengths, tokens or tokens_for(device))
            ]
            self._lengths[part] = np.array(lengths)

    @property
    def primary_metric(self) -> str:
        """By which errors are counted."""
        return self.task.metrics[0]

    def logits(self, model: nn.Module, part: str) -> Logits:
        """The model's outputs on one part, rows in the order of the data: float32 [N, C], or twice [N, T]."""
        rows, outputs = [], []
        with torch.inference_mode():
            for batch, inputs in self._batches[part]:
                output = model(**inputs)
                values = (
                    (output.start_logits, output.end_logits)
                    if self.task.kind == "question_answering"
                    else (output.logits,)
                )
                rows += batch
                outputs.append([value.float().cpu().numpy() for value in values])
        order = np.argsort(rows)
        width = max(values[0].shape[1] for values in outputs)
        return tuple(
            np.concatenate(
                [
                    np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=PADDING)
                    for value in column
                ]
            )[order]
            for column in zip(*outputs, strict=True)
        )

    def judge(self, logits: Logits, part: str, what: str = "this mixture") -> Evaluation:
        """Loss and metrics of outputs on one part; ValueError naming `what` where they are not finite."""
        if self.task.kind == "question_answering":
            own = np.arange(logits[0].shape[1]) < self._lengths[part][:, None]
            masked = [np.where(own, values, -np.inf) for values in logits]
            loss = np.mean(
                [
                    cross_entropy(values, labels)
                    for values, labels in zip(masked, self._labels[part], strict=True)
                ]
            )
        elif self.task.is_regression:
            loss = np.mean((logits[0][:, 0].astype(np.float64) - self._labels[part][0]) ** 2)
        else:
            loss = cross_entropy(logits[0], self._labels[part][0])
        if not np.isfinite(loss):
            raise ValueError(f"the loss of {what} is not finite; leave out runs that diverged")
        outputs = logits if len(logits) > 1 else logits[0]
        metrics = self.workload.judge(part, outputs).metrics
        return Evaluation(
            loss=float(loss), metrics={name: float(metrics[name]) for name in self.task.metrics}
        )

    def evaluate(self, model: nn.Module, part: str, what: str = "this mixture") -> Evaluation:
        """Loss and metrics of a model on one part."""
        return self.judge(self.logits(model, part), part, what)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Rows and source of every part, for result files."""
        return {name: part.described for name, part in self.parts.items()}


def tokens_for(device: torch.device) -> int:
    """How many tokens a batch has on this device."""
    return TOKENS.get(device.type, TOKENS["other"])


def batches_of(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in order of their length, so that there is little padding, in batches of at most `tokens` tokens
    with it; a longer row is alone.
    """
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def content_of(rows: AnyRows) -> dict[str, Any]:
    """The rows themselves, whatever file they are from."""
    return {name: value for name, value in vars(rows).items() if name not in ("source", "sample")}


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of log Σ_c exp z_c − z_label, in float64. logits [N, C], labels [N]."""
    values = logits.astype(np.float64)
    values = values - values.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(values, np.asarray(labels)[:, None], axis=1)[:, 0]
    return float(np.mean(np.log(np.exp(values).sum(axis=1)) - chosen))


def _workload(task: Task, settings: RunSettings, parts: dict[str, Any]) -> Workload:
    if task.kind == "question_answering":
        # A workload also tokenises what is trained on, of which there is nothing here.
        one = next(iter(parts.values())).select([0])
        return QuestionAnswering(task=task, splits={"train": one, **parts}, recipe=settings.recipe)
    return Classification(task=task, splits=dict(parts))


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
