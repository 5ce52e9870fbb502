"""The size and power of the report's test, on simulated tables of seeds by examples.

Binary predictions with residual noise, as a fine-tuned classifier gives them: an example is easy or hard, a
seed is good or bad for one arm, and every prediction has chance of its own. An arm's truth is the expectation
over all three, so a development set that happens to favour one arm is chance, too.
"""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri, stdtr

from adalora_fast.experiments.metrics.bootstrap import statistic
from adalora_fast.experiments.report.estimates import holm, spread
from adalora_fast.experiments.report.examples import contributions

SWEEPS = 1000
BAND = 3.3 * (0.05 * 0.95 / SWEEPS) ** 0.5  # a share of 5 % is outside once in a thousand times


def p_of(tables):
    """Of many tables [..., K, N]."""
    found, value = spread(tables), tables.mean(axis=(-1, -2))
    t = np.divide(value, np.sqrt(found.square), out=np.zeros_like(value), where=found.square > 0)
    return 2 * stdtr(found.freedom, -np.abs(t))


def binary(generator, *, seeds, rows, sweeps, gap=0.0, seed=0.06, example=0.5, rest=0.5, arms=(1.0, 1.0)):
    """Whether two arms' predictions are right: [2, sweeps, K, N]. Latent normal: `ease` of an example that
    both share has variance 1, that of an arm's own `example`², of seed and example `rest`², of a seed `seed`²
    times the arm's factor. 80 % of arm b's predictions are right, and 80 % + `gap` of arm a's.
    """
    ease = generator.standard_normal((sweeps, 1, rows), dtype=np.float32)
    found = []
    for arm, factor in enumerate(arms):
        latent = ease + np.float32(example) * generator.standard_normal((sweeps, 1, rows), dtype=np.float32)
        latent = latent + np.float32(seed * factor) * generator.standard_normal(
            (sweeps, seeds, 1), dtype=np.float32
        )
        latent += np.float32(rest) * generator.standard_normal((sweeps, seeds, rows), dtype=np.float32)
        spread_of = (1 + example**2 + (seed * factor) ** 2 + rest**2) ** 0.5
        found.append(latent > -ndtri(0.8 + (gap if arm == 0 else 0)) * spread_of)
    return found


def accuracies(generator, **options):
    a, b = binary(generator, sweeps=SWEEPS, **options)
    return p_of(100 * (a.astype(np.float32) - b.astype(np.float32)))


@pytest.mark.parametrize(
    ("seeds", "rows", "gap", "least"), [(3, 408, 0.05, 0.5), (12, 408, 0.04, 0.75), (30, 400, 0.04, 0.8)]
)
def test_accuracy(seeds, rows, gap, least):
    generator = np.random.default_rng(seeds)
    size = (accuracies(generator, seeds=seeds, rows=rows) < 0.05).mean()
    power = (accuracies(generator, seeds=seeds, rows=rows, gap=gap) < 0.05).mean()
    print(f"accuracy, {seeds} seeds: size {size:.3f}, power at {100 * gap:g} points {power:.3f}")
    assert abs(size - 0.05) < BAND and power > least


@pytest.mark.parametrize("seeds", [3, 12, 30])
@pytest.mark.parametrize("arms", [(1.0, 5.0), (0.2, 10.0)])
def test_arms_of_unequal_spread(seeds, arms):
    """One arm's seeds are 5 and 50 times as spread as the other's. The second makes the seeds nearly all of
    the chance: with three of them the size is 7 to 8 %, a limit that the docs name.
    """
    generator = np.random.default_rng(seeds)
    size = (accuracies(generator, seeds=seeds, rows=400, arms=arms, seed=0.03) < 0.05).mean()
    print(f"spreads {arms}, {seeds} seeds: size {size:.3f}")
    if (seeds, arms) == (3, (0.2, 10.0)):
        assert 0.05 < size < 0.10
    else:
        assert abs(size - 0.05) < BAND


