"""What every example contributes to the metric of every run, from predictions.safetensors.

For a metric that is a mean over examples this is the example's own score. Any other is made linear by the
jackknife (M. Quenouille, 1956; J. Tukey, 1958): with θ the metric of all N examples and θ_(n) that without
example n, example n stands for θ + (N - 1) (mean of θ_(n) - θ_(n)). The mean of these is θ itself, and their
variance over examples is the variance that the examples' chance gives to θ, as the bootstrap finds it
(`tests/experiments/report/test_examples.py`); for a mean they are the scores.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .collect import Run, Sweep

QUESTION_METRICS = ("exact_match", "f1")
BLOCK = 2**22  # counts that are in memory at once
AGREEMENT = 1e-3  # points by which predictions and result.json may differ: the predictions are float32


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """`values`[arm, seed] is what each example [N] contributes to the primary metric, in points: their mean
    is the metric. `remarks` say what is left out, and why.
    """

    values: dict[tuple[str, int], np.ndarray]
    remarks: tuple[str, ...]


def task_examples(sweep: Sweep, task: str) -> TaskExamples:
    """The examples of every complete run of a task.

    The primary metric over several splits is the mean of theirs (`joined`). A run without predictions is left
    out with a remark. ValueError where a file is unreadable, or the labels of two runs differ.
    """
    with_predictions, remarks = [], []
    for run in sweep.task_runs(task):
        if (run.folder / "predictions.safetensors").is_file():
            with_predictions.append(run)
        else:
            remarks.append(f"{task} {run.arm} seed {run.seed} has no predictions: it enters no contrast")
    if not with_predictions:
        return TaskExamples(values={}, remarks=tuple(remarks))
    metric = sweep.primary_metric(task)
    splits: dict[tuple[str, int], list[np.ndarray]] = {(r.arm, r.seed): [] for r in with_predictions}
    for split in with_predictions[0].result["metrics"]:
        examples = _examples(with_predictions, split, metric)
        for (arm, number), predictions in examples.predictions.items():
            if examples.labels is not None and np.ptp(predictions) == 0:
                remarks.append(f"{task} {arm} seed {number} predicts the same for every example of {split}")
            splits[arm, number].append(100 * contributions(examples.metric, examples.labels, predictions))
    values = {key: joined(parts) for key, parts in splits.items()}
    for run in with_predictions:
        own = float(values[run.arm, run.seed].mean())
        if abs(own - run.points) > AGREEMENT:
            remarks.append(
                f"{task} {run.arm} seed {run.seed}: its predictions give {own:.3f}, "
                f"result.json says {run.points:.3f}"
            )
    return TaskExamples(values=values, remarks=tuple(remarks))


def contributions(metric: str, labels: np.ndarray | None, predictions: np.ndarray) -> np.ndarray:
    """What each example [N] contributes to a metric of `metrics.bootstrap.statistic`, whose value is their
    mean. One example has the whole metric.
    """
    from adalora_fast.experiments.metrics.bootstrap import statistic

    if metric == "mean":
        return predictions.astype(np.float64)
    if metric == "accuracy":
        return (predictions == labels).astype(np.float64)
    size, evaluate = len(predictions), statistic(metric)
    whole = evaluate(labels, predictions, np.ones((1, size), dtype=np.int64))
    if size == 1:
        return whole
    rows = max(1, BLOCK // size)
    without = np.concatenate([
        evaluate(labels, predictions, 1 - np.eye(min(rows, size - start), size, start, dtype=np.int64))
        for start in range(0, size, rows)
    ])  # fmt: skip
    return whole + (size - 1) * (without.mean() - without)


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Of several sets of examples, splits or tasks, the examples of the mean of their metrics: as many as all
    sets have, spread about that mean so that each set keeps its share of its variance.
    """
    size = sum(map(len, parts))
    spreads = [(part - part.mean()) * (size / (len(parts) * len(part))) for part in parts]
    return np.mean([part.mean() for part in parts]) + np.concatenate(spreads)


@dataclass(frozen=True, kw_only=True)
class _Examples:
    """One split: the labels (None: `predictions` are scores to be averaged; for BLEU the hashes of the pairs
    of sentences) and every run's predictions (for BLEU the counts of every sentence [N, 10]).
    """

    metric: str
    labels: np.ndarray | None
    predictions: dict[tuple[str, int], np.ndarray]


def _examples(runs: list[Run], split: str, metric: str) -> _Examples:
    columns = {(run.arm, run.seed): _columns(run, split, metric) for run in runs}
    labels, first = columns[runs[0].arm, runs[0].seed]
    for run in runs[1:]:
        own, predictions = columns[run.arm, run.seed]
        same = own is labels if own is None or labels is None else np.array_equal(own, labels)
        if len(predictions) != len(first) or not same:
            raise ValueError(
                f"{run.folder} and {runs[0].folder} were not evaluated on the same rows of {split}; "
                "evaluate both on one file"
            )
    return _Examples(
        metric="mean" if labels is None else metric,
        labels=labels,
        predictions={key: predictions for key, (_, predictions) in columns.items()},
    )


def _columns(run: Run, split: str, metric: str) -> tuple[np.ndarray | None, np.ndarray]:
    """(labels or None, predictions) [N] of one run; None where the predictions are scores per question. For
    BLEU `translation.pair_hashes` [N] and the counts of every sentence [N, 10].
    """
    path = run.folder / "predictions.safetensors"
    tensors = _load(path)
    columns = 1
    if metric == "bleu" and {f"{split}/bleu_statistics", f"{split}/pair_hashes"} <= tensors.keys():
        labels, predictions = tensors[f"{split}/pair_hashes"], tensors[f"{split}/bleu_statistics"]
        columns = 2
    elif metric in QUESTION_METRICS and f"{split}/{metric}" in tensors:
        labels, predictions = None, tensors[f"{split}/{metric}"]
    elif f"{split}/labels" in tensors and f"{split}/predictions" in tensors:
        labels, predictions = tensors[f"{split}/labels"], tensors[f"{split}/predictions"]
    else:
        raise ValueError(
            f"{path} has no labels and predictions of {split}; delete {run.folder}, run it again"
        )
    rows = predictions.shape[:1]
    if predictions.ndim != columns or not len(predictions) or (labels is not None and labels.shape != rows):
        raise ValueError(
            f"{path}: {split} has predictions of shape {predictions.shape}; one per row is needed"
        )
    if not all(np.isfinite(values).all() for values in (labels, predictions) if values is not None):
        raise ValueError(f"{path}: a value of {split} is not finite; delete {run.folder} and run it again")
    return labels, predictions.astype(np.float64)


def _load(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not readable safetensors ({reason}); run it again") from error
