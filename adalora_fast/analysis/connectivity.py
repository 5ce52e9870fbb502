"""The loss on the straight path between two runs, θ(α) = α θ₁ + (1 − α) θ₂ in ΔW and head.

On a grid of N points α_k = k / (N − 1), with losses L_k:

    BH(θa, θb) = sup_α [ L(α θa + (1 − α) θb) − (α L(θa) + (1 − α) L(θb)) ]        height above the chord
    CG(θ1, θ2) = sup over parts [γ, β] of the path of BH                            convexity gap
    barrier    = sup_α ε(α W₁ + (1 − α) W₂) − (ε(W₁) + ε(W₂)) / 2                   error barrier

all exact for the grid: its points are the α, γ and β that are tried. At one point k the lowest chord over all
parts that contain it is the lower convex envelope of the points (α_k, L_k), so CG is the largest distance of
the losses from that envelope. (Definitions: uniformity study of LoRA runs; the barrier is its equation 4.3.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .rows import Evaluation


@dataclass(frozen=True, kw_only=True)
class ConvexityGap:
    """The gap, and where it is: at `alpha`, over the chord from `gamma` to `beta`. At gap 0 all are 0."""

    gap: float
    alpha: float
    gamma: float
    beta: float


def grid(points: int) -> np.ndarray:
    """`points` evenly spaced α from 0 to 1; ValueError for fewer than three."""
    if points < 3:
        raise ValueError(f"{points} points are too few for a path; take 3 or more")
    return np.linspace(0.0, 1.0, points)


def chord(values: np.ndarray) -> np.ndarray:
    """The straight line [N] from the first to the last of values [N] at evenly spaced points."""
    return np.linspace(values[0], values[-1], len(values))


def height(losses: Sequence[float]) -> float:
    """BH of a path from its losses [N] at evenly spaced points; 0 at least, as it is 0 at the ends."""
    values = _checked(losses)
    return float(np.max(values - chord(values), initial=0.0))


def convexity_gap(losses: Sequence[float]) -> ConvexityGap:
    """CG of a path from its losses [N] at evenly spaced points."""
    values = _checked(losses)
    envelope: list[int] = []
    for k in range(len(values)):
        while len(envelope) > 1 and _is_above(values, envelope[-2], envelope[-1], k):
            envelope.pop()
        envelope.append(k)
    lowest = np.interp(np.arange(len(values)), envelope, values[envelope])
    worst = int(np.argmax(values - lowest))
    gap = float(values[worst] - lowest[worst])
    if gap <= 0:
        return ConvexityGap(gap=0.0, alpha=0.0, gamma=0.0, beta=0.0)
    place = int(np.searchsorted(envelope, worst))
    alpha, gamma, beta = (k / (len(values) - 1) for k in (worst, envelope[place - 1], envelope[place]))
    return ConvexityGap(gap=gap, alpha=alpha, gamma=gamma, beta=beta)


def error_barrier(errors: Sequence[float]) -> float:
    """sup_α ε(θ(α)) − (ε(θ₁) + ε(θ₂)) / 2 from errors (or losses) [N] at evenly spaced points."""
    values = _checked(errors)
    return float(values.max() - (values[0] + values[-1]) / 2)


def describe_path(path: Sequence[Evaluation], primary: str) -> dict:
    """Losses, metrics and every measure of one path, for JSON; errors are 1 − the metric `primary`."""
    losses = [point.loss for point in path]
    gap = convexity_gap(losses)
    return {
        "loss": losses,
        "metrics": {name: [point.metrics[name] for point in path] for name in path[0].metrics},
        "convexity_gap": gap.gap,
        "gap_at": {"alpha": gap.alpha, "gamma": gap.gamma, "beta": gap.beta},
        "height": height(losses),
        "loss_barrier": error_barrier(losses),
        "error_barrier": error_barrier([1 - point.metrics[primary] for point in path]),
    }


def _is_above(values: np.ndarray, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies on or above the chord of the others."""
    return (values[middle] - values[first]) * (last - first) >= (values[last] - values[first]) * (
        middle - first
    )


def _checked(losses: Sequence[float]) -> np.ndarray:
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or len(values) < 3 or not np.isfinite(values).all():
        raise ValueError(f"a path of losses is {values.tolist()}; give three or more finite numbers")
    return values
