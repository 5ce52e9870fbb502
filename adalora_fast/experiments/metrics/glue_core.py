"""The metrics of the GLUE tasks, from scikit-learn and scipy.

Every metric is a function of labels [N] and predictions [N]: class codes, or real numbers for the
correlations. It is a fraction (0.81, not 81), computed in float64. ValueError where there is nothing to
evaluate, the lengths differ, or a value is not finite.
"""

from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Fraction of the predictions that equal their label."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(*checked(labels, predictions)))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1, 2 TP / (2 TP + FP + FN); 0 where nothing was predicted or nothing is positive.

    ValueError for codes other than 0 and 1.
    """
    from sklearn.metrics import f1_score

    labels, predictions = checked(labels, predictions)
    check_binary(labels, predictions)
    return float(f1_score(labels, predictions, zero_division=0))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation; 0 where a side is constant."""
    from sklearn.metrics import matthews_corrcoef

    labels, predictions = checked(labels, predictions)
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:  # 0 to scikit-learn too, with a warning
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson correlation; 0 where a side is constant (it is undefined there)."""
    from scipy.stats import pearsonr

    return _zero_if_undefined(pearsonr, labels, predictions)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman rank correlation, ties by average ranks; 0 where a side is constant (undefined there)."""
    from scipy.stats import spearmanr

    return _zero_if_undefined(spearmanr, labels, predictions)


def pearson_spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of Pearson and Spearman, the number that tables show for STS-B."""
    return (pearson(labels, predictions) + spearman(labels, predictions)) / 2


METRICS: dict[str, Metric] = {
    function.__name__: function for function in (accuracy, f1, matthews, pearson, spearman, pearson_spearman)
}


def compute(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All metrics of a task. `logits` is [examples, classes], or [examples, 1] for a regression.

    ValueError where a logit is not finite: the class of such a row would be an accident of `argmax`.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits of shape {logits.shape} are not [examples, classes]")
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise ValueError(
            f"logits of row {bad[0]} are not finite ({len(bad)} such rows of {len(logits)}); "
            "the model has diverged: lower learning_rate"
        )
    predictions = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
    return {name: METRICS[name](np.asarray(labels), predictions) for name in names}


def checked(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as finite float64 [N] of one length."""
    labels, predictions = checked_column(labels, "labels"), checked_column(predictions, "predictions")
    check_lengths(labels, predictions)
    return labels, predictions


def checked_column(values: np.ndarray | Sequence | None, name: str) -> np.ndarray:
    """`values` as float64 [N], N > 0, all finite; class codes are exact in float64."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iufb":
        raise ValueError(f"{name} of shape {array.shape} and dtype {array.dtype} are not a column of numbers")
    if not len(array):
        raise ValueError(f"{name} are empty; a metric needs at least one example")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{name} row {bad[0]} is {array[bad[0]]} ({len(bad)} such rows of {len(array)}); "
            "a model whose outputs are not finite has diverged: lower learning_rate"
        )
    return array.astype(np.float64)


def check_lengths(labels: np.ndarray, predictions: np.ndarray) -> None:
    if len(labels) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions do not match {len(labels)} labels; give one for each"
        )


def check_binary(labels: np.ndarray, predictions: np.ndarray) -> None:
    for name, values in (("labels", labels), ("predictions", predictions)):
        other = values[(values != 0) & (values != 1)]
        if len(other):
            raise ValueError(f"F1 is of class 1 against class 0, but {name} hold {other[0]:g}; use accuracy")


def _zero_if_undefined(correlation: Callable, labels: np.ndarray, predictions: np.ndarray) -> float:
    labels, predictions = checked(labels, predictions)
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    value = float(correlation(labels, predictions).statistic)
    return value if np.isfinite(value) else 0.0
