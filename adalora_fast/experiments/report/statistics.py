"""Differences between arms with what is known of their uncertainty: bootstrap, t, Holm, equivalence.

Shapes: K paired seeds, B replicates, S[k, b] the metric of seed k's run on the b-th resample of the examples.

Two views of one difference, and a verdict needs both. The bootstrap is hierarchical and paired. Replicate
b draws K seeds with replacement (w[b, k] = how often / K) and one resample of the examples, and is

    d*_b = Σ_k w[b, k] (S_a[k, b] - S_b[k, b]).

The examples are drawn once per replicate, for both arms and every seed, because all runs are evaluated on one
development set: seeds and examples are crossed, and what is hard for one run is hard for the others. Drawing
anew for every seed would average that shared part away and give intervals that are too narrow.

Three seeds cannot be resampled to more than they are: where they all have one sign, so has every replicate,
which happens by chance with 2^(1-K). Therefore also Student's t with SE^2 = s^2 / K + V, V the variance of
the mean over seeds when only the examples are resampled. s^2 is the larger of two estimates of the variance
of a seed's difference: the pair's own, and the one pooled over all pairs of the family, which has more
degrees of freedom (A arms, K seeds: (A-1)(K-1), as of the residuals of a randomised block design); those of
SE^2 follow Satterthwaite (1946).

How often six equal arms give a false "differs" by t alone, in simulated families of three seeds (Holm allows
5 %; the examples' chance from 0 to as much as that of the seeds' mean): with the pair's own variance in 4 to
21 %; with the larger one in 2 to 3 % where the arms' spreads are equal and in 5 % where they differ fivefold,
but in 8 to 9 % where one arm has ten times the spread of the others: of its pairs the own variance is the
larger, which has K-1 degrees of freedom where those of the pooled one are counted. It is worse with more arms
(10 % for thirteen) and with two seeds (13 to 16 %), and gone with five (4 %).
`tests/experiments/test_report_statistics.py` simulates six arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NORMAL = 1e9  # degrees of freedom from which t is the normal distribution
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
    """95 % interval, 90 % interval and two-sided p of a difference, by one method."""

    low: float
    high: float
    low90: float
    high90: float
    p: float

    def __neg__(self) -> "Bounds":
        return Bounds(low=-self.high, high=-self.low, low90=-self.high90, high90=-self.low90, p=self.p)

    def __or__(self, other: "Bounds") -> "Bounds":
        """The intervals that hold those of both, and the larger p."""
        return Bounds(
            low=min(self.low, other.low), high=max(self.high, other.high),
            low90=min(self.low90, other.low90), high90=max(self.high90, other.high90),
            p=max(self.p, other.p),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difference:
    """a minus b in the unit of the metric. `student` of None: the two have one seed in common, and the
    bootstrap knows of the examples' chance alone.
    """

    value: float
    bootstrap: Bounds
    student: Bounds | None

    @property
    def bounds(self) -> Bounds:
        """What is said of it: of both methods the wider intervals and the larger p."""
        return self.bootstrap if self.student is None else self.bootstrap | self.student

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval does, and more is known than the examples' chance."""
        return self.student is not None and (self.bounds.low > 0 or self.bounds.high < 0)

    def __neg__(self) -> "Difference":
        turned = None if self.student is None else -self.student
        return Difference(value=-self.value, bootstrap=-self.bootstrap, student=turned)


def seed_weights(seeds: int, replicates: int, generator: np.random.Generator) -> np.ndarray:
    """w [B, K]: how often each of K seeds is drawn in each replicate, over K; rows sum to 1."""
    if seeds < 1 or replicates < 1:
        raise ValueError(f"{seeds} seeds and {replicates} replicates make no bootstrap; give at least 1 each")
    drawn = generator.integers(0, seeds, size=(replicates, seeds))
    return (drawn[:, :, None] == np.arange(seeds)).sum(axis=1) / seeds


