"""SQuAD in the form that training works with: windows in, answers out."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from adalora_fast.experiments.metrics.squad_core import evaluate_v1, evaluate_v2, per_question
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings

from .rows import Judged, cached, load_splits
from .squad import (
    EvaluationFeatures,
    QuestionSplit,
    evaluation_features,
    load_questions,
    training_features,
)
from .squad_answers import decode
from .tasks import Task, get_task


@dataclass(kw_only=True)
class QuestionAnswering:
    """SQuAD v1.1 or v2.0: a model that scores the first and the last token of the answer."""

    task: Task
    splits: dict[str, QuestionSplit]
    recipe: Recipe
    label_names: list[str] = field(default_factory=lambda: ["start_positions", "end_positions"])

    def __post_init__(self) -> None:
        self._features: dict[str, EvaluationFeatures] = {}

    @classmethod
    def load(cls, settings: RunSettings) -> "QuestionAnswering":
        """Read and check the data of these settings."""
        splits = load_splits(settings, load_questions)
        return cls(task=get_task(settings.task), splits=splits, recipe=settings.recipe)

    @property
    def evaluation(self) -> tuple[str, ...]:
        return tuple(name for name in self.splits if name != "train")

    @property
    def unanswerable(self) -> bool:
        """Whether a question may have no answer, as in v2.0."""
        return self.task.name == "squad_v2"

    def prepare(self, tokenizer: Any, recipe: Recipe) -> dict[str, Dataset]:
        window = {"max_length": recipe.max_length, "stride": recipe.stride}
        train = self.splits["train"]
        content = [train.ids, train.contexts, train.questions, train.answers]
        prepared = {
            "train": cached(
                lambda: training_features(train, tokenizer, **window), len(train), content, tokenizer, window
            )
        }
        for name in self.evaluation:
            features = self._features[name] = evaluation_features(self.splits[name], tokenizer, **window)
            positions = {"start_positions": features.start_positions, "end_positions": features.end_positions}
            prepared[name] = Dataset.from_dict({**features.columns, **positions})
        return prepared

    def describe(self) -> dict[str, dict[str, Any]]:
        described = {}
        for name, split in self.splits.items():
            described[name] = split.described
            if self.unanswerable:
                described[name]["unanswerable"] = sum(not answers["text"] for answers in split.answers)
        return described

    def judge(self, split: str, outputs: Any) -> Judged:
        """Exact match and F1 by the official rules, for v2.0 with threshold 0 on the score of "no answer"
        minus that of the best span, and with the best threshold (`best_*`, chosen on this split). The answers
        written down are the best spans, to which any threshold can be applied later.
        """
        questions = self.splits[split]
        answers = decode(
            questions,
            self._features[split],
            *(np.asarray(logits) for logits in outputs[:2]),
            n_best=self.recipe.n_best,
            max_answer_length=self.recipe.max_answer_length,
            unanswerable=self.unanswerable,
        )
        golds = {key: given["text"] for key, given in zip(questions.ids, questions.answers, strict=True)}
        texts = {answer.id: answer.text for answer in answers}
        exact, overlap = per_question(texts, golds, empty_is_one=self.unanswerable)
        if self.unanswerable:
            spans = {answer.id: answer.span for answer in answers}
            official = evaluate_v2(
                spans, golds, {answer.id: answer.no_answer for answer in answers}, threshold=0.0
            )
        else:
            official = evaluate_v1(texts, golds)
        return Judged(
            metrics=in_fractions(official),
            arrays={"exact_match": exact.astype(np.float32), "f1": overlap.astype(np.float32)},
            answers={answer.id: {"text": answer.span, "no_answer": answer.no_answer} for answer in answers},
        )


def in_fractions(official: dict[str, float]) -> dict[str, float]:
    """The official scripts' output as fractions under the names of the tasks; thresholds stay what they are,
    counts are left out.
    """
    names = {name: name.replace("exact_match", "exact").replace("exact", "exact_match") for name in official}
    return {
        names[name]: value if name.endswith("_thresh") else value / 100
        for name, value in official.items()
        if not name.endswith("total")
    }
