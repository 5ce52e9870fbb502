"""The metrics as modules of Hugging Face's `evaluate`, which need no script from its hub.

`glue`, `squad` and `squad_v2` give what `evaluate.load` of these names gives: the same inputs, and the same
names and scale of the outputs (fractions for GLUE, percent for SQuAD). Everything stays in memory: no cache
file and no lock is written, nothing is fetched, and any number of processes may evaluate at once, each its
own examples.

Differences: an undefined correlation is 0 instead of NaN; a question without a prediction, a repeated
question and a value that is not finite are errors; regression values and no-answer probabilities are kept in
float64.

The package `evaluate` is needed to import this file, and only there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np

from . import glue_core, squad_core

try:
    import evaluate
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Hugging Face's evaluate is not installed; pip install evaluate, or use "
        "adalora_fast.experiments.metrics.glue_core and .squad_core, which do without"
    ) from error

# Names that Hugging Face's GLUE metric gives to ours.
_OUTPUT_NAMES = {"matthews": "matthews_correlation", "spearman": "spearmanr"}

GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "hans": ("accuracy",),
}

_GLUE_CITATION = """@inproceedings{wang2019glue,
  title = {{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author = {Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and
            Bowman, Samuel R.},
  booktitle = {ICLR},
  year = {2019},
}"""
_SQUAD_CITATION = """@inproceedings{rajpurkar2016squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {EMNLP},
  year = {2016},
}"""
_SQUAD_V2_CITATION = """@inproceedings{rajpurkar2018know,
  title = {Know What You Don't Know: Unanswerable Questions for {SQuAD}},
  author = {Rajpurkar, Pranav and Jia, Robin and Liang, Percy},
  booktitle = {ACL},
  year = {2018},
}"""


def glue(task_name: str) -> evaluate.Metric:
    """The GLUE metric of a task: predictions and references are class codes, real numbers for STS-B.

    Outputs, in fractions: "accuracy"; "accuracy" and "f1" (MRPC, QQP); "matthews_correlation" (CoLA);
    "pearson" and "spearmanr" (STS-B). ValueError for an unknown task.
    """
    if task_name not in GLUE_METRICS:
        raise ValueError(f"unknown GLUE task {task_name!r}; choose one of {', '.join(GLUE_METRICS)}")
    return Glue(config_name=task_name, keep_in_memory=True)


def squad() -> evaluate.Metric:
    """SQuAD v1.1: predictions {"id", "prediction_text"}, references {"id", "answers": {"text": [...]}}.

    Outputs, in percent: "exact_match" and "f1" (see `squad.evaluate_v1`).
    """
    return Squad(keep_in_memory=True)


def squad_v2() -> evaluate.Metric:
    """SQuAD v2.0: predictions have "no_answer_probability" too; compute(..., no_answer_threshold=1.0).

    Outputs, in percent: those of `squad.evaluate_v2`.
    """
    return SquadV2(keep_in_memory=True)


class _OfflineMetric(evaluate.Metric):
    """A metric whose inputs are checked before they are stored, so that a bad batch leaves nothing behind."""

    def _build_data_dir(self) -> str:
        # The base class makes a folder here even where everything is kept in memory.
        return ""

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and their references, of equal lengths."""
        if kwargs:
            raise ValueError(f"unknown input {next(iter(kwargs))!r}; give predictions and references")
        if predictions is None or references is None:
            name = "predictions" if predictions is None else "references"
            raise ValueError(f"{name} are missing; give predictions and references")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions do not match {len(references)} references")
        predictions, references = self._checked(predictions, references)
        if predictions:
            evaluate.Metric.add_batch(self, predictions=predictions, references=references)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Evaluate these examples, together with all that were added since the last call."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not len(self):
            raise ValueError("there are no examples; give predictions and references, or add them first")
        return evaluate.Metric.compute(self, **kwargs)

    def _checked(self, predictions: Any, references: Any) -> tuple[list, list]:
        raise NotImplementedError


class Glue(_OfflineMetric):
    """The metric of one GLUE task, named by `config_name`."""

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metrics by which GLUE compares classifiers of sentences and pairs of sentences.",
            citation=_GLUE_CITATION,
            inputs_description="Class codes (integers), or real numbers for stsb: one per example.",
            features=datasets.Features({"predictions": kind, "references": kind}),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _checked(self, predictions: Any, references: Any) -> tuple[list, list]:
        return self._column(predictions, "predictions"), self._column(references, "references")

    def _column(self, values: Any, name: str) -> list:
        if not len(values):
            return []
        column = glue_core.checked_column(values, name)
        if self.config_name == "stsb":
            return column.tolist()
        bad = np.flatnonzero(column != np.floor(column))
        if len(bad):
            raise ValueError(
                f"{name} row {bad[0]} is {column[bad[0]]}, not a class code; give the argmax of the logits"
            )
        return column.astype(np.int64).tolist()

    def _compute(self, *, predictions: list, references: list) -> dict[str, float]:
        labels, predicted = np.asarray(references), np.asarray(predictions)
        names = GLUE_METRICS[self.config_name]
        return {_OUTPUT_NAMES.get(name, name): glue_core.METRICS[name](labels, predicted) for name in names}


_ANSWERS = {
    "text": datasets.List(datasets.Value("string")),
    "answer_start": datasets.List(datasets.Value("int32")),
}


class Squad(_OfflineMetric):
    """Exact match and F1 of SQuAD v1.1."""

    prediction_fields: tuple[str, ...] = ("id", "prediction_text")
    source = _SQUAD_CITATION

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"no_answer_probability": "float64"}
        prediction = {name: datasets.Value(kinds.get(name, "string")) for name in self.prediction_fields}
        reference = {"id": datasets.Value("string"), "answers": _ANSWERS}
        return evaluate.MetricInfo(
            description="Exact match and F1 of answers, by the rules of SQuAD's evaluation scripts.",
            citation=self.source,
            inputs_description=(
                f"Predictions: mappings with the keys {', '.join(self.prediction_fields)}. References: "
                "mappings with the keys id and answers, a mapping whose list text holds the gold answers "
                "(answer_start may be there, and is not used)."
            ),
            features=datasets.Features({"predictions": prediction, "references": reference}),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _checked(self, predictions: Any, references: Any) -> tuple[list, list]:
        references = [
            _fields(row, number, ("id", "answers"), "reference") for number, row in enumerate(references)
        ]
        for row in references:
            texts = row["answers"].get("text") if isinstance(row["answers"], Mapping) else None
            if texts is None or isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f'the answers of question {row["id"]!r} are {row["answers"]!r}; give {{"text": [texts]}}'
                )
            row["answers"] = {"text": list(texts), "answer_start": [0] * len(texts)}
        rows = [
            _fields(row, number, self.prediction_fields, "prediction")
            for number, row in enumerate(predictions)
        ]
        for row in rows:
            if not isinstance(row["prediction_text"], str):
                raise ValueError(
                    f"the prediction_text of {row['id']!r} is {row['prediction_text']!r}; give a text"
                )
            if "no_answer_probability" in row and not _is_finite(row["no_answer_probability"]):
                raise ValueError(
                    f"the no_answer_probability of {row['id']!r} is {row['no_answer_probability']!r}; "
                    "give a finite number, 0.0 where the model has none"
                )
        return rows, references

    def _compute(self, *, predictions: list, references: list) -> dict[str, float]:
        return squad_core.evaluate_v1(_by_id(predictions, "prediction_text"), _golds(references))


class SquadV2(Squad):
    """Exact match and F1 of SQuAD v2.0, with the breakdown by answerability and the best thresholds."""

    prediction_fields = ("id", "prediction_text", "no_answer_probability")
    source = _SQUAD_V2_CITATION

    def _compute(
        self, *, predictions: list, references: list, no_answer_threshold: float = 1.0
    ) -> dict[str, float | int]:
        texts, scores = _by_id(predictions, "prediction_text"), _by_id(predictions, "no_answer_probability")
        return squad_core.evaluate_v2(texts, _golds(references), scores, no_answer_threshold)


def _fields(row: Any, number: int, names: tuple[str, ...], kind: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) or not all(name in row for name in names):
        held = f"with the keys {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"as {row!r}"
        raise ValueError(f"{kind} {number} comes {held}; it needs the keys {', '.join(names)}")
    if not isinstance(row["id"], str):
        raise ValueError(f"the id of {kind} {number} is {row['id']!r}; give a text")
    return {name: row[name] for name in names}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def _by_id(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for row in rows:
        if row["id"] in values:
            raise ValueError(f"question {row['id']!r} is given twice; give every question once")
        values[row["id"]] = row[name]
    return values


def _golds(references: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {key: list(answers["text"]) for key, answers in _by_id(references, "answers").items()}
