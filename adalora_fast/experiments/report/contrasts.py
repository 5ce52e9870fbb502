"""Every pair of arms compared, per task and for the average over tasks, and the interval of every arm."""

import zlib
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .replicates import task_replicates
from .statistics import (
    Difference,
    holm,
    paired_replicates,
    percentiles,
    pooled_variance,
    replicates_for,
    seed_means,
    seed_weights,
    student,
    verdict,
)
from .sweep import Sweep

AVERAGE = "average"  # stands for a task where the average over all tasks is meant


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Arm a minus arm b in points over `seeds` paired seeds. `holm_p` is corrected for all pairs of the
    same task (or of the average).
    """

    task: str
    a: str
    b: str
    seeds: int
    estimate: Difference
    holm_p: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one difference: d_k of every seed [K], replicates d* [B], and the variance of the
    mean of d_k when only the examples are resampled.
    """

    seeds: np.ndarray
    replicates: np.ndarray
    examples: float


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """All contrasts of a sweep, the 95 % interval (low, high) in points of every arm's own mean by (task,
    arm), the number of replicates, and what had to be left out.
    """

    all: tuple[Contrast, ...]
    intervals: dict[tuple[str, str], tuple[float, float]]
    replicates: int
    remarks: tuple[str, ...]

    def between(self, task: str, a: str, b: str) -> Contrast | None:
        """a minus b, whichever way it was computed; None where the two have no seed in common."""
        for contrast in self.all:
            if contrast.task == task and {contrast.a, contrast.b} == {a, b}:
                return contrast if contrast.a == a else _turned(contrast)
        return None

    def of(self, task: str) -> list[Contrast]:
        return [contrast for contrast in self.all if contrast.task == task]


def compare_all(sweep: Sweep, replicates: int | None = None, seed: int = 0) -> Contrasts:
    """Contrast every two arms of a sweep (see `statistics` for the methods).

    Only seeds that both arms have enter. `replicates` of None takes as many as Holm's correction needs. An
    arm's own interval is of the same replicates: percentiles of Σ_k w[b, k] S[k, b], where all its runs have
    predictions.

    The average over tasks takes the arms that are complete everywhere. Its bootstrap draws seeds and examples
    anew for every task, as if runs of one seed on two tasks had nothing in common; its t takes each seed's
    average over the tasks, and supposes nothing.
    """
    arms = sweep.plan.ordered_arms
    if replicates is None:
        replicates = replicates_for(len(arms) * (len(arms) - 1) // 2)
    found: list[Contrast] = []
    intervals: dict[tuple[str, str], tuple[float, float]] = {}
    remarks: list[str] = []
    whole = set(sweep.whole_arms())
    parts: dict[tuple[str, str], list[Measured]] = {
        pair: [] for pair in combinations(arms, 2) if whole.issuperset(pair)
    }
    for task in sweep.plan.tasks:
        measured = task_replicates(sweep, task, replicates, seed)
        remarks.extend(measured.remarks)
        weights = {
            count: seed_weights(
                count, replicates, np.random.Generator(np.random.PCG64([seed, zlib.crc32(task.encode())]))
            )
            for count in range(1, len(sweep.plan.seeds) + 1)
        }
        for arm in arms:
            own = [measured.values.get((arm, s)) for s in sweep.of(task, arm)]
            if own and all(values is not None for values in own):
                low, high = np.quantile(seed_means(np.stack(own), weights[len(own)]), [0.025, 0.975])
                intervals[task, arm] = (float(low), float(high))
        compared: dict[tuple[str, str], Measured] = {}
        for earlier, later in combinations(arms, 2):
            seeds = [s for s in sweep.plan.seeds if {(earlier, s), (later, s)} <= measured.values.keys()]
            if seeds:
                a, b = (np.stack([measured.values[arm, s] for s in seeds]) for arm in (later, earlier))
                mine, theirs = ([sweep.runs[task, arm, s].points for s in seeds] for arm in (later, earlier))
                compared[earlier, later] = Measured(
                    seeds=np.subtract(mine, theirs),
                    replicates=paired_replicates(a, b, weights[len(seeds)]),
                    examples=float(np.var(np.round((a - b).mean(axis=0), 9), ddof=1)),
                )
        for pair in list(parts):
            if pair not in compared or len(compared[pair].seeds) < len(sweep.plan.seeds):
                del parts[pair]  # predictions are missing somewhere
            else:
                parts[pair].append(compared[pair])
        found.extend(family(task, compared, sweep.plan.margin))
    if len(sweep.plan.tasks) > 1:
        averaged = {pair: _average(measured) for pair, measured in parts.items()}
        found.extend(family(AVERAGE, averaged, sweep.plan.margin))
    return Contrasts(all=tuple(found), intervals=intervals, replicates=replicates, remarks=tuple(remarks))


def _average(measured: list[Measured]) -> Measured:
    """Of the same arms and seeds over the tasks."""
    return Measured(
        seeds=np.mean([part.seeds for part in measured], axis=0),
        replicates=np.round(np.mean([part.replicates for part in measured], axis=0), 9),
        examples=sum(part.examples for part in measured) / len(measured) ** 2,
    )


def family(task: str, compared: dict[tuple[str, str], Measured], margin: float) -> list[Contrast]:
    """The contrasts of all pairs of one task, or of the average; Holm's correction is over them."""
    pooled, dof = pooled_variance({pair: measured.seeds for pair, measured in compared.items()})
    estimates = {}
    for pair, measured in compared.items():
        value = float(measured.seeds.mean())
        own = float(np.var(measured.seeds, ddof=1)) if len(measured.seeds) > 1 else 0.0
        same = not measured.seeds.any() and not measured.replicates.any()  # in every prediction
        estimates[pair] = Difference(
            value=value,
            bootstrap=percentiles(measured.replicates),
            student=student(
                value, len(measured.seeds), 0.0 if same else max(own, pooled), measured.examples, dof
            )
            if len(measured.seeds) > 1
            else None,
        )
    corrected = holm([estimate.bounds.p for estimate in estimates.values()])
    return [
        Contrast(
            task=task,
            a=later,
            b=earlier,
            seeds=len(compared[earlier, later].seeds),
            estimate=estimate,
            holm_p=p,
            verdict=verdict(estimate, p, margin),
        )
        for ((earlier, later), estimate), p in zip(estimates.items(), corrected, strict=True)
    ]


def _turned(contrast: Contrast) -> Contrast:
    return Contrast(
        task=contrast.task,
        a=contrast.b,
        b=contrast.a,
        seeds=contrast.seeds,
        estimate=-contrast.estimate,
        holm_p=contrast.holm_p,
        verdict=contrast.verdict,
    )


def best_of(contrasts: Contrasts, task: str, means: dict[str, float]) -> list[str]:
    """The arm with the highest mean, and all that are not told apart from it: the 95 % interval of their
    difference from it holds 0, or there is none.
    """
    order = sorted(means, key=lambda arm: -means[arm])
    against = [contrasts.between(task, order[0], arm) for arm in order[1:]]
    return [
        *order[:1],
        *(
            arm
            for arm, c in zip(order[1:], against, strict=True)
            if c is None or not c.estimate.excludes_zero
        ),
    ]
