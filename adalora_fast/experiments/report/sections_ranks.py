"""The report's tables of final rank maps: stability over seeds, agreement between arms."""

import numpy as np

from .collect import Sweep
from .rank_maps import across_tasks, agreement, rank_maps, stability, varies
from .tables import markdown, task_name


def rank_stability(sweep: Sweep) -> str:
    """Per task and arm whose ranks vary: mean pairwise Spearman and overlap between seeds."""
    rows, single = [], False
    for task in sweep.plan.tasks:
        for arm in sweep.plan.arms:
            maps = rank_maps(sweep, task, arm)
            if not varies(maps):
                continue
            found = stability(maps)
            if found is None:
                single = True
                continue
            correlation = "–" if found.spearman is None else f"{found.spearman:.2f}"
            rows.append(
                (
                    task_name(task),
                    arm,
                    found.seeds,
                    correlation,
                    f"{found.overlap:.3f}",
                    f"{found.chance:.3f}",
                )
            )
    if not rows:
        return "No arm has rank maps of two seeds that could be compared."
    head = ("task", "arm", "seeds", "Spearman", "overlap", "overlap by chance")
    text = (
        "Means over all pairs of seeds of one arm. *Spearman*: correlation of the final ranks over the "
        "adapted matrices. *Overlap*: the part of the rank that both maps put in the same matrices "
        "(Σ min ÷ mean Σ); "
        "*by chance*: what is expected of it where one map's ranks are shuffled over the matrices."
    )
    if single:
        text += " Arms with one complete seed are left out."
    return f"{markdown(head, rows, left=2)}\n\n{text}"


def rank_agreement(sweep: Sweep) -> str:
    """Per task: Spearman's correlation between the arms' mean rank maps."""
    parts, tables = [], []
    for task in sweep.plan.tasks:
        arms, table = agreement(sweep, task)
        if len(arms) > 1:
            tables.append(table)
            rows = [
                (a, *(_correlation(value) for value in line)) for a, line in zip(arms, table, strict=True)
            ]
            parts.append(f"{task_name(task)}:\n\n{markdown(('', *arms), rows)}")
    if not parts:
        return "Fewer than two arms have ranks that vary."
    head = (
        "Spearman's correlation between the arms' final ranks, averaged over the same seeds before they are "
        "compared. It is not on the scale of the table above, which compares single seeds with one another."
    )
    if any(np.isnan(table).any() for table in tables):
        head += " –: the arms adapt different matrices, or the mean ranks of one are all equal."
    return "\n\n".join([head, *parts])


def rank_across_tasks(sweep: Sweep) -> str:
    """Per arm: how far its mean rank maps of different tasks agree; "" where there is one task."""
    if len(sweep.plan.tasks) < 2:
        return ""
    rows = []
    for arm in sweep.plan.arms:
        tasks, correlation = across_tasks(sweep, arm)
        if correlation is not None:
            rows.append((arm, tasks, f"{correlation:.2f}"))
    if not rows:
        return "No arm has rank maps of two tasks that could be compared."
    text = (
        "Spearman's correlation of the final ranks, averaged over seeds, of two tasks: the mean over all "
        "pairs of tasks. Ranks that agree across tasks show the model rather than the task."
    )
    return f"{markdown(('arm', 'tasks', 'Spearman'), rows)}\n\n{text}"


def _correlation(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
