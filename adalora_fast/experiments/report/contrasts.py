"""Every pair of arms compared, per task and for the average over tasks."""

import zlib
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .replicates import task_replicates
from .statistics import (
    Difference,
    difference,
    holm,
    paired_replicates,
    replicates_for,
    seed_weights,
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

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval, which is not corrected for the number of pairs, excludes 0."""
        return self.estimate.low > 0 or self.estimate.high < 0


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """All contrasts of a sweep, the number of replicates, and what had to be left out."""

    all: tuple[Contrast, ...]
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
    """Contrast every two arms of a sweep (see `statistics` for the bootstrap).

    Only seeds that both arms have enter. `replicates` of None takes as many as Holm's correction needs.
    The average over tasks takes the arms that are complete everywhere; seeds and examples are drawn anew
    for every task, because the tasks share neither.
    """
    arms = sweep.plan.ordered_arms
    if replicates is None:
        replicates = replicates_for(len(arms) * (len(arms) - 1) // 2)
    found: list[Contrast] = []
    remarks: list[str] = []
    whole = set(sweep.whole_arms())
    sums = {pair: np.zeros(replicates) for pair in combinations(arms, 2) if whole.issuperset(pair)}
    values = dict.fromkeys(sums, 0.0)
    for task in sweep.plan.tasks:
        measured = task_replicates(sweep, task, replicates, seed)
        remarks.extend(measured.remarks)
        compared = {}
        for earlier, later in combinations(arms, 2):
            seeds = [s for s in sweep.plan.seeds if {(earlier, s), (later, s)} <= measured.values.keys()]
            if seeds:
                generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(task.encode())]))
                a, b = (np.stack([measured.values[arm, s] for s in seeds]) for arm in (later, earlier))
                drawn = paired_replicates(a, b, seed_weights(len(seeds), replicates, generator))
                mine, theirs = ([sweep.runs[task, arm, s].points for s in seeds] for arm in (later, earlier))
                value = float(np.mean(mine) - np.mean(theirs))
                compared[earlier, later] = (value, drawn, len(seeds))
        for pair in list(sums):
            if pair not in compared or compared[pair][2] < len(sweep.plan.seeds):
                del sums[pair], values[pair]  # predictions are missing somewhere
                continue
            sums[pair] += compared[pair][1] / len(sweep.plan.tasks)
            values[pair] += compared[pair][0] / len(sweep.plan.tasks)
        found.extend(_family(task, compared, sweep.plan.margin))
    if len(sweep.plan.tasks) > 1:
        average = {pair: (values[pair], np.round(sums[pair], 9), len(sweep.plan.seeds)) for pair in sums}
        found.extend(_family(AVERAGE, average, sweep.plan.margin))
    return Contrasts(all=tuple(found), replicates=replicates, remarks=tuple(remarks))


def _family(
    task: str, compared: dict[tuple[str, str], tuple[float, np.ndarray, int]], margin: float
) -> list[Contrast]:
    estimates = {pair: difference(value, drawn) for pair, (value, drawn, _) in compared.items()}
    corrected = holm([estimate.p for estimate in estimates.values()])
    return [
        Contrast(
            task=task,
            a=later,
            b=earlier,
            seeds=compared[earlier, later][2],
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
    """The arm with the highest mean alone, where the 95 % interval of its lead over the second excludes 0;
    else with all that tie with it: the interval of their difference from it holds 0, or there is none.
    """
    order = sorted(means, key=lambda arm: -means[arm])
    against = [contrasts.between(task, order[0], arm) for arm in order[1:]]
    if against and against[0] is not None and against[0].excludes_zero:
        return order[:1]
    tied = [arm for arm, c in zip(order[1:], against, strict=True) if c is None or not c.excludes_zero]
    return [*order[:1], *tied]
