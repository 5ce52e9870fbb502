"""How alike final rank maps are: between the seeds of one arm, and between arms.

A rank map is the final rank of every adapted matrix, r [L]; Σ r = K, the budget.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .collect import Run, Sweep


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Means over all pairs of seeds of one arm; `spearman` is None where a map has one rank everywhere."""

    seeds: int
    spearman: float | None
    overlap: float
    chance: float


def rank_vector(run: Run, matrices: list[str]) -> np.ndarray:
    """r [L] in the order of `matrices`; ValueError where the run adapts other ones."""
    if set(run.ranks) != set(matrices):
        raise ValueError(
            f"{run.folder / 'ranks.json'} adapts other matrices than the arm's other seeds; run it again"
        )
    return np.array([run.ranks[name] for name in matrices], dtype=float)


def adapted_matrices(sweep: Sweep, task: str, arm: str) -> list[str]:
    """The L matrices that the arm adapts (recipes may give arms different ones), in an order that all arms of
    the task share; [] where it has no ranks.
    """
    own = next((run.ranks for run in sweep.of(task, arm).values() if run.ranks), {})
    order = dict.fromkeys(name for run in sweep.task_runs(task) for name in run.ranks)
    return [name for name in order if name in own]


def rank_maps(sweep: Sweep, task: str, arm: str) -> np.ndarray:
    """r [seeds, L] of one arm's complete runs in the order of `adapted_matrices`; [0, 0] without."""
    runs = [run for run in sweep.of(task, arm).values() if run.ranks]
    if not runs:
        return np.empty((0, 0))
    matrices = adapted_matrices(sweep, task, arm)
    return np.stack([rank_vector(run, matrices) for run in runs])


def varies(maps: np.ndarray) -> bool:
    """Whether some map has more than one rank in it."""
    return maps.size > 0 and bool((np.ptp(maps, axis=1) > 0).any())


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation of two rank maps [L]; None where one is constant: it is undefined there."""
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Σ_l min(a_l, b_l) / (½ Σ_l (a_l + b_l)): the part of the rank that both maps put in the same place."""
    return float(2 * np.minimum(a, b).sum() / (a.sum() + b.sum())) if a.sum() + b.sum() else 1.0


def chance_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """`overlap` expected where b's ranks are shuffled over the matrices: Σ_ij min(a_i, b_j) / L in its
    numerator, exactly.
    """
    total = a.sum() + b.sum()
    return float(2 * np.minimum(a[:, None], b[None, :]).sum() / len(a) / total) if total else 1.0


def stability(maps: np.ndarray) -> Stability | None:
    """Of the maps [seeds, L] of one arm; None for fewer than two seeds."""
    if len(maps) < 2:
        return None
    pairs = list(combinations(maps, 2))
    correlations = [spearman(a, b) for a, b in pairs]
    defined = [value for value in correlations if value is not None]
    return Stability(
        seeds=len(maps),
        spearman=float(np.mean(defined)) if len(defined) == len(pairs) else None,
        overlap=float(np.mean([overlap(a, b) for a, b in pairs])),
        chance=float(np.mean([chance_overlap(a, b) for a, b in pairs])),
    )


def across_tasks(sweep: Sweep, arm: str) -> tuple[int, float | None]:
    """(tasks of which the arm has maps over the same matrices; the mean Spearman over pairs of their mean
    maps). None for fewer than two tasks, or where a mean map is constant.
    """
    maps = {task: rank_maps(sweep, task, arm) for task in sweep.plan.tasks}
    maps = {task: own.mean(axis=0) for task, own in maps.items() if varies(own)}
    if len({tuple(adapted_matrices(sweep, task, arm)) for task in maps}) != 1:
        return len(maps), None
    found = [spearman(a, b) for a, b in combinations(maps.values(), 2)]
    return len(maps), float(np.mean(found)) if found and None not in found else None


def agreement(sweep: Sweep, task: str) -> tuple[list[str], np.ndarray]:
    """(arms whose ranks vary; Spearman's correlations [arms, arms] of their mean rank maps over seeds).

    NaN where a mean map is constant, or the two arms adapt different matrices.
    """
    maps = {arm: rank_maps(sweep, task, arm) for arm in sweep.plan.arms}
    means = {arm: own.mean(axis=0) for arm, own in maps.items() if varies(own)}
    table = np.eye(len(means))
    matrices = {arm: adapted_matrices(sweep, task, arm) for arm in means}
    for (i, a), (j, b) in combinations(enumerate(means), 2):
        value = spearman(means[a], means[b]) if matrices[a] == matrices[b] else None
        table[i, j] = table[j, i] = np.nan if value is None else value
    return list(means), table
