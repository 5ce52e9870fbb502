"""Metrics against values worked out by hand, and against scikit-learn and scipy."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from adalora_fast.experiments import metrics
from adalora_fast.experiments.data.tasks import TASKS

# Two true and one false positive, one true and one false negative.
LABELS, PREDICTIONS = [1, 1, 0, 0, 1], [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("accuracy", 3 / 5), ("f1", 2 / 3), ("matthews", (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))],
)
def test_classification(name, expected):
    assert metrics.METRICS[name](np.array(LABELS), np.array(PREDICTIONS)) == pytest.approx(expected)


def test_f1_is_of_class_one():
    assert metrics.f1(np.array([1, 0, 0, 0]), np.array([0, 0, 0, 0])) == 0.0
    assert metrics.f1(np.array([0, 1, 1, 1]), np.array([1, 1, 1, 1])) == pytest.approx(6 / 7)


def test_pearson():
    # deviations (-1, 0, 1) and (-4, -1, 5) / 3
    assert metrics.pearson(np.array([1, 2, 3]), np.array([1, 2, 4])) == pytest.approx(3 / math.sqrt(28 / 3))


def test_spearman():
    # rank differences 0, 1, 1, 0: 1 - 6 · 2 / (4 · 15); monotone gives 1 whatever its shape
    assert metrics.spearman(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 10])) == pytest.approx(0.8)
    assert metrics.spearman(np.array([1, 2, 3, 4]), np.array([1, 2, 4, 1000])) == pytest.approx(1.0)


def test_spearman_with_ties():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    value = metrics.spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert value == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))


def test_mean_of_both_correlations():
    labels, predictions = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])
    expected = (3 / math.sqrt(28 / 3) + 1) / 2
    assert metrics.pearson_spearman(labels, predictions) == pytest.approx(expected)


def test_signs():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    assert metrics.pearson(x, y) == pytest.approx(-1) and metrics.spearman(x, y) == pytest.approx(-1)
    assert metrics.matthews(np.array([0, 1]), np.array([1, 0])) == pytest.approx(-1)


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_constant_predictions_and_a_single_class(name, constant):
    metric, same, other = metrics.METRICS[name], np.full(4, constant), np.array([0, 1, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant_predictions, one_class = metric(other, same), metric(same, other)
        both = metric(same, same)
    if name == "accuracy":
        assert constant_predictions == one_class == (0.75 if constant else 0.25)
        assert both == 1.0
    elif name == "matthews":
        assert constant_predictions == one_class == both == 0.0
    else:
        assert constant_predictions == one_class == pytest.approx(6 / 7 if constant else 0.0)
        assert both == float(constant)


@pytest.mark.parametrize("name", ["pearson", "spearman", "pearson_spearman"])
@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]), ([1.0], [2.0])],
    ids=["constant labels", "constant predictions", "one row"],
)
def test_undefined_correlations_are_zero(name, labels, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.METRICS[name](np.array(labels), np.array(predictions)) == 0.0


def test_nearly_constant_predictions_are_finite():
    predictions = np.full(5, 0.1, dtype=np.float32)
    predictions[3] = np.nextafter(np.float32(0.1), np.float32(1))
    assert -1 <= metrics.pearson(np.arange(5.0), predictions) <= 1


def test_logits_become_predictions():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    values = metrics.compute(("accuracy", "f1"), logits, np.array([1, 1, 1, 0, 1]))
    assert list(values) == ["accuracy", "f1"]
    assert values["accuracy"] == pytest.approx(4 / 5) and values["f1"] == pytest.approx(6 / 7)


def test_three_classes():
    logits = np.eye(3)[[0, 1, 2, 2]]
    assert metrics.compute(("accuracy",), logits, np.array([0, 1, 2, 0])) == {"accuracy": 0.75}


def test_one_logit_is_a_regression():
    values = metrics.compute(("pearson",), np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert values == {"pearson": pytest.approx(3 / math.sqrt(28 / 3))}


def test_values_are_plain_numbers():
    values = metrics.compute(tuple(metrics.METRICS)[:3], np.eye(2), np.array([0, 1]))
    assert all(type(value) is float for value in values.values())


def test_every_metric_of_every_task_exists():
    for task in TASKS.values():
        if task.kind not in ("question_answering", "translation"):
            assert set(task.metrics) <= set(metrics.METRICS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_libraries_in_float64(dtype):
    generator = np.random.default_rng(5)
    labels = generator.normal(3, 1, 300).round(1).astype(dtype)  # rounded: ties
    predictions = (labels + generator.normal(0, 1, 300)).astype(dtype)
    truth, given = labels.astype(np.float64), predictions.astype(np.float64)
    assert metrics.pearson(labels, predictions) == pytest.approx(stats.pearsonr(truth, given)[0], abs=1e-14)
    assert metrics.spearman(labels, predictions) == pytest.approx(stats.spearmanr(truth, given)[0], abs=1e-14)
    classes, guesses = labels > 3, predictions > 3
    assert metrics.accuracy(classes, guesses) == accuracy_score(classes, guesses)
    assert metrics.f1(classes, guesses) == f1_score(classes, guesses)
    assert metrics.matthews(classes, guesses) == pytest.approx(matthews_corrcoef(classes, guesses), abs=1e-15)


def test_order_of_the_rows_does_not_matter():
    generator = np.random.default_rng(6)
    labels, predictions = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    order = generator.permutation(50)
    for metric in metrics.METRICS.values():
        assert metric(labels[order], predictions[order]) == pytest.approx(metric(labels, predictions))


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([], [], "labels are empty"),
        ([0, 1], [0, 1, 1], "3 predictions do not match 2 labels"),
        ([0, 1], [0.0, math.nan], r"predictions row 1 is nan \(1 such rows of 2\)"),
        ([0.0, math.inf], [0, 1], "labels row 1 is inf"),
        ([[0, 1]], [[0, 1]], r"labels of shape \(1, 2\)"),
        (["a", "b"], [0, 1], "not a column of numbers"),
    ],
)
def test_bad_columns_are_one_line_errors(name, labels, predictions, message):
    with pytest.raises(ValueError, match=message) as error:
        metrics.METRICS[name](np.array(labels), np.array(predictions))
    assert "\n" not in str(error.value)


def test_f1_of_three_classes_is_refused():
    with pytest.raises(ValueError, match="predictions hold 2; use accuracy"):
        metrics.f1(np.array([0, 1, 1]), np.array([0, 1, 2]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [1, 2])
def test_logits_of_a_diverged_model_are_refused(value, columns):
    logits = np.full((3, columns), 0.5)
    logits[1, -1] = value
    with pytest.raises(ValueError, match=r"logits of row 1 are not finite .* lower learning_rate"):
        metrics.compute(("accuracy",), logits, np.array([0, 0, 0]))


def test_logits_are_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        metrics.compute(("accuracy",), np.zeros(3), np.zeros(3))
