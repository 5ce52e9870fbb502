"""The report's statistics against literal restatements."""

import itertools

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from adalora_fast.experiments.report.estimates import (
    Bounds,
    Estimate,
    Spread,
    estimate,
    exploratory,
    holm,
    mean_std,
    spread,
    verdict,
)
from adalora_fast.experiments.report.published import COLUMNS, GLUE_TASKS, glue_average, published_tables
from adalora_fast.experiments.report.rank_maps import chance_overlap, overlap, spearman, stability


def test_mean_and_standard_deviation():
    mean, std = mean_std([1.0, 2.0, 6.0])
    assert mean == 3.0 and std == pytest.approx(np.sqrt((4 + 1 + 9) / 2))
    assert mean_std([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="no values"):
        mean_std([])


def literal_mean_squares(table):
    """By loops: of rows, of columns, and of what their means leave."""
    seeds, examples = table.shape
    middle = sum(table[k, n] for k in range(seeds) for n in range(examples)) / table.size
    rows = [sum(table[k]) / examples for k in range(seeds)]
    columns = [sum(table[:, n]) / seeds for n in range(examples)]
    rest = sum(
        (table[k, n] - rows[k] - columns[n] + middle) ** 2 for k in range(seeds) for n in range(examples)
    )
    return (
        examples * sum((row - middle) ** 2 for row in rows) / (seeds - 1),
        seeds * sum((column - middle) ** 2 for column in columns) / (examples - 1),
        rest / (seeds - 1) / (examples - 1),
    )


def test_mean_squares_standard_error_and_freedom_by_hand():
    generator = np.random.default_rng(0)
    chances = (generator.normal(size=shape) for shape in ((4, 1), (1, 7), (4, 7)))
    table = 3 + sum(chances)
    found, (rows, columns, rest) = spread(table), literal_mean_squares(table)
    assert (found.of_seeds, found.of_examples, found.of_rest) == pytest.approx((rows, columns, rest))
    assert rows > rest and columns > rest
    square = (rows + columns - rest) / 28
    assert found.square == pytest.approx(square)
    dof = square**2 / ((rows / 28) ** 2 / 3 + (columns / 28) ** 2 / 6 + (rest / 28) ** 2 / 18)
    assert found.freedom == pytest.approx(dof)
    own = estimate(table)
    assert own.value == pytest.approx(table.mean())
    assert own.bounds.p == pytest.approx(2 * t.sf(table.mean() / square**0.5, dof))
    for low, high, level in (
        (own.bounds.low, own.bounds.high, 0.975),
        (own.bounds.low90, own.bounds.high90, 0.95),
    ):
        half = t.ppf(level, dof) * square**0.5
        assert (low, high) == pytest.approx((own.value - half, own.value + half))
    many = spread(np.stack([table, 2 * table]))
    assert many.square == pytest.approx([square, 4 * square]) and many.freedom == pytest.approx([dof, dof])


def test_the_variances_are_found_again():
    """On average the mean squares give the variances that were put in, and SE² that of the tables' mean."""
    generator = np.random.default_rng(1)
    tables = 0.5 * generator.normal(size=(4000, 3, 1)) + 2 * generator.normal(size=(4000, 1, 20))
    tables = tables + 3 * generator.normal(size=(4000, 3, 20))
    found = spread(tables)
    assert found.of_rest.mean() == pytest.approx(9, rel=0.03)
    assert ((found.of_seeds - found.of_rest) / 20).mean() == pytest.approx(0.25, abs=0.03)
    assert ((found.of_examples - found.of_rest) / 3).mean() == pytest.approx(4, rel=0.05)
    variance = 0.25 / 3 + 4 / 20 + 9 / 60
    assert tables.mean(axis=(1, 2)).var() == pytest.approx(variance, rel=0.06)
    unbiased = (found.of_seeds + found.of_examples - found.of_rest) / 60
    assert unbiased.mean() == pytest.approx(variance, rel=0.03)
    assert (found.square >= unbiased).all() and found.square.mean() < 1.2 * variance


def test_without_a_chance_of_the_examples_it_is_students_t_of_the_seeds():
    seeds = np.array([0.3, 1.1, -0.2, 0.9])
    own, theirs = estimate(np.repeat(seeds[:, None], 50, axis=1)), ttest_1samp(seeds, 0)
    assert own.bounds.p == pytest.approx(theirs.pvalue)
    assert (own.bounds.low, own.bounds.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_a_variance_below_zero_takes_nothing_away():
    """Seeds that agree by chance more than they can, and examples that do: SE² is that of the other alone."""
    alike = Spread(seeds=3, examples=10, of_seeds=0.1, of_examples=5.0, of_rest=2.0)
    assert alike.square == 5.0 / 30 > (0.1 + 5.0 - 2.0) / 30
    assert Spread(seeds=3, examples=10, of_seeds=5.0, of_examples=0.1, of_rest=2.0).square == 5.0 / 30
    neither = Spread(seeds=3, examples=10, of_seeds=0.5, of_examples=1.5, of_rest=2.0)
    assert neither.square == 1.5 / 30


def test_one_seed_knows_of_the_examples_alone_and_two_of_little():
    row = np.array([[1.0, 3.0, 2.0, 4.0, 0.0]])
    own, theirs = estimate(row), ttest_1samp(row[0], 0)
    assert own.bounds.p == pytest.approx(theirs.pvalue) and own.bounds.p < 0.05
    assert not own.knows_training and not own.excludes_zero and not (-own).excludes_zero
    assert verdict(own, 0.001, 0.3) == "not decided" and exploratory(own) == "exploratory"
    two = estimate(np.concatenate([row, row + 0.1]))
    assert two.spread.freedom == 1 and two.knows_training and two.bounds.p > 0.05


def test_what_has_no_chance_at_all():
    same = estimate(np.zeros((3, 10)))
    assert same.bounds == Bounds(low=0, high=0, low90=0, high90=0, p=1)
    assert estimate(np.full((3, 10), 0.5)).bounds.p == 0
    assert estimate(np.full((3, 10), 1e-14)).bounds.p == 1  # equal runs that differ in the last bit
    assert estimate(np.array([[1.0]])).value == 1 and estimate(np.array([[1.0], [2.0], [4.0]])).value == 7 / 3


def test_a_difference_the_other_way_round():
    table = np.random.default_rng(0).normal(1, 1, size=(3, 20))
    own, other = estimate(table), estimate(-table)
    for name in ("low", "high", "low90", "high90", "p"):
        assert getattr((-own).bounds, name) == pytest.approx(getattr(other.bounds, name))
    assert (-own).value == other.value and own.excludes_zero
    assert exploratory(own) == "exploratory, 95 % interval above 0"
    assert exploratory(-own) == "exploratory, 95 % interval below 0"


def literal_holm(p):
    """Step down from the smallest, at alpha/m; the adjusted p is the least alpha that rejects."""
    adjusted = [0.0] * len(p)
    for i in range(len(p)):
        smaller = [j for j in range(len(p)) if (p[j], j) <= (p[i], i)]
        steps = [p[j] * (len(p) - sum((p[k], k) < (p[j], j) for k in range(len(p)))) for j in smaller]
        adjusted[i] = min(1.0, max(steps))
    return adjusted


@pytest.mark.parametrize("seed", range(5))
def test_holm(seed):
    p = np.random.default_rng(seed).random(7) ** 3
    p[2] = p[5]
    assert holm(p) == pytest.approx(literal_holm(p.tolist()))
    assert all(adjusted >= own for adjusted, own in zip(holm(p), p, strict=True))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (-0.2, 0.2, 1.0, "equivalent within ±0.3"),
        (-0.3, 0.2, 1.0, "not decided"),  # the margin itself is not inside
        (-0.1, 0.31, 0.2, "not decided"),
        (0.5, 2.0, 0.049, "differs"),
        (0.5, 2.0, 0.05, "not decided"),
        (0.1, 0.2, 0.01, "differs, by less than 0.3"),
    ],
)
def test_verdict(low, high, p, expected):
    bounds = Bounds(low=low, high=high, low90=low, high90=high, p=0.5)
    chance = Spread(seeds=3, examples=9, of_seeds=1, of_examples=1, of_rest=1)
    assert verdict(Estimate(value=0, bounds=bounds, spread=chance), p, 0.3) == expected