def test_a_family_of_arms_one_of_which_is_spread():
    """Five arms that are the baseline's equals, one of them with ten times the spread: Holm keeps 5 %, and
    the spread arm takes nothing from the others' power.
    """
    generator = np.random.default_rng(1)
    spreads = np.array([1, 10, 1, 1, 1, 1])[:, None, None, None]

    def families(gap=0.0):
        shared = generator.normal(size=(6, 600, 1, 200)) * 5
        own = generator.normal(size=(6, 600, 3, 1)) * spreads / 5
        tables = shared + own + generator.normal(size=(6, 600, 3, 200)) * 8
        tables[-1] += gap
        return np.stack([holm(each) for each in p_of(tables[1:] - tables[0]).T])

    size, power = (families() < 0.05).any(axis=1).mean(), (families(2.5)[:, -1] < 0.05).mean()
    print(f"family of five contrasts: size {size:.3f}, power {power:.3f}")
    assert size < 0.05 + 3.3 * (0.05 * 0.95 / 600) ** 0.5 and power > 0.4


@pytest.mark.parametrize("rest", [0.0, 0.3, 1.0, 3.0])
def test_what_the_seeds_the_examples_and_the_rest_may_be(rest):
    """The limits that the docs name: conservative where the rest is nearly everything, 8 % with three seeds
    where it is nearly nothing and the seeds are most; two seeds decide little.
    """
    generator, sizes = np.random.default_rng(2), {}
    for seeds in (2, 3, 12):
        for share in (0.0, 0.5, 0.9):  # of the seeds, in what is not the rest
            chance = generator.normal(size=(3000, seeds, 1)) * (seeds * share) ** 0.5
            chance = chance + generator.normal(size=(3000, 1, 60)) * (60 * (1 - share)) ** 0.5
            table = chance + generator.normal(size=(3000, seeds, 60)) * rest * (60 * seeds) ** 0.5
            sizes[seeds, share] = (p_of(table) < 0.05).mean()
    print({key: round(float(size), 3) for key, size in sizes.items()})
    assert all(size < 0.05 for (seeds, _), size in sizes.items() if seeds == 2)
    assert all(size < 0.10 for (seeds, _), size in sizes.items() if seeds == 3)
    assert all(size < 0.065 for (seeds, _), size in sizes.items() if seeds == 12)
    assert rest < 3 or max(sizes.values()) < 0.05


def matthews(generator, sweeps, seeds, rows, **options):
    """Tables of what each example contributes to the difference of two arms in Matthews' correlation, on 600
    examples of two classes; what is right is drawn as for the accuracy.
    """
    labels = (generator.random(rows) < 0.35).astype(int)
    right = binary(generator, sweeps=sweeps, seeds=seeds, rows=rows, **options)
    tables = [
        np.stack([linear_matthews(labels, np.where(r, labels, 1 - labels)) for r in arm.reshape(-1, rows)])
        for arm in right
    ]
    return (tables[0] - tables[1]).reshape(sweeps, seeds, rows)


def linear_matthews(labels, predictions):
    """The jackknife's contributions from the four counts that a left-out example leaves: what `contributions`
    gives, faster (the test below says so).
    """
    cells = np.array([[np.sum((labels == i) & (predictions == j)) for j in (0, 1)] for i in (0, 1)], float)

    def value(table):
        (tn, fp), (fn, tp) = table
        below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (tp * tn - fp * fn) / below**0.5 if below > 0 else 0.0

    without = np.zeros((2, 2))
    for i in (0, 1):
        for j in (0, 1):
            if cells[i, j]:
                left = cells.copy()
                left[i, j] -= 1
                without[i, j] = value(left)
    own = without[labels, predictions]
    return 100 * (value(cells) + (len(labels) - 1) * (own.mean() - own))


