"""The report's statistics against literal restatements."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp

from adalora_fast.experiments.report.published import (
    COLUMNS,
    GLUE_TASKS,
    glue_average,
    published_tables,
)
from adalora_fast.experiments.report.rank_maps import chance_overlap, overlap, spearman, stability
from adalora_fast.experiments.report.statistics import (
    Bounds,
    Difference,
    holm,
    mean_std,
    paired_replicates,
    percentiles,
    pooled_variance,
    replicates_for,
    seed_means,
    seed_weights,
    student,
    verdict,
)


def test_mean_and_standard_deviation():
    mean, std = mean_std([1.0, 2.0, 6.0])
    assert mean == 3.0 and std == pytest.approx(np.sqrt((4 + 1 + 9) / 2))
    assert mean_std([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="no values"):
        mean_std([])


def test_seed_weights_are_draws_with_replacement():
    weights = seed_weights(3, 4000, np.random.default_rng(0))
    assert weights.shape == (4000, 3) and np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights * 3, np.round(weights * 3))
    assert np.allclose(weights.mean(axis=0), 1 / 3, atol=0.02)
    assert (weights.max(axis=1) == 1).mean() == pytest.approx(1 / 9, abs=0.02)  # the same seed three times
    assert (seed_weights(1, 5, np.random.default_rng(0)) == 1).all()
    with pytest.raises(ValueError, match="0 seeds and 5 replicates"):
        seed_weights(0, 5, np.random.default_rng(0))


def test_paired_replicates_against_a_loop():
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=(2, 4, 50))
    weights = seed_weights(4, 50, generator)
    drawn = paired_replicates(a, b, weights)
    for r in range(50):
        seeds = np.repeat(np.arange(4), np.round(4 * weights[r]).astype(int))
        assert drawn[r] == pytest.approx(np.mean([a[k, r] - b[k, r] for k in seeds]), abs=2e-9)
        assert seed_means(a, weights)[r] == pytest.approx(np.mean([a[k, r] for k in seeds]))
    with pytest.raises(ValueError, match="do not belong together"):
        paired_replicates(a, b[:2], weights)


def test_equal_runs_that_differ_in_the_last_bit_are_equal():
    a = np.full((3, 100), 81.3)
    drawn = paired_replicates(a, a * (1 + 1e-15), seed_weights(3, 100, np.random.default_rng(0)))
    assert (drawn == 0).all() and percentiles(drawn).p == 1.0


def test_percentiles():
    drawn = np.arange(-10.0, 190.0)  # 11 of 200 are <= 0
    found = percentiles(drawn)
    assert found.p == pytest.approx(2 * 12 / 201)
    assert (found.low, found.high) == tuple(np.quantile(drawn, [0.025, 0.975]))
    assert (found.low90, found.high90) == tuple(np.quantile(drawn, [0.05, 0.95]))
    turned = percentiles(-drawn)
    for name in ("low", "high", "low90", "high90", "p"):
        assert getattr(-found, name) == pytest.approx(getattr(turned, name))
    assert percentiles(np.ones(1999)).p == 2 / 2000  # never 0


def test_student_against_scipy_and_by_hand():
    seeds = np.array([0.3, 1.1, -0.2, 0.9])
    theirs = ttest_1samp(seeds, 0)
    found = student(seeds.mean(), 4, seeds.var(ddof=1), 0.0, 3)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert (found.low90, found.high90) == pytest.approx(tuple(theirs.confidence_interval(0.9)))
    # Satterthwaite: SE^2 = 3 / 3 + 1, dof = 2^2 * 2 / 1^2 = 8
    assert student(2.0, 3, 3.0, 1.0, 2).p == pytest.approx(2 * t.sf(2 / 2**0.5, 8))
    assert student(1.0, 3, 0.0, 0.25, 2).high == pytest.approx(1 + 0.5 * norm.ppf(0.975))  # examples only
    assert student(0.0, 3, 0.0, 0.0, 2).p == 1 and student(0.1, 3, 0.0, 0.0, 2).p == 0


def test_pooled_variance_is_that_of_the_block_designs_residuals():
    points = np.random.default_rng(1).normal(size=(4, 3))  # arms, seeds
    pairs = {(str(a), str(b)): points[b] - points[a] for a, b in itertools.combinations(range(4), 2)}
    residuals = points - points.mean(1, keepdims=True) - points.mean(0) + points.mean()
    variance, dof = pooled_variance(pairs)
    assert dof == 6 and variance == pytest.approx(2 * (residuals**2).sum() / 6)
    one = {("a", "b"): np.array([1.0, 4.0])}
    assert pooled_variance(one) == (4.5, 1)  # the pair's own
    assert pooled_variance({("a", "b"): np.array([1.0])}) == (0.0, 0)
    assert pooled_variance(one | {("a", "c"): np.array([2.0])}) == (4.5, 1)  # one seed says nothing


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("examples", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spread", "most"),
    [((1, 1, 1, 1, 1, 1), 0.08), ((2, 1.5, 1, 1, 0.7, 0.4), 0.08), ((10, 1, 1, 1, 1, 1), 0.12)],
)
def test_equal_arms_are_rarely_said_to_differ(seeds, examples, spread, most):
    """Six equal arms: Holm's p below 0.05 anywhere in at most about 5 % of families, also where the arms'
    spreads differ fivefold; in 8 to 9 % with three seeds where one arm's is ten times the others'. `examples`
    is their chance in units of that of the seeds' mean.
    """
    generator, families = np.random.default_rng(0), 400
    wrong = alone = 0
    for _ in range(families):
        noise = generator.normal(size=(6, seeds)) * np.array(spread)[:, None] * (seeds / 2) ** 0.5
        shared = generator.normal(size=(6, 1)) * examples / 2**0.5  # one development set for all seeds
        points = noise + shared
        pairs = {(str(a), str(b)): points[b] - points[a] for a, b in itertools.combinations(range(6), 2)}
        pooled, dof = pooled_variance(pairs)
        own = {pair: each.var(ddof=1) for pair, each in pairs.items()}
        p = [
            student(each.mean(), seeds, max(own[pair], pooled), examples**2, dof).p
            for pair, each in pairs.items()
        ]
        wrong += min(holm(p)) < 0.05
        p = [student(each.mean(), seeds, own[pair], examples**2, seeds - 1).p for pair, each in pairs.items()]
        alone += min(holm(p)) < 0.05
    assert wrong / families < most
    if seeds == 3 and max(spread) == 10:
        assert wrong / families > 0.05  # a known limit: the docs say so
    if seeds == 3 and examples == 0.5:
        assert alone / families > 0.12  # why the pair's own variance is not enough


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


def estimate(low90, high90):
    bounds = Bounds(low=low90, high=high90, low90=low90, high90=high90, p=0.5)
    return Difference(value=0, bootstrap=bounds, student=bounds)


def test_a_difference_is_as_uncertain_as_the_more_careful_method_says():
    a = Bounds(low=0.1, high=2.0, low90=0.3, high90=1.8, p=0.001)
    b = Bounds(low=-0.2, high=1.5, low90=0.2, high90=1.4, p=0.07)
    both = Difference(value=1.0, bootstrap=a, student=b)
    assert both.bounds == Bounds(low=-0.2, high=2.0, low90=0.2, high90=1.8, p=0.07)
    assert not both.excludes_zero and Difference(value=1.0, bootstrap=a, student=a).excludes_zero
    assert (-both).bounds.low == -2.0 and (-both).student.high == 0.2
    one_seed = Difference(value=1.0, bootstrap=a, student=None)
    assert one_seed.bounds.p == 0.001 and not one_seed.excludes_zero and (-one_seed).student is None
    assert verdict(one_seed, 0.001, 0.3) == "not decided"


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
    assert verdict(estimate(low, high), p, 0.3) == expected


def test_holms_smallest_p_can_be_significant_whatever_the_number_of_arms():
    for arms in (2, 8, 13, 30):
        pairs = arms * (arms - 1) // 2
        assert pairs * 2 / (replicates_for(pairs) + 1) < 0.05
    assert replicates_for(1) == 10_000


def test_the_interval_covers_a_known_difference():
    """Two arms that differ by 1, with chance of the seeds and of the examples, both of which enter the
    difference: about 95 % of the bootstrap's intervals hold the truth with many seeds, and of both with few.
    """
    for seeds, least in ((12, 0.88), (3, 0.91)):
        generator, held = np.random.default_rng(0), 0
        for _ in range(200):
            replicates, seen = 400, generator.normal(0, 0.3)  # what this development set favours arm a by
            effects = generator.normal(1.0 + seen, 1.0, size=(seeds, 1))
            examples = generator.normal(0, 0.3, size=replicates)
            a, b = effects + examples, np.zeros((seeds, replicates))
            bounds = percentiles(paired_replicates(a, b, seed_weights(seeds, replicates, generator)))
            own = student(effects.mean(), seeds, effects.var(ddof=1), (a - b).mean(0).var(ddof=1), seeds - 1)
            found = Difference(value=effects.mean(), bootstrap=bounds, student=own if seeds == 3 else bounds)
            held += found.bounds.low <= 1.0 <= found.bounds.high
        assert least <= held / 200 <= 0.99


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