# --- rank maps


def test_overlap_and_its_chance_by_enumeration():
    a, b = np.array([3.0, 0, 1, 2]), np.array([0.0, 3, 1, 2])
    assert overlap(a, b) == (0 + 0 + 1 + 2) / 6 and overlap(a, a) == 1
    shuffled = [overlap(a, b[list(order)]) for order in itertools.permutations(range(4))]
    assert chance_overlap(a, b) == pytest.approx(np.mean(shuffled))
    assert overlap(np.zeros(3), np.zeros(3)) == 1


def test_spearman_of_rank_maps():
    a = np.array([1.0, 2, 2, 5])
    assert spearman(a, a) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, np.ones(4)) is None and spearman(np.ones(1), np.ones(1)) is None


def test_stability():
    maps = np.array([[1.0, 2, 3], [1, 2, 3], [3, 2, 1]])
    found = stability(maps)
    assert found.seeds == 3 and found.spearman == pytest.approx((1 - 1 - 1) / 3)
    assert found.overlap == pytest.approx((1 + 4 / 6 + 4 / 6) / 3)
    assert stability(maps[:1]) is None
    assert stability(np.array([[2.0, 2], [1, 3]])).spearman is None


# --- published numbers


@pytest.mark.parametrize("table", [t for t in published_tables() if t.convention], ids=lambda t: t.key)
def test_published_averages_follow_from_their_columns(table):
    """Every average is the mean of its row in its convention: a wrong digit anywhere shows."""
    for row in table.rows:
        assert glue_average(row.values, table.convention) == pytest.approx(row.average, abs=0.0151), row.label


def test_published_tables_use_known_columns():
    keys = {column.key for column in COLUMNS}
    for table in published_tables():
        assert table.source and table.title and table.rows
        for row in table.rows:
            assert row.values.keys() <= keys
            assert all((20 if "bleu" in key else 50) < value < 100 for key, value in row.values.items())


def test_the_two_conventions_differ():
    (table,) = (table for table in published_tables() if table.key == "adalora-glue")
    (row,) = (row for row in table.rows if row.label == "AdaLoRA, 1.27M")
    assert round(glue_average(row.values, "nine"), 2) == 89.61
    assert round(glue_average(row.values, "eight"), 2) == 89.31


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_no_glue_average_without_every_task(task):
    values = {column.key: 90.0 for column in COLUMNS if column.task != task}
    assert glue_average(values, "nine") is None and glue_average(values, "eight") is None


def test_unknown_convention():
    with pytest.raises(ValueError, match="unknown convention 'ten'; choose one of nine, eight"):
        glue_average({}, "ten")
