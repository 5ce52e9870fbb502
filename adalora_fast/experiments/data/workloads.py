"""What a task asks of training and evaluation: the columns a model is given, what is made of its outputs."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from datasets import Dataset

from adalora_fast.experiments import metrics
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings

from .rows import Judged, load_splits, tokenize
from .tasks import Split, Task, get_task, load_split


class Workload(Protocol):
    """One task in the form that `training.train_run` works with."""

    task: Task
    label_names: list[str]

    @property
    def evaluation(self) -> tuple[str, ...]:
        """The splits that are evaluated."""

    def prepare(self, tokenizer: Any, recipe: Recipe) -> dict[str, Dataset]:
        """`train` and every evaluation split, tokenised."""

    def describe(self) -> dict[str, dict[str, Any]]:
        """What result.json says about the data of every split."""

    def judge(self, split: str, outputs: Any) -> Judged:
        """Metrics and predictions from the model's outputs on one split, rows in the order of the data."""


@dataclass(kw_only=True)
class Classification:
    """Classification or regression of texts or pairs of them; `splits` has "train" and those to evaluate."""

    task: Task
    splits: dict[str, Split]
    label_names: list[str] = field(default_factory=lambda: ["labels"])

    @property
    def evaluation(self) -> tuple[str, ...]:
        return tuple(name for name in self.splits if name != "train")

    def prepare(self, tokenizer: Any, recipe: Recipe) -> dict[str, Dataset]:
        return {name: tokenize(split, tokenizer, recipe.max_length) for name, split in self.splits.items()}

    def describe(self) -> dict[str, dict[str, Any]]:
        described = {}
        for name, split in self.splits.items():
            described[name] = split.described
            counts = split.label_counts
            if len(counts) <= 20:
                described[name]["label_counts"] = counts
        return described

    def judge(self, split: str, outputs: Any) -> Judged:
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float32)
        labels = np.asarray(self.splits[split].labels, np.float32 if self.task.is_regression else np.int64)
        predictions = logits[:, 0] if self.task.is_regression else logits.argmax(axis=1)
        return Judged(
            metrics=metrics.compute(self.task.metrics, logits, labels),
            arrays={"labels": labels, "predictions": predictions, "logits": logits},
        )


def load_workload(settings: RunSettings) -> Workload:
    """The workload of these settings; its data are read at once, so that every mistake in them shows now."""
    task = get_task(settings.task)
    if task.kind == "question_answering":
        from .question_answering import QuestionAnswering

        return QuestionAnswering.load(settings)
    if task.kind == "translation":
        from .translation import Translation

        return Translation.load(settings)
    return Classification(task=task, splits=load_splits(settings, load_split))
