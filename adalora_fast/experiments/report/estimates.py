"""Differences between arms with what is known of their uncertainty: crossed chances, t, Holm, equivalence.

Shapes: K paired seeds, N examples; D[k, n] is what seed k and example n contribute to the difference of two
arms, in points, so that the difference is the mean of D (`examples` says what stands in D for a metric that
is no mean over examples).

All runs are evaluated on one development set, so seeds and examples are crossed: a two-way table without
replication, and three chances,

    D[k, n] = difference + seed k + example n + rest (k, n).

With the mean squares MS of its analysis of variance, the mean of D has the variance

    SE² = (MS_seeds + MS_examples - MS_rest) / (N K),

and Satterthwaite's (1946) degrees of freedom SE⁴ / Σ (MS / (N K))² / dof over the three. MS_rest is taken
away because it is in both others: a sum of the seeds' variance and of the examples' would count it twice,
which leaves a test at 5 % with a size of about 1 % wherever the rest is most of the spread, and on
development sets of a few hundred rows it is. Nothing of another arm enters: arms differ in their spread.

Three mean squares may contradict each other, where a variance is estimated as negative (MS_seeds or
MS_examples below MS_rest, as happens by chance where it is small). SE² is therefore never less than
MS_seeds / (N K), the variance of the seeds' mean, nor less than MS_examples / (N K), that of the examples'.

The size at 5 %, simulated: 2 to 6 % with three seeds and 3 to 5 % from twelve on, the less the more of the
spread is the rest; up to 8 % with three seeds where the rest is under a twentieth and the seeds are most of
it. Two seeds would have up to 12 %: they get one degree of freedom, with which they decide next to nothing.
`tests/experiments/report/test_calibration.py` simulates it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIFFERS = 0.05  # Holm's p below which two arms are said to differ


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 in the denominator (None for one value).

    ValueError where there are no values.
    """
    if not len(values):
        raise ValueError("there are no values to average; give at least one")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """95 % interval, 90 % interval and two-sided p of a difference."""

    low: float
    high: float
    low90: float
    high90: float
    p: float

    def __neg__(self) -> "Bounds":
        return Bounds(low=-self.high, high=-self.low, low90=-self.high90, high90=-self.low90, p=self.p)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The mean squares of a table of `seeds` by `examples`. With one seed there are neither those of the
    seeds nor the rest's, and what is known is the examples' chance alone. Arrays stand for many tables.
    """

    seeds: int
    examples: int
    of_seeds: float
    of_examples: float
    of_rest: float

    @property
    def square(self) -> float:
        """SE² of the table's mean."""
        together = self.of_seeds + self.of_examples - self.of_rest
        largest = np.maximum(np.maximum(together, self.of_seeds), self.of_examples)
        return largest / (self.seeds * self.examples)

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom of SE²; 1 for two seeds, the examples' for one."""
        seeds, examples = self.seeds - 1, max(self.examples - 1, 1)
        if seeds == 0:
            return float(examples)
        if seeds == 1:
            return 1.0
        parts = (
            self.of_seeds**2 / seeds + self.of_examples**2 / examples + self.of_rest**2 / (seeds * examples)
        )
        whole = (self.square * self.seeds * self.examples) ** 2
        return np.divide(whole, parts, out=np.full(np.shape(parts), float(seeds)), where=parts > 0)[()]


def spread(table: np.ndarray) -> Spread:
    """The mean squares of a table [..., K, N]."""
    *_, seeds, examples = table.shape
    rows, columns = table.mean(axis=-1), table.mean(axis=-2)
    middle = rows.mean(axis=-1)
    rest = table - rows[..., None] - columns[..., None, :] + middle[..., None, None]
    k, n = max(seeds - 1, 1), max(examples - 1, 1)
    return Spread(
        seeds=seeds,
        examples=examples,
        of_seeds=examples * ((rows - middle[..., None]) ** 2).sum(axis=-1) / k,
        of_examples=seeds * ((columns - middle[..., None]) ** 2).sum(axis=-1) / n,
        of_rest=(rest**2).sum(axis=(-2, -1)) / (k * n),
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of a table in the unit of the metric, what it is known by, and how it may have come about."""

    value: float
    bounds: Bounds
    spread: Spread

    @property
    def knows_training(self) -> bool:
        """False for one seed, which knows of the examples' chance alone."""
        return self.spread.seeds > 1

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval does, and more is known than the examples' chance."""
        return self.knows_training and (self.bounds.low > 0 or self.bounds.high < 0)

    def __neg__(self) -> "Estimate":
        return Estimate(value=-self.value, bounds=-self.bounds, spread=self.spread)


def estimate(table: np.ndarray) -> Estimate:
    """The mean of a table [K, N] with its intervals and p by t. Two equal runs may differ in the last bit
    (sums are taken in another order), which is no difference: nine decimals count.
    """
    table = np.round(table, 9)
    value, found = float(table.mean()), spread(table)
    return Estimate(value=value, bounds=bounds(value, found), spread=found)


def bounds(value: float, found: Spread) -> Bounds:
    """Intervals and p of t = value / SE."""
    from scipy.special import stdtr, stdtrit

    error, freedom = float(np.sqrt(found.square)), float(found.freedom)
    if error == 0:
        return Bounds(low=value, high=value, low90=value, high90=value, p=float(value == 0))
    wide, narrow = (float(stdtrit(freedom, share)) * error for share in (0.975, 0.95))
    return Bounds(
        low=value - wide,
        high=value + wide,
        low90=value - narrow,
        high90=value + narrow,
        p=float(2 * stdtr(freedom, -abs(value) / error)),
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family: p_(i) becomes max over j <= i of (m - j + 1) p_(j), at most 1."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, dtype=float)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def verdict(found: Estimate, holm_p: float, margin: float) -> str:
    """What the numbers allow to say of a declared contrast: "differs" for Holm's p < 0.05; "equivalent within
    ±margin" where the 90 % interval lies inside it (two one-sided tests at 5 %); both, or "not decided", as
    ever for one seed.
    """
    if not found.knows_training:
        return "not decided"
    differs = holm_p < DIFFERS
    inside = -margin < found.bounds.low90 and found.bounds.high90 < margin
    if differs and inside:
        return f"differs, by less than {margin:g}"
    if differs:
        return "differs"
    return f"equivalent within ±{margin:g}" if inside else "not decided"


def exploratory(found: Estimate) -> str:
    """What is said of a contrast that nobody declared: no verdict, and on which side of 0 its interval is."""
    if not found.excludes_zero:
        return "exploratory"
    return f"exploratory, 95 % interval {'above' if found.value > 0 else 'below'} 0"
