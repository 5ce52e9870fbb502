"""The metrics of the GLUE tasks, from scikit-learn and scipy."""

import math
from collections.abc import Callable, Sequence

import numpy as np


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1; 0 where nothing was predicted or nothing is positive."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation; 0 where a side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson correlation; 0 where a side is constant (it is undefined there)."""
    from scipy.stats import pearsonr

    return _zero_if_undefined(pearsonr, labels, predictions)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman rank correlation; 0 where a side is constant (it is undefined there)."""
    from scipy.stats import spearmanr

    return _zero_if_undefined(spearmanr, labels, predictions)


def pearson_spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of Pearson and Spearman, the number that tables show for STS-B."""
    return (pearson(labels, predictions) + spearman(labels, predictions)) / 2


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews, pearson, spearman, pearson_spearman)
}


def compute(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All metrics of a task. `logits` is [examples, classes], or [examples, 1] for a regression."""
    logits = np.asarray(logits)
    predictions = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
    return {name: METRICS[name](np.asarray(labels), predictions) for name in names}


def _zero_if_undefined(correlation: Callable, labels: np.ndarray, predictions: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    value = float(correlation(labels, predictions).statistic)
    return value if math.isfinite(value) else 0.0