def test_the_fast_matthews_is_the_jackknifes():
    generator = np.random.default_rng(0)
    labels, predictions = (generator.integers(0, 2, 50) for _ in range(2))
    found = 100 * contributions("matthews", labels, predictions)
    assert linear_matthews(labels, predictions) == pytest.approx(found, abs=1e-9)
    one = np.ones((1, 50), dtype=int)
    assert found.mean() == pytest.approx(100 * statistic("matthews")(labels, predictions, one)[0])


@pytest.mark.parametrize(("seeds", "gap", "least"), [(3, 0.05, 0.45), (12, 0.05, 0.8)])
def test_matthews(seeds, gap, least):
    generator = np.random.default_rng(seeds)
    size = (p_of(matthews(generator, SWEEPS, seeds, 300)) < 0.05).mean()
    power = (p_of(matthews(generator, 300, seeds, 300, gap=gap)) < 0.05).mean()
    print(f"Matthews, {seeds} seeds: size {size:.3f}, power {power:.3f}")
    assert abs(size - 0.05) < BAND and power > least


def linear_pearson(labels, predictions):
    """The influence of every example on Pearson's correlation, to which the jackknife comes down on many."""
    x = (labels - labels.mean(axis=-1, keepdims=True)) / labels.std(axis=-1, keepdims=True)
    y = (predictions - predictions.mean(axis=-1, keepdims=True)) / predictions.std(axis=-1, keepdims=True)
    r = (x * y).mean(axis=-1, keepdims=True)
    return r + x * y - r * (x**2 + y**2) / 2


@pytest.mark.parametrize(("seeds", "gap", "least"), [(3, 0.2, 0.4), (12, 0.2, 0.8)])
def test_pearson_on_continuous_predictions(seeds, gap, least):
    """Noise of a size that hangs on the seed, on the example, and on neither."""
    generator = np.random.default_rng(seeds)

    def normal(*shape):
        return generator.standard_normal(shape, dtype=np.float32)

    def p(gap=0.0):
        labels = normal(SWEEPS, 1, 200)
        a, b = (
            linear_pearson(
                labels,
                labels
                + (1 + more)
                * np.exp(0.05 * normal(SWEEPS, seeds, 1))
                * (0.3 * normal(SWEEPS, 1, 200) + 0.4 * normal(SWEEPS, seeds, 200)),
            )
            for more in (0.0, gap)
        )
        return p_of(100 * (a - b))

    size, power = (p() < 0.05).mean(), (p(gap) < 0.05).mean()
    print(f"Pearson, {seeds} seeds: size {size:.3f}, power {power:.3f}")
    assert abs(size - 0.05) < BAND and power > least


def test_the_influence_on_pearson_is_nearly_the_jackknifes():
    generator = np.random.default_rng(0)
    labels = generator.normal(size=400)
    predictions = labels + generator.normal(size=400)
    found = contributions("pearson", labels, predictions)
    linear = linear_pearson(labels, predictions)
    assert np.corrcoef(found, linear)[0, 1] > 0.9999 and found.std() == pytest.approx(linear.std(), rel=0.02)


def test_the_chance_of_the_rest_is_not_counted_twice():
    """What the standard error was before: the seeds' variance plus the examples'. Both hold the rest, so its
    size is a third of what it should be, and it sees less.
    """
    generator = np.random.default_rng(5)

    def both(gap):
        a, b = binary(generator, sweeps=SWEEPS, seeds=12, rows=408, seed=0.02, example=0.3, rest=0.7, gap=gap)
        table = 100 * (a.astype(np.float32) - b.astype(np.float32))
        found = spread(table)
        twice = np.sqrt((found.of_seeds + found.of_examples) / (12 * 408))
        return (p_of(table) < 0.05).mean(), (2 * ndtr(-np.abs(table.mean(axis=(1, 2))) / twice) < 0.05).mean()

    size, power = both(0.0), both(0.025)
    print(f"size {size[0]:.3f} (twice: {size[1]:.3f}), power {power[0]:.3f} (twice: {power[1]:.3f})")
    assert size[1] < 0.025 and abs(size[0] - 0.05) < BAND and power[0] > power[1] + 0.05
