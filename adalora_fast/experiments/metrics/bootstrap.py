"""Bootstrap of a metric over the examples of an evaluation set (B. Efron, Annals of Statistics 7, 1979).

A resample is kept as multiplicities: counts[b, n] says how often replicate b holds example n. In this form a
metric of all replicates is a few matrix products, and two runs that share the examples share the counts,
which is what a paired bootstrap needs.

Shapes: N examples, B replicates, R runs, K classes. Everything is computed in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from . import glue_core, translation

Statistic = Callable[[np.ndarray | None, np.ndarray, np.ndarray], np.ndarray]

# Elements of one block of counts in float64: 32 MiB, so that temporaries do not grow with B × N.
_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True)
class Interval:
    """`value` of the whole set, and the ends of its percentile interval; in the unit of the metric."""

    value: float
    low: float
    high: float


def interval(
    metric: str | Callable[[np.ndarray, np.ndarray], float],
    labels: np.ndarray | None,
    predictions: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of one run's metric over its examples.

    low, high = quantiles (1 ∓ level) / 2 of metric(labels[i], predictions[i]) with i [N] drawn with
    replacement by numpy's PCG64 of `seed`. The interval holds only for the examples of one trained model: it
    says nothing of the spread between seeds.

    `metric` is a name (see `statistic`), or a function of labels and predictions, which is called once per
    resample. Resamples where a correlation is undefined count as the metric defines them: 0.

    ValueError for a level outside (0, 1), fewer than one resample, and what `statistic` refuses.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1; 0.95 gives a 95 % interval")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples make no interval; take at least 1, better 2000")
    evaluate = statistic(metric) if isinstance(metric, str) else _explicitly(metric)
    predictions = np.asarray(predictions)
    size = len(predictions)
    value = evaluate(labels, predictions, np.ones((1, size), dtype=np.int64))[0]
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _BLOCK // max(1, size))
    values = [
        evaluate(labels, predictions, draw_counts(size, min(rows, resamples - start), generator))
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=float(value), low=float(low), high=float(high))


def draw_counts(size: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Multiplicities [resamples, size], int64, of that many resamples of `size` examples; rows sum to `size`.

    Drawing in several calls with one generator gives the same rows as drawing at once.
    """
    if size < 1:
        raise ValueError("there are no examples to resample; evaluate at least one")
    return counts_of(generator.integers(0, size, size=(resamples, size)), size)


def counts_of(indices: np.ndarray, size: int) -> np.ndarray:
    """Multiplicities [B, size], int64, of drawn indices [B, D] from 0 to size − 1."""
    indices = np.asarray(indices)
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        bad = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"index {bad} is outside the {size} examples; draw from 0 to {size - 1}")
    offsets = np.arange(len(indices))[:, None] * size
    return np.bincount((indices + offsets).ravel(), minlength=len(indices) * size).reshape(-1, size)


