"""The counts form of the bootstrap against metrics of explicitly repeated examples."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adalora_fast.experiments import metrics
from adalora_fast.experiments.metrics import bootstrap

TOLERANCE = 1e-12


def examples(name, size, generator):
    """Labels and predictions with ties, of the kind that the metric is for."""
    if "ear" in name:  # pearson, spearman and their mean
        labels = generator.normal(size=size).round(1)
        return labels, (labels + generator.normal(size=size)).round(1)
    classes = 2 if name == "f1" else 3
    labels = generator.integers(0, classes, size)
    return labels, np.where(generator.random(size) < 0.6, labels, generator.integers(0, classes, size))


def explicit(name, labels, predictions, counts):
    """The metric of the examples written out as often as they are drawn."""
    rows = [np.repeat(np.arange(len(labels)), row) for row in counts]
    return np.array([metrics.METRICS[name](labels[row], predictions[row]) for row in rows])


@pytest.mark.parametrize("size", [1, 2, 5, 63, 200])
@pytest.mark.parametrize("name", metrics.METRICS)
def test_counts_equal_explicit_resampling(name, size):
    generator = np.random.default_rng(size)
    labels, predictions = examples(name, size, generator)
    indices = generator.integers(0, size, (40, size))
    values = bootstrap.statistic(name)(labels, predictions, bootstrap.counts_of(indices, size))
    drawn = [metrics.METRICS[name](labels[row], predictions[row]) for row in indices]
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, drawn, rtol=0, atol=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(metrics.METRICS)))
def test_any_counts_and_ties(data, name):
    """Small sets of few values: constant resamples, ties everywhere, rows of unequal sums."""
    size = data.draw(st.integers(1, 6))
    values = st.sampled_from([0, 1]) if name == "f1" else st.sampled_from([-1.5, 0.0, 0.1, 1e-9, 7.0])
    if name in ("accuracy", "matthews"):
        values = st.integers(0, 2)
    labels, predictions = (
        np.array(data.draw(st.lists(values, min_size=size, max_size=size))) for _ in range(2)
    )
    row = st.lists(st.integers(0, 3), min_size=size, max_size=size).filter(any)
    counts = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    result = bootstrap.statistic(name)(labels, predictions, counts)
    np.testing.assert_allclose(result, explicit(name, labels, predictions, counts), rtol=0, atol=1e-9)


def test_a_resample_that_hardly_varies():
    """Its variance is 1e-20 of the whole set's, which E[x²] − E[x]² would lose."""
    labels, predictions = np.array([1.0, 1 + 1e-6, 1 + 3e-6, 1e4]), np.array([2.0, 2 + 1e-6, 2 + 2e-6, -1e4])
    value = bootstrap.statistic("pearson")(labels, predictions, np.array([[1, 1, 1, 0]]))
    assert value == pytest.approx(stats.pearsonr(labels[:3], predictions[:3])[0], abs=1e-6)


@pytest.mark.parametrize("name", ["pearson", "spearman", "pearson_spearman", "matthews"])
def test_constant_resamples_are_zero(name):
    """3 · 0.1 / 3 is not 0.1, nor is that of 0.2: both sides leave a rest that would correlate with ±1."""
    labels, predictions = np.array([0.1, 0.2, 0.2, 0.1]), np.array([0.2, 0.1, 0.2, 0.1])
    constant = [[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3], [0, 1, 0, 0], [0, 2, 1, 0]]
    counts = np.array([[1, 1, 0, 0], *constant])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = bootstrap.statistic(name)(labels, predictions, counts)
    assert values[0] == pytest.approx(-1)
    assert values[1:].tolist() == [0] * 6  # of the last, the labels alone are constant


@pytest.mark.parametrize("name", ["mean", "exact_match"])
def test_scores_of_questions_are_averaged(name):
    scores, counts = np.array([0.25, 1.0, 0.0], dtype=np.float32), np.array([[1, 1, 1], [2, 0, 1], [0, 4, 0]])
    values = bootstrap.statistic(name)(None, scores, counts)
    np.testing.assert_allclose(values, [1.25 / 3, 0.5 / 3, 1.0], rtol=0, atol=TOLERANCE)


def test_blocks_of_counts_give_what_one_block_gives(monkeypatch):
    generator = np.random.default_rng(1)
    labels, predictions = examples("spearman", 30, generator)
    counts = bootstrap.draw_counts(30, 17, generator)
    whole = bootstrap.statistic("spearman")(labels, predictions, counts)
    interval = bootstrap.interval("spearman", labels, predictions, resamples=50)
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)  # three rows a block
    np.testing.assert_array_equal(bootstrap.statistic("spearman")(labels, predictions, counts), whole)
    assert bootstrap.interval("spearman", labels, predictions, resamples=50) == interval


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_counts_of_any_dtype(dtype):
    generator = np.random.default_rng(2)
    labels, predictions = examples("matthews", 400, generator)
    counts = bootstrap.draw_counts(400, 9, generator)
    evaluate = bootstrap.statistic("matthews")
    np.testing.assert_array_equal(
        evaluate(labels, predictions, counts), evaluate(labels, predictions, counts.astype(dtype))
    )


