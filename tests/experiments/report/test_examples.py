"""What every example contributes to a metric: against the bootstrap, over splits, where it is undefined."""

import numpy as np
import pytest

from adalora_fast.experiments.metrics.bootstrap import draw_counts, statistic
from adalora_fast.experiments.report import examples
from adalora_fast.experiments.report.examples import contributions, joined


def predicted(metric, generator, rows):
    if metric == "bleu":
        found = generator.integers(3, 8, size=(rows, 10))
        found[:, 2:] = np.sort(found[:, 2:])[:, ::-1]  # matches below totals, fewer of longer n-grams
        counts = np.stack([15 + found[:, 0], 15 + found[:, 1]], axis=1)
        orders = [
            column
            for n in range(4)
            for column in (generator.binomial(14 - n, 0.6 - 0.1 * n, rows), np.full(rows, 14 - n))
        ]
        return None, np.concatenate([counts, np.stack(orders, axis=1)], axis=1)
    if metric in ("pearson", "spearman", "pearson_spearman"):
        labels = np.round(generator.random(rows) * 5, 1)
        return labels, np.round(labels + generator.normal(size=rows), 1)
    labels = (generator.random(rows) < 0.3).astype(int)
    return labels, np.where(generator.random(rows) < 0.2, 1 - labels, labels)


@pytest.mark.parametrize(
    "metric", ["accuracy", "f1", "matthews", "pearson", "spearman", "pearson_spearman", "bleu"]
)
def test_the_jackknife_finds_the_variance_of_the_bootstrap(metric):
    generator = np.random.default_rng(4)
    pairs = []
    for _ in range(2):  # two runs on the same rows, and their difference
        labels, first = predicted(metric, np.random.default_rng(7), 300)
        _, second = predicted(metric, generator, 300)
        swap = generator.random(300) < 0.3
        pairs.append(np.where(swap[:, None] if first.ndim == 2 else swap, second, first))
    parts = [contributions(metric, labels, run) for run in pairs]
    evaluate, counts = statistic(metric), draw_counts(300, 4000, generator)
    for part, run in zip(parts, pairs, strict=True):
        whole = evaluate(labels, run, np.ones((1, 300), dtype=int))[0]
        assert part.shape == (300,) and part.mean() == pytest.approx(whole, abs=1e-12)
        bootstrap = evaluate(labels, run, counts).std(ddof=1)
        assert part.std(ddof=1) / 300**0.5 == pytest.approx(bootstrap, rel=0.06)
    difference = (evaluate(labels, pairs[0], counts) - evaluate(labels, pairs[1], counts)).std(ddof=1)
    assert (parts[0] - parts[1]).std(ddof=1) / 300**0.5 == pytest.approx(difference, rel=0.06)


def test_of_a_mean_it_is_the_score_itself():
    scores = np.array([0.0, 0.5, 1.0, 0.25], dtype=np.float32)
    assert contributions("mean", None, scores) == pytest.approx(scores)
    labels, predictions = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1])
    assert contributions("accuracy", labels, predictions).tolist() == [1, 1, 0, 0]
    left_out = statistic("accuracy")(labels, predictions, 1 - np.eye(4, dtype=int))
    assert 0.5 + 3 * (left_out.mean() - left_out) == pytest.approx([1, 1, 0, 0])


def test_by_hand_for_matthews():
    labels, predictions = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    theta = statistic("matthews")
    without = [
        theta(np.delete(labels, n), np.delete(predictions, n), np.ones((1, 4), dtype=int))[0]
        for n in range(5)
    ]
    whole = theta(labels, predictions, np.ones((1, 5), dtype=int))[0]
    expected = [whole + 4 * (np.mean(without) - each) for each in without]
    assert contributions("matthews", labels, predictions) == pytest.approx(expected)


def test_a_run_that_collapsed_has_no_chance_and_one_example_is_the_whole():
    labels = np.array([0, 1, 1, 0, 1])
    assert contributions("matthews", labels, np.ones(5)).tolist() == [0] * 5
    assert contributions("pearson", labels.astype(float), np.ones(5)).tolist() == [0] * 5
    assert contributions("matthews", np.array([1]), np.array([1])).shape == (1,)


def test_blocks_make_no_difference(monkeypatch):
    labels, predictions = predicted("spearman", np.random.default_rng(0), 40)
    whole = contributions("spearman", labels, predictions)
    monkeypatch.setattr(examples, "BLOCK", 40 * 7)
    assert np.array_equal(contributions("spearman", labels, predictions), whole)


def test_several_sets_of_examples_keep_mean_and_variance():
    """Two splits of a task count the same, whatever their rows; so do tasks."""
    generator = np.random.default_rng(0)
    parts = [generator.normal(1, 2, 50), generator.normal(5, 1, 400), generator.normal(-2, 7, 120)]
    whole = joined(parts)
    assert len(whole) == 570 and whole.mean() == pytest.approx(np.mean([part.mean() for part in parts]))
    expected = sum(part.var() / len(part) for part in parts) / 9
    assert whole.var() / 570 == pytest.approx(expected)
    assert joined([parts[0]]) == pytest.approx(parts[0])
