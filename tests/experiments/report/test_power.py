"""Power planning: against simulated sweeps, and what it says of sweeps that cannot see."""

import numpy as np
import pytest
from scipy.special import stdtr
from scipy.stats import nct, t

from adalora_fast.experiments.report.estimates import Spread, spread
from adalora_fast.experiments.report.power import (
    Variances,
    examples_needed,
    seeds_needed,
    smallest_difference,
)

LIKE = Variances(seeds=0.3, examples=60.0, rest=500.0)  # of a contrast on a few hundred rows, in points²


def tables(generator, variances, seeds, examples, sweeps, gap):
    parts = (
        (seeds, 1, variances.seeds),
        (1, examples, variances.examples),
        (seeds, examples, variances.rest),
    )
    return gap + sum(generator.normal(size=(sweeps, k, n)) * variance**0.5 for k, n, variance in parts)


@pytest.mark.parametrize("seeds", [3, 12])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_the_smallest_difference_is_seen_in_four_of_five_sweeps(seeds, level):
    gap = smallest_difference(LIKE, seeds, 300, level=level)
    found = tables(np.random.default_rng(seeds), LIKE, seeds, 300, 2000, gap)
    own = spread(found)
    p = 2 * stdtr(own.freedom, -np.abs(found.mean(axis=(1, 2))) / np.sqrt(own.square))
    seen = (p < level).mean()
    print(f"{seeds} seeds at {level:g}: {gap:.2f} points are seen in {seen:.3f}")
    assert abs(seen - 0.8) < 3.3 * (0.16 / 2000) ** 0.5 + 0.01


def test_of_seeds_alone_it_is_the_noncentral_t():
    found = smallest_difference(Variances(seeds=2.0, examples=0.0, rest=0.0), 8, 100)
    power = nct.sf(t.ppf(0.975, 7), 7, found / (2.0 / 8) ** 0.5)
    assert power == pytest.approx(0.8, abs=0.02)


def test_variances_of_a_spread():
    own = Spread(seeds=5, examples=300, of_seeds=590.0, of_examples=800.0, of_rest=500.0)
    assert Variances.of(own) == LIKE
    assert LIKE.square(5, 300) == pytest.approx(own.square)
    below = Spread(seeds=5, examples=300, of_seeds=1.0, of_examples=2.0, of_rest=500.0)
    assert Variances.of(below) == Variances(seeds=0.0, examples=0.0, rest=500.0)
    assert Variances.of(Spread(seeds=1, examples=3, of_seeds=0, of_examples=1, of_rest=0)) is None


def test_seeds_needed():
    needed = seeds_needed(LIKE, 2.0, 300)
    assert smallest_difference(LIKE, needed, 300) <= 2.0 < smallest_difference(LIKE, needed - 1, 300)
    assert needed < seeds_needed(LIKE, 2.0, 300, level=0.01)
    assert smallest_difference(LIKE, 1, 300) == float("inf")
    with pytest.raises(ValueError, match="a difference of 0 points cannot be planned for; give one above 0"):
        seeds_needed(LIKE, 0, 300)


def test_a_development_set_that_is_too_small_is_told():
    """However many seeds, the examples' chance stays; more examples let it be seen."""
    assert seeds_needed(LIKE, 1.0, 300) is None
    rows = examples_needed(LIKE, 1.0)
    assert 300 < rows == pytest.approx(60 * (1.95996 + 0.84162) ** 2, rel=1e-3)
    assert seeds_needed(LIKE, 1.0, int(1.2 * rows)) is not None
    assert seeds_needed(LIKE, 1.0, int(0.95 * rows)) is None
