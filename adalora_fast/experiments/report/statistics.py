"""Differences between arms with what is known of their uncertainty: bootstrap, Holm, equivalence.

Shapes: K paired seeds, B replicates, S[k, b] the metric of seed k's run on the b-th resample of the examples.

The bootstrap is hierarchical and paired. Replicate b draws K seeds with replacement (w[b, k] = how often / K)
and one resample of the examples, and is

    d*_b = Σ_k w[b, k] (S_a[k, b] - S_b[k, b]).

The examples are drawn once per replicate, for both arms and every seed, because all runs are evaluated on one
development set: seeds and examples are crossed, and what is hard for one run is hard for the others. Drawing
anew for every seed would average that shared part away and give intervals that are too narrow.
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
class Difference:
    """a minus b in the unit of the metric: value, 95 % interval, 90 % interval, two-sided bootstrap p."""

    value: float
    low: float
    high: float
    low90: float
    high90: float
    p: float

    def __neg__(self) -> "Difference":
        return Difference(
            value=-self.value,
            low=-self.high,
            high=-self.low,
            low90=-self.high90,
            high90=-self.low90,
            p=self.p,
        )


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
    return np.round(np.einsum("bk,kb->b", weights, a - b), 9)


def difference(value: float, replicates: np.ndarray) -> Difference:
    """Percentile intervals and p of an observed difference with the replicates d* [B].

    p = min(1, 2 (min(#{d* <= 0}, #{d* >= 0}) + 1) / (B + 1)): never 0, and 1 for arms that are the same.
    """
    low, low90, high90, high = np.quantile(replicates, [0.025, 0.05, 0.95, 0.975])
    tail = min(np.count_nonzero(replicates <= 0), np.count_nonzero(replicates >= 0))
    p = min(1.0, 2 * (tail + 1) / (len(replicates) + 1))
    return Difference(
        value=float(value), low=float(low), high=float(high), low90=float(low90), high90=float(high90), p=p
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family: p_(i) becomes max over j <= i of (m - j + 1) p_(j), at most 1."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, dtype=float)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def verdict(estimate: Difference, holm_p: float, margin: float) -> str:
    """What the numbers allow to say: "differs" for Holm's p < 0.05; "equivalent within ±margin" where the
    90 % interval lies inside it (two one-sided tests at 5 %); both, or "not decided".
    """
    differs = holm_p < DIFFERS
    inside = -margin < estimate.low90 and estimate.high90 < margin
    if differs and inside:
        return f"differs, by less than {margin:g}"
    if differs:
        return "differs"
    return f"equivalent within ±{margin:g}" if inside else "not decided"


def replicates_for(contrasts: int, least: int = 2000) -> int:
    """B that lets Holm's smallest p in a family of so many contrasts reach 0.025: 2 m / (B + 1) <= 0.025."""
    return max(least, 80 * contrasts)