def test_several_runs_share_the_resamples():
    generator = np.random.default_rng(3)
    labels, first = examples("accuracy", 20, generator)
    runs = np.stack([first, generator.permutation(first)])
    counts = bootstrap.draw_counts(20, 6, generator)
    values = bootstrap.resampled("accuracy", labels, runs, counts)
    assert values.shape == (2, 6)
    for run, row in zip(runs, values):
        np.testing.assert_array_equal(row, bootstrap.resampled("accuracy", labels, run, counts))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 20\)"):
        bootstrap.resampled("accuracy", labels, runs[:, None], counts)


def test_drawing_in_parts_is_drawing_at_once():
    once = bootstrap.draw_counts(7, 5, np.random.default_rng(4))
    generator = np.random.default_rng(4)
    parts = [bootstrap.draw_counts(7, rows, generator) for rows in (2, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), once)
    assert once.shape == (5, 7) and (once.sum(axis=1) == 7).all() and (once >= 0).all()


def test_draws_are_uniform():
    counts = bootstrap.draw_counts(10, 5000, np.random.default_rng(0))
    assert stats.chisquare(counts.sum(axis=0)).pvalue > 1e-3
    assert counts.var() == pytest.approx(10 * 0.1 * 0.9, rel=0.05)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_interval_of_a_name_and_of_its_function(name):
    labels, predictions = examples(name, 25, np.random.default_rng(7))
    fast = bootstrap.interval(name, labels, predictions, resamples=150, seed=11)
    slow = bootstrap.interval(metrics.METRICS[name], labels, predictions, resamples=150, seed=11)
    assert fast.value == pytest.approx(metrics.METRICS[name](labels, predictions), abs=TOLERANCE)
    for end in ("value", "low", "high"):
        assert getattr(fast, end) == pytest.approx(getattr(slow, end), abs=TOLERANCE)
    assert fast.low < fast.value < fast.high


def test_interval_is_the_quantiles_of_the_resamples():
    scores = np.random.default_rng(8).random(40)
    counts = bootstrap.draw_counts(40, 500, np.random.Generator(np.random.PCG64(9)))
    found = bootstrap.interval("mean", None, scores, level=0.8, resamples=500, seed=9)
    quantiles = np.quantile(counts @ scores / 40, [0.1, 0.9])
    assert (found.low, found.high) == pytest.approx(tuple(quantiles), abs=TOLERANCE)
    wider = bootstrap.interval("mean", None, scores, resamples=500, seed=9)
    assert wider.low < found.low < found.value < found.high < wider.high
    assert found.value == pytest.approx(scores.mean(), abs=TOLERANCE)


def test_interval_agrees_with_scipy():
    labels, predictions = examples("pearson", 120, np.random.default_rng(10))
    theirs = stats.bootstrap(
        (labels, predictions),
        lambda x, y: stats.pearsonr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1500,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = bootstrap.interval("pearson", labels, predictions, resamples=8000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_coverage():
    """Of 300 samples with a known accuracy, about 95 % of the intervals hold it (binomial: 0.95 ± 0.0125)."""
    generator = np.random.default_rng(12)
    held = 0
    for seed in range(300):
        correct = generator.random(150) < 0.7
        found = bootstrap.interval("accuracy", np.ones(150), correct, resamples=300, seed=seed)
        held += found.low <= 0.7 <= found.high
    assert 0.90 <= held / 300 <= 0.98


COLUMN = np.array([0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accuracy", [], []), "predictions are empty"),
        (("accuracy", [0, 1], [0, 1, 1]), "3 predictions do not match 2 labels"),
        (("pearson", [0, 1, 2], [0, math.nan, 1]), "predictions row 1 is nan"),
        (("f1", [0, 1, 2], [0, 1, 1]), "labels hold 2"),
        (("f1", None, [0.5, 1.0]), 'the mean of per-example scores is "mean"'),
        (("recall", [0, 1], [0, 1]), "unknown metric 'recall'; choose one of accuracy"),
        ((metrics.accuracy, [0, 1], [0, 1, 1]), "3 predictions do not match 2 labels"),
    ],
)
def test_bad_columns(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.interval(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "level 1.0"),
        ({"level": 95}, "level 95 is not between 0 and 1"),
        ({"resamples": 0}, "0 resamples"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.interval("accuracy", COLUMN, COLUMN, **options)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 1, 1], r"shape \(3,\) are not \[replicates, 3 examples\]"),
        ([[1, 1]], r"shape \(1, 2\)"),
        ([[1, -1, 1]], "a count is -1"),
        ([[0.5, 1, 1]], "not whole"),
        ([[math.nan, 1, 1]], "not whole"),
        ([[1, 1, 1], [0, 0, 0]], "replicate 1 holds no example"),
    ],
)
def test_bad_counts(counts, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.statistic("accuracy")(COLUMN, COLUMN, np.array(counts))


def test_bad_indices():
    with pytest.raises(ValueError, match="index 3 is outside the 3 examples"):
        bootstrap.counts_of(np.array([[0, 3]]), 3)
    with pytest.raises(ValueError, match="index -1"):
        bootstrap.counts_of(np.array([[0, -1]]), 3)
    with pytest.raises(ValueError, match="no examples"):
        bootstrap.draw_counts(0, 1, np.random.default_rng(0))