def statistic(name: str) -> Statistic:
    """The function f(labels [N], predictions [N], counts [B, N]) -> [B] of a metric, in float64.

    f(...)[b] is the metric of the examples repeated counts[b] times: the value that `METRICS[name]`
    gives for np.repeat(labels, counts[b]) and np.repeat(predictions, counts[b]), undefined cases included.
    The counts are whole numbers, of any dtype; rows need not have equal sums.

    Names: those of `METRICS`, and "mean" (also called "exact_match"), the weighted mean of one score per
    example in `predictions`, whose labels are not looked at and may be None: it is the statistic of both
    per-question scores of question answering. ("f1" is the F1 of class 1 of a classification.) "bleu" is
    corpus BLEU of the counts [N, 10] of `translation.bleu_statistics` as predictions, without labels, too,
    and "chrf" corpus chrF of those of `translation.chrf_statistics` [N, 18].

    ValueError for an unknown name, no examples, unequal lengths, values that are not finite, labels other
    than 0 and 1 for "f1", negative or fractional counts, and an empty resample.
    """
    if name not in _KERNELS:
        raise ValueError(f"unknown metric {name!r}; choose one of {', '.join(_KERNELS)}")
    kernel = _KERNELS[name]
    labelled = kernel not in (_mean, _bleu, _chrf)
    checked = {
        _bleu: translation.checked_statistics,
        _chrf: partial(translation.checked_statistics, columns=3 * translation.CHARACTERS),
    }.get(kernel, partial(glue_core.checked_column, name="predictions"))

    def evaluate(labels: np.ndarray | None, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        predictions = checked(predictions)
        if labelled:
            if labels is None:
                raise ValueError(f'{name} compares with labels; the mean of per-example scores is "mean"')
            labels = glue_core.checked_column(labels, "labels")
            glue_core.check_lengths(labels, predictions)
            if name == "f1":
                glue_core.check_binary(labels, predictions)
        counts = _checked_counts(counts, len(predictions))
        rows = max(1, _BLOCK // len(predictions))
        blocks = [counts[start : start + rows].astype(np.float64) for start in range(0, len(counts), rows)]
        return np.concatenate([kernel(labels, predictions, block) for block in blocks] or [np.empty(0)])

    return evaluate


def resampled(
    name: str, labels: np.ndarray | None, predictions: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """`statistic(name)` of several runs on the same resamples: predictions [R, N] -> [R, B], [N] -> [B]; for
    "bleu" [R, N, 10] and [N, 10].
    """
    evaluate = statistic(name)
    predictions = np.asarray(predictions)
    of_one = 2 if _KERNELS[name] in (_bleu, _chrf) else 1
    if predictions.ndim == of_one:
        return evaluate(labels, predictions, counts)
    if predictions.ndim != of_one + 1:
        raise ValueError(f"predictions of shape {predictions.shape} are not [runs, examples] or [examples]")
    values = [evaluate(labels, run, counts) for run in predictions]
    return np.stack(values) if values else np.empty((0, len(counts)))


def _accuracy(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _mean(None, labels == predictions, counts)


def _mean(labels: np.ndarray | None, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts @ scores.astype(np.float64) / counts.sum(axis=1)


def _f1(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    # F1 = 2 TP / (labelled positive + predicted positive)
    positive = np.stack([(labels == 1) & (predictions == 1), labels == 1, predictions == 1], axis=1)
    both, labelled, predicted = (counts @ positive.astype(np.float64)).T
    return _quotient(2 * both, labelled + predicted)


def _matthews(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    # J. Gorodkin, Computational Biology and Chemistry 28, 2004: the correlation of K classes, from totals.
    classes = np.union1d(labels, predictions)
    true = counts @ (labels[:, None] == classes).astype(np.float64)  # [B, K]
    predicted = counts @ (predictions[:, None] == classes).astype(np.float64)
    correct = counts @ (labels == predictions).astype(np.float64)
    total = counts.sum(axis=1)
    covariance = correct * total - (true * predicted).sum(axis=1)
    variances = [total**2 - (part**2).sum(axis=1) for part in (true, predicted)]
    return _quotient(covariance, np.sqrt(variances[0] * variances[1]))


def _pearson(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    defined = _varies(labels, counts) & _varies(predictions, counts)
    return np.where(defined, _correlation(labels[None], predictions[None], counts), 0.0)


def _spearman(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    defined = _varies(labels, counts) & _varies(predictions, counts)
    return np.where(defined, _correlation(_ranks(labels, counts), _ranks(predictions, counts), counts), 0.0)


def _bleu(labels: np.ndarray | None, statistics: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return translation.bleu_of_sums(counts @ statistics)


def _chrf(labels: np.ndarray | None, statistics: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return translation.chrf_of_sums(counts @ statistics)


def _pearson_spearman(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return (_pearson(labels, predictions, counts) + _spearman(labels, predictions, counts)) / 2


_KERNELS: dict[str, Statistic] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_spearman": _pearson_spearman,
    "mean": _mean,
    "exact_match": _mean,
    "bleu": _bleu,
    "chrf": _chrf,
}


def _correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson correlation [B] of x and y [B or 1, N] with weights [B, N], in two passes: a resample may vary
    far less than the whole set does, and Σx² − (Σx)² would then lose it.
    """
    total = counts.sum(axis=1, keepdims=True)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    weighted = counts * x
    covariance = np.einsum("bn,bn->b", weighted, y)
    scale_x = np.sqrt(np.einsum("bn,bn->b", weighted, x))
    scale_y = np.sqrt(np.einsum("bn,bn,bn->b", counts, y, y))
    return np.clip(_quotient(_quotient(covariance, scale_x), scale_y), -1.0, 1.0)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks [B, N] of each example in its resample, from 1; equal values share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    multiplicity = np.add.reduceat(counts[:, order], starts, axis=1)  # [B, distinct values]
    # The m copies after the first `before` have ranks before + 1 … before + m, of mean before + (m + 1) / 2.
    rank = np.cumsum(multiplicity, axis=1) - (multiplicity - 1) / 2
    code = np.searchsorted(ordered[starts], values)
    return rank[:, code]


def _varies(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which resamples [B] hold two different values: the first and the last that are drawn, in order."""
    order = np.argsort(values, kind="stable")
    drawn = counts[:, order] > 0
    first, last = drawn.argmax(axis=1), len(values) - 1 - drawn[:, ::-1].argmax(axis=1)
    return values[order[first]] != values[order[last]]


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is not positive."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _explicitly(metric: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
    """A statistic that repeats the examples and calls `metric` on them."""

    def evaluate(labels: np.ndarray | None, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        labels = np.asarray(labels)
        glue_core.check_lengths(labels, predictions)
        counts = _checked_counts(counts, len(predictions))
        rows = (np.repeat(np.arange(len(row)), row) for row in counts)
        return np.array([float(metric(labels[row], predictions[row])) for row in rows])

    return evaluate


def _checked_counts(counts: np.ndarray, size: int) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != size:
        raise ValueError(f"counts of shape {counts.shape} are not [replicates, {size} examples]")
    whole = counts.dtype.kind in "iub" or (counts.dtype.kind == "f" and (counts == np.floor(counts)).all())
    if not whole:
        raise ValueError(f"counts of dtype {counts.dtype} are not whole; give how often each is drawn")
    if counts.size and counts.min() < 0:
        raise ValueError(f"a count is {counts.min()}; multiplicities are not negative")
    if len(counts) and not counts.any(axis=1).all():
        row = int(np.flatnonzero(~counts.any(axis=1))[0])
        raise ValueError(f"replicate {row} holds no example; every row of counts needs at least one")
    return counts