def paired_replicates(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """d* [B] from S_a and S_b [K, B] of the same seeds in the same order, and w [B, K]."""
    if a.shape != b.shape or weights.shape != a.shape[::-1]:
        raise ValueError(
            f"replicates of shape {a.shape} and {b.shape} and weights {weights.shape} do not belong "
            "together; give [seeds, B] twice and [B, seeds]"
        )
    # Two equal runs may differ in the last bit (sums are taken in another order), which is no difference.
    return np.round(seed_means(a - b, weights), 9)


def seed_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ_k w[b, k] S[k, b] [B] from S [K, B] and w [B, K]."""
    return np.einsum("bk,kb->b", weights, values)


def percentiles(replicates: np.ndarray) -> Bounds:
    """Percentile intervals and p of a difference with the replicates d* [B].

    p = min(1, 2 (min(#{d* <= 0}, #{d* >= 0}) + 1) / (B + 1)): never 0, and 1 for arms that are the same.
    """
    low, low90, high90, high = np.quantile(replicates, [0.025, 0.05, 0.95, 0.975])
    tail = min(np.count_nonzero(replicates <= 0), np.count_nonzero(replicates >= 0))
    p = min(1.0, 2 * (tail + 1) / (len(replicates) + 1))
    return Bounds(low=float(low), high=float(high), low90=float(low90), high90=float(high90), p=p)


def student(value: float, seeds: int, seed_variance: float, examples: float, dof: int) -> Bounds:
    """Intervals and p of t = value / SE, SE^2 = seed_variance / seeds + examples, with Satterthwaite's
    degrees of freedom: SE^4 dof / (seed_variance / seeds)^2, `dof` those of the seeds' variance.
    """
    from scipy.special import stdtr, stdtrit

    of_seeds = seed_variance / seeds
    error = float(np.sqrt(of_seeds + examples))
    if error == 0:
        return Bounds(low=value, high=value, low90=value, high90=value, p=float(value == 0))
    freedom = min(error**4 * dof / of_seeds**2, NORMAL) if of_seeds else NORMAL
    wide, narrow = (float(stdtrit(freedom, share)) * error for share in (0.975, 0.95))
    return Bounds(
        low=value - wide,
        high=value + wide,
        low90=value - narrow,
        high90=value + narrow,
        p=float(2 * stdtr(freedom, -abs(value) / error)),
    )


def pooled_variance(differences: Mapping[tuple[str, str], np.ndarray]) -> tuple[float, int]:
    """(variance of a seed's difference, pooled over all pairs of arms; its degrees of freedom) from the
    differences [K] of every pair; (0, 0) where no pair has two seeds.

    Over all pairs of A arms with the same K seeds the mean of the pairs' variances is twice the residual mean
    square of arm x seed, which has (A-1)(K-1) degrees of freedom. Pairs with fewer seeds count for less, and
    K is then the smallest number.
    """
    several = {pair: own for pair, own in differences.items() if len(own) > 1}
    if not several:
        return 0.0, 0
    squares = sum(float(np.sum((own - own.mean()) ** 2)) for own in several.values())
    arms = len({arm for pair in several for arm in pair})
    fewest = min(map(len, several.values()))
    return squares / sum(len(own) - 1 for own in several.values()), (arms - 1) * (fewest - 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family: p_(i) becomes max over j <= i of (m - j + 1) p_(j), at most 1."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, dtype=float)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def verdict(estimate: Difference, holm_p: float, margin: float) -> str:
    """What the numbers allow to say: "differs" for Holm's p < 0.05; "equivalent within ±margin" where the
    90 % interval lies inside it (two one-sided tests at 5 %); both, or "not decided", as ever for one seed.
    """
    if estimate.student is None:
        return "not decided"
    differs = holm_p < DIFFERS
    inside = -margin < estimate.bounds.low90 and estimate.bounds.high90 < margin
    if differs and inside:
        return f"differs, by less than {margin:g}"
    if differs:
        return "differs"
    return f"equivalent within ±{margin:g}" if inside else "not decided"


def replicates_for(contrasts: int, least: int = 10_000) -> int:
    """B that lets Holm's smallest p in a family of so many contrasts reach 0.025: 2 m / (B + 1) <= 0.025."""
    return max(least, 80 * contrasts)
