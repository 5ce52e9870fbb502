"""Soups: one model whose weights are a mean of several runs' weights, and the rival that averages outputs.

Greedy soup with weight interpolation, over runs in the order of their loss on the selection rows: θ_g starts
as the best run; for each next θ_i the four candidates

    (α θ_g + (5 − α) θ_i) / 5        α = 1, …, 4

are tried, and the best of them becomes θ_g if its loss is below that of θ_g. So the loss of the soup on the
selection rows is never above that of its best member. Since every θ_g is Σ_i w_i θ_i, only w is kept.

The averaging soup (greedy soup of arXiv 2203.05482) goes the same way with the plain mean of the members so
far and θ_i as its one candidate. The uniform soup is the mean of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .rows import Logits

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run that was offered to the soup: the losses of its candidates (α = 1 … 4) and the best α (None in
    the averaging soup, which has one); `taken` where that one became the soup.
    """

    run: int
    losses: list[float]
    alpha: int | None
    taken: bool


@dataclass(frozen=True, kw_only=True)
class ChosenSoup:
    """`weights` per run, which sum to 1; `loss` on the selection rows; `order` of the runs by their loss."""

    weights: list[float]
    loss: float
    order: list[int]
    trials: list[Trial] = field(default_factory=list)

    @property
    def members(self) -> list[int]:
        """The runs that are in it, in the order in which they came."""
        return [run for run in self.order if self.weights[run] > 0]


def greedy_soup(losses: Sequence[float], loss_of: Callable[[list[float]], float]) -> ChosenSoup:
    """The greedy soup of runs.

    Args:
        losses: of each run by itself, on the selection rows.
        loss_of: the loss of Σ_i w_i θ_i on the same rows, given w.

    Raises:
        ValueError: no runs, or a loss that is not finite.
    """
    order = _in_order(losses)
    weights = [float(run == order[0]) for run in range(len(losses))]
    loss = float(losses[order[0]])
    trials = []
    for run in order[1:]:
        candidates = [_stirred(weights, run, alpha) for alpha in range(1, STEPS)]
        tried = [loss_of(candidate) for candidate in candidates]
        best = int(np.argmin(tried))
        taken = tried[best] < loss
        trials.append(Trial(run=run, losses=tried, alpha=best + 1, taken=taken))
        if taken:
            weights, loss = candidates[best], tried[best]
    return ChosenSoup(weights=weights, loss=loss, order=order, trials=trials)


def averaging_soup(losses: Sequence[float], loss_of: Callable[[list[float]], float]) -> ChosenSoup:
    """The plain mean of those runs that lowered its loss when they came. Arguments and errors:
    :func:`greedy_soup`.
    """
    order = _in_order(losses)
    members, loss, trials = [order[0]], float(losses[order[0]]), []
    for run in order[1:]:
        tried = loss_of(_mean([*members, run], len(losses)))
        taken = tried < loss
        trials.append(Trial(run=run, losses=[tried], alpha=None, taken=taken))
        if taken:
            members, loss = [*members, run], tried
    return ChosenSoup(weights=_mean(members, len(losses)), loss=loss, order=order, trials=trials)


def _in_order(losses: Sequence[float]) -> list[int]:
    if not losses or not np.isfinite(losses).all():
        raise ValueError(f"the runs' losses are {list(losses)}; give one finite number or more")
    return [int(run) for run in np.argsort(losses, kind="stable")]


def _mean(members: Sequence[int], runs: int) -> list[float]:
    return [1 / len(members) if run in members else 0.0 for run in range(runs)]


def uniform_soup(runs: int) -> list[float]:
    """The weights of a plain mean of all runs."""
    return [1 / runs] * runs


def ensemble_logits(outputs: Sequence[Logits]) -> Logits:
    """The mean of several models' logits, row by row: [N, C], or twice [N, T]."""
    return tuple(np.mean(column, axis=0, dtype=np.float64) for column in zip(*outputs, strict=True))


def _stirred(weights: Sequence[float], run: int, alpha: int) -> list[float]:
    """The weights of (α θ_g + (5 − α) θ_run) / 5."""
    mixed = [alpha * weight / STEPS for weight in weights]
    mixed[run] += (STEPS - alpha) / STEPS
    return mixed
