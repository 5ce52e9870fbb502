"""What a sweep could have seen, and how many seeds a difference needs: from the spread of finished runs.

A contrast's mean squares give three variances, none of which is taken to be below zero: of the seeds, of the
examples, and of the rest. With K seeds on N examples

    SE² = seeds / K + examples / N + rest / (K N),

of which the second part stays however many seeds there are. A difference is found where |t| exceeds its
threshold; the mean squares that a sweep will meet are drawn from their distributions (χ² / dof), and the
estimate from the normal distribution, so that the test whose power is told is the one that reports make, the
chance in its own standard error and degrees of freedom included. The variances are known as well as a few
seeds can tell: these are orders of magnitude.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .estimates import DIFFERS, Spread

POWER = 0.8
DIFFERENCES = (0.3, 0.5, 1.0)  # points that reports plan for
MOST_SEEDS = 1000
DRAWS = 12  # 2^12 of them


@dataclass(frozen=True, kw_only=True)
class Variances:
    """Of one seed, of one example and of what is left of one example of one seed, in points²."""

    seeds: float
    examples: float
    rest: float

    @staticmethod
    def of(found: Spread) -> "Variances | None":
        """None for one seed, whose spread says nothing of other seeds."""
        if found.seeds < 2:
            return None
        return Variances(
            seeds=max(found.of_seeds - found.of_rest, 0.0) / found.examples,
            examples=max(found.of_examples - found.of_rest, 0.0) / found.seeds,
            rest=float(found.of_rest),
        )

    def square(self, seeds: int, examples: int) -> float:
        """SE² of so many seeds on so many examples."""
        return self.seeds / seeds + self.examples / examples + self.rest / (seeds * examples)


def smallest_difference(
    variances: Variances, seeds: int, examples: int, *, level: float = DIFFERS, power: float = POWER
) -> float:
    """The difference in points that a test at `level` finds with this power; infinite for one seed.

    Of m contrasts that Holm corrects, level 0.05 / m is what one needs that stands alone.
    """
    from scipy.special import stdtrit

    if seeds < 2:
        return float("inf")
    normal, *chances = _draws(seeds, examples)
    rest = variances.rest
    expected = (examples * variances.seeds + rest, seeds * variances.examples + rest, rest)
    of_seeds, of_examples, of_rest = (mean * chance for mean, chance in zip(expected, chances, strict=True))
    drawn = Spread(
        seeds=seeds, examples=examples, of_seeds=of_seeds, of_examples=of_examples, of_rest=of_rest
    )
    thresholds = stdtrit(drawn.freedom, 1 - level / 2) * np.sqrt(drawn.square)
    # Found in every draw whose difference + error exceeds the threshold: in this share of them.
    return float(np.quantile(thresholds - normal * np.sqrt(variances.square(seeds, examples)), power))


@cache
def _draws(seeds: int, examples: int) -> tuple[np.ndarray, ...]:
    """Standard normal, and χ² / dof of the three mean squares: points of Sobol's sequence, evenly spread and
    always the same.
    """
    from scipy.special import chdtri, ndtri
    from scipy.stats.qmc import Sobol

    normal, *chances = (Sobol(4, scramble=False).random_base2(DRAWS) + 0.5 / 2**DRAWS).T
    freedoms = (seeds - 1, max(examples - 1, 1), (seeds - 1) * max(examples - 1, 1))
    return ndtri(normal), *(chdtri(dof, part) / dof for dof, part in zip(freedoms, chances, strict=True))


def seeds_needed(
    variances: Variances, difference: float, examples: int, *, level: float = DIFFERS, power: float = POWER
) -> int | None:
    """The fewest seeds with which a difference in points is found with this power; None where a thousand are
    too few, as where the chance of the examples alone hides it.
    """
    if not difference > 0:
        raise ValueError(f"a difference of {difference} points cannot be planned for; give one above 0")

    def sees(seeds: int) -> bool:
        return smallest_difference(variances, seeds, examples, level=level, power=power) <= difference

    if not sees(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # low does not see it, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(middle) else (middle, high)
    return high


def examples_needed(
    variances: Variances, difference: float, *, level: float = DIFFERS, power: float = POWER
) -> float:
    """The number of examples below which no number of seeds finds a difference in points."""
    from scipy.special import ndtri

    return variances.examples * float((ndtri(1 - level / 2) + ndtri(power)) / difference) ** 2
