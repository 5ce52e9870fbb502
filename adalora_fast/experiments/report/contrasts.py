"""Every pair of arms compared, per task and for the average over tasks, and the interval of every arm."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .collect import Sweep
from .estimates import Estimate, estimate, exploratory, holm, verdict
from .examples import joined, task_examples

AVERAGE = "average"  # stands for a task where the average over all tasks is meant
Values = dict[tuple[str, int], np.ndarray]  # what every example contributes, by arm and seed


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Arm a minus arm b in points over `seeds` paired seeds. `holm_p` is corrected for the declared contrasts
    of the same task (or of the average); None of one that the plan does not declare, which is exploratory.
    """

    task: str
    a: str
    b: str
    seeds: int
    estimate: Estimate
    holm_p: float | None
    verdict: str

    @property
    def is_declared(self) -> bool:
        return self.holm_p is not None


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """All contrasts of a sweep, the 95 % interval (low, high) in points of every arm's own mean by (task,
    arm), and what had to be left out.
    """

    all: tuple[Contrast, ...]
    intervals: dict[tuple[str, str], tuple[float, float]]
    remarks: tuple[str, ...]

    def between(self, task: str, a: str, b: str) -> Contrast | None:
        """a minus b, whichever way it was computed; None where the two have no seed in common."""
        for contrast in self.all:
            if contrast.task == task and {contrast.a, contrast.b} == {a, b}:
                return contrast if contrast.a == a else _turned(contrast)
        return None

    def of(self, task: str) -> list[Contrast]:
        return [contrast for contrast in self.all if contrast.task == task]

    def declared(self, task: str) -> list[Contrast]:
        return [contrast for contrast in self.of(task) if contrast.is_declared]


def compare_all(sweep: Sweep) -> Contrasts:
    """Contrast every two arms of a sweep (see `statistics` for the method).

    Only seeds that both arms have enter. An arm's own interval is by the same method, of all its runs, where
    all of them have predictions. The average over tasks takes the arms that are complete everywhere: seed k
    is each seed's average over the tasks, which supposes nothing of what runs of one seed on two tasks have
    in common, and the examples are those of all tasks.
    """
    found: list[Contrast] = []
    intervals: dict[tuple[str, str], tuple[float, float]] = {}
    remarks: list[str] = []
    by_task: list[Values] = []
    for task in sweep.plan.tasks:
        measured = task_examples(sweep, task)
        remarks.extend(measured.remarks)
        by_task.append(measured.values)
        for arm in sweep.plan.ordered_arms:
            own = [measured.values.get((arm, seed)) for seed in sweep.of(task, arm)]
            if own and all(values is not None for values in own):
                bounds = estimate(np.stack(own)).bounds
                intervals[task, arm] = (bounds.low, bounds.high)
        found.extend(compare(task, measured.values, sweep))
    if len(sweep.plan.tasks) > 1:
        found.extend(compare(AVERAGE, _average(by_task, sweep), sweep))
    return Contrasts(all=tuple(found), intervals=intervals, remarks=tuple(remarks))


def _average(by_task: list[Values], sweep: Sweep) -> Values:
    """Of the arms whose every task and seed is complete and has predictions."""
    averaged: Values = {}
    for arm in sweep.whole_arms():
        keys = [(arm, seed) for seed in sweep.plan.seeds]
        if all(key in values for key in keys for values in by_task):
            averaged |= {key: joined([values[key] for values in by_task]) for key in keys}
    return averaged


def compare(task: str, values: Values, sweep: Sweep) -> list[Contrast]:
    """The contrasts of one task, or of the average: those that the plan declares, as it declares them, over
    which Holm's correction is, and all other pairs.
    """
    plan = sweep.plan
    declared = {frozenset(pair): pair for pair in plan.declared}
    estimates: dict[tuple[str, str], Estimate] = {}
    for earlier, later in combinations(plan.ordered_arms, 2):
        a, b = declared.get(frozenset((earlier, later)), (later, earlier))
        seeds = [seed for seed in plan.seeds if {(a, seed), (b, seed)} <= values.keys()]
        if seeds:
            estimates[a, b] = estimate(np.stack([values[a, s] - values[b, s] for s in seeds]))
    family = [pair for pair in plan.declared if pair in estimates]
    others = [pair for pair in estimates if pair not in family]
    corrected = dict(zip(family, holm([estimates[pair].bounds.p for pair in family]), strict=True))
    return [
        Contrast(
            task=task,
            a=pair[0],
            b=pair[1],
            seeds=own.spread.seeds,
            estimate=own,
            holm_p=corrected.get(pair),
            verdict=verdict(own, corrected[pair], plan.margin) if pair in corrected else exploratory(own),
        )
        for pair in (*family, *others)
        for own in [estimates[pair]]
    ]


def _turned(contrast: Contrast) -> Contrast:
    turned = -contrast.estimate
    return Contrast(
        task=contrast.task,
        a=contrast.b,
        b=contrast.a,
        seeds=contrast.seeds,
        estimate=turned,
        holm_p=contrast.holm_p,
        verdict=contrast.verdict if contrast.is_declared else exploratory(turned),
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
