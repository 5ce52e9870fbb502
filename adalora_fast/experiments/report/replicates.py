"""The metric of every run on bootstrap resamples of the examples, from predictions.safetensors."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .sweep import Run, Sweep

BLOCK = 2**22  # counts that are in memory at once
QUESTION_METRICS = ("exact_match", "f1")
AGREEMENT = 1e-3  # points by which predictions and result.json may differ: the predictions are float32


@dataclass(frozen=True, kw_only=True)
class TaskReplicates:
    """`values`[arm, seed] is S [B]: the primary metric in points on each resample, the same for all runs.
    `remarks` say what is left out, and why.
    """

    values: dict[tuple[str, int], np.ndarray]
    remarks: tuple[str, ...]


def task_replicates(sweep: Sweep, task: str, replicates: int, seed: int = 0) -> TaskReplicates:
    """Evaluate every complete run of a task on `replicates` resamples of its evaluation splits.

    The primary metric over several splits is the mean of theirs; every split is resampled on its own.
    A run without predictions is left out with a remark. ValueError where a file is unreadable, or the labels
    of two runs differ.
    """
    with_predictions, remarks = [], []
    for run in sweep.task_runs(task):
        if (run.folder / "predictions.safetensors").is_file():
            with_predictions.append(run)
        else:
            remarks.append(f"{task} {run.arm} seed {run.seed} has no predictions: it enters no contrast")
    if not with_predictions:
        return TaskReplicates(values={}, remarks=tuple(remarks))
    metric = sweep.primary_metric(task)
    splits = list(with_predictions[0].result["metrics"])
    total = {(run.arm, run.seed): np.zeros(replicates) for run in with_predictions}
    whole = {key: 0.0 for key in total}
    for split in splits:
        examples = _examples(with_predictions, split, metric)
        remarks += [
            f"{task} {arm} seed {number} predicts the same for every example of {split}"
            for (arm, number), predictions in examples.predictions.items()
            if examples.labels is not None and np.ptp(predictions) == 0
        ]
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(f"{task}/{split}".encode())]))
        for rows, counts in _blocks(examples.size, replicates, generator):
            for key, values in examples.on(counts):
                total[key][rows] += 100 * values / len(splits)
        for key, value in examples.on(np.ones((1, examples.size), dtype=np.int64)):
            whole[key] += 100 * float(value[0]) / len(splits)
    for run in with_predictions:
        own = whole[run.arm, run.seed]
        if abs(own - run.points) > AGREEMENT:
            remarks.append(
                f"{task} {run.arm} seed {run.seed}: its predictions give {own:.3f}, "
                f"result.json says {run.points:.3f}"
            )
    return TaskReplicates(values=total, remarks=tuple(remarks))


@dataclass(frozen=True, kw_only=True)
class _Examples:
    """One split: the labels (None: `predictions` are scores to be averaged; for BLEU the hashes of the pairs
    of sentences) and every run's predictions (for BLEU the counts of every sentence [N, 10]).
    """

    metric: str
    labels: np.ndarray | None
    predictions: dict[tuple[str, int], np.ndarray]

    @property
    def size(self) -> int:
        return len(next(iter(self.predictions.values())))

    def on(self, counts: np.ndarray) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
        """Every run's metric [B] on the resamples counts [B, N]."""
        if self.metric in ("mean", "accuracy"):  # one product for all runs
            columns = np.stack(list(self.predictions.values()), axis=1)
            scores = columns if self.labels is None else columns == self.labels[:, None]
            values = counts.astype(np.float64) @ scores.astype(np.float64) / self.size
            yield from zip(self.predictions, values.T)
            return
        from ..metrics.bootstrap import statistic

        evaluate = statistic(self.metric)
        for key, predictions in self.predictions.items():
            yield key, evaluate(self.labels, predictions, counts)


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


def _blocks(size: int, replicates: int, generator: np.random.Generator) -> Iterator[tuple[slice, np.ndarray]]:
    """Counts [b, N] of consecutive replicates, a block at a time."""
    from ..metrics.bootstrap import draw_counts

    rows = max(1, BLOCK // size)
    for start in range(0, replicates, rows):
        count = min(rows, replicates - start)
        yield slice(start, start + count), draw_counts(size, count, generator)
