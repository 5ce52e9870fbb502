"""Which pictures a sweep's report has, and the numbers behind them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adalora_fast.experiments.sweep.plan_contrasts import added_contrasts, default_contrasts

from .collect import NULLS, Sweep
from .contrasts import AVERAGE, Contrast, Contrasts
from .logs import ArmCurves, Curve, arm_curves
from .masks import churn_curve
from .plots.agreement import agreement_figure
from .plots.contrasts import Bar, contrasts_figure
from .plots.curves import curves_figure
from .plots.masks import churn_figure
from .plots.ranks import rank_figure
from .plots.style import arm_styles, save, styled
from .rank_maps import adapted_matrices, agreement, rank_maps, varies
from .tables import task_heading, task_name

Figures = dict[str, Sequence[tuple[str, str]]]


def draw_figures(sweep: Sweep, contrasts: Contrasts, folder: Path) -> tuple[Figures, list[str]]:
    """Write every picture that there are numbers for into `folder`, as PNG and SVG.

    Returns:
        ((file name, what it shows) by section; a line for every picture that could not be drawn).
    """
    figures: dict[str, list[tuple[str, str]]] = {
        name: [] for name in ("contrasts", "curves", "churn", "ranks", "agreement")
    }
    remarks: list[str] = []

    def keep(section: str, name: str, figure: object, words: str) -> None:
        save(figure, folder / name)
        figures[section].append((f"{name}.png", words))

    with styled():
        panels = forest_panels(sweep, contrasts)
        if panels:
            shown = [bar for _, rows in panels for _, bar in rows if bar is not None]
            words = "Declared contrasts"
            if any(bar.words == "exploratory" for bar in shown):
                words += ", and the exploratory ones against the baseline,"
            words += (
                " in points with 95 % intervals (thick: 90 %), not corrected for their number; colours and "
                "markers are the verdicts, which are"
            )
            if any(contrast.seeds == 1 for contrast in contrasts.all):
                words += "; with one seed in common, the examples' chance alone"
            figure = contrasts_figure(panels, margin=sweep.plan.margin)
            keep("contrasts", "contrasts", figure, words)
        for task in sweep.plan.tasks:
            curves = {
                a: arm_curves(list(sweep.of(task, a).values())) for a in sweep.plan.arms if sweep.of(task, a)
            }
            if any(curve.budget is not None or curve.metric is not None for curve in curves.values()):
                figure = curves_figure(
                    {
                        arm: own if arm.partition("-")[0] not in NULLS else without_scores(own)
                        for arm, own in curves.items()
                    },
                    styles=arm_styles(sweep.plan.arms),
                    heading=task_heading(sweep, task),
                )
                keep(
                    "curves",
                    f"curves-{task}",
                    figure,
                    f"{task_name(task)}: budget, metric and scores by step",
                )
            try:
                maps = mean_ranks(sweep, task)
                if maps:
                    # of the runs whose ranks vary: plain LoRA may have another rank
                    init_r = max(r.init_r for r in sweep.task_runs(task) if len(set(r.ranks.values())) > 1)
                    title = f"{task_name(task)}: where each arm keeps rank (mean over seeds)"
                    figure = rank_figure(maps, init_r=init_r, title=title)
                    keep("ranks", f"ranks-{task}", figure, title)
            except ValueError as error:
                if "nothing to draw" not in str(error):
                    raise
                remarks.append(f"{task_name(task)}: no picture of the ranks ({error})")
        churn = churn_panels(sweep)
        if churn:
            words = "Churn by step: the part of the kept triplets that the mask before had pruned"
            keep("churn", "churn", churn_figure(churn, styles=arm_styles(sweep.plan.arms)), words)
        tables = {task_name(task): agreement(sweep, task) for task in sweep.plan.tasks}
        tables = {name: (arms, table) for name, (arms, table) in tables.items() if len(arms) > 1}
        if tables:
            words = "Spearman's correlation between the arms' mean rank maps"
            keep("agreement", "agreement", agreement_figure(tables), words)
    return figures, remarks


def churn_panels(sweep: Sweep) -> dict[str, dict[str, Curve]]:
    """Heading of a task → arm → churn by step, of the arms that have logged their masks."""
    panels = {}
    for task in sweep.plan.tasks:
        curves = {arm: churn_curve(list(sweep.of(task, arm).values())) for arm in sweep.plan.arms}
        curves = {arm: curve for arm, curve in curves.items() if curve is not None}
        if curves:
            panels[task_heading(sweep, task)] = curves
    return panels


def without_scores(curves: ArmCurves) -> ArmCurves:
    """Of a null arm, whose "importance" is settled beforehand and says nothing."""
    return dataclasses.replace(curves, scores={})


def mean_ranks(sweep: Sweep, task: str) -> list[tuple[str, dict[str, float]]]:
    """(arm with its number of seeds, mean rank of every matrix) of the arms whose ranks vary."""
    found = []
    for arm in sweep.plan.arms:
        maps = rank_maps(sweep, task, arm)
        if varies(maps):
            names = adapted_matrices(sweep, task, arm)
            seeds = f"{len(maps)} seed{'s' if len(maps) > 1 else ''}"
            found.append((f"{arm} ({seeds})", dict(zip(names, np.mean(maps, axis=0).tolist(), strict=True))))
    return found


def forest_panels(sweep: Sweep, contrasts: Contrasts) -> list[tuple[str, list[tuple[str, Bar | None]]]]:
    """(task, [(pair of arms, its difference)]): the declared pairs, then every other arm against the
    baseline; None for a pair that cannot be compared.
    """
    plan, panels = sweep.plan, []
    pairs = [*plan.declared, *added_contrasts(plan.declared, default_contrasts(plan.arms, plan.baseline))]
    for task in (*plan.tasks, AVERAGE):
        rows = [(f"{a} − {b}", _bar(contrasts.between(task, a, b))) for a, b in pairs]
        if any(bar is not None for _, bar in rows):
            heading = "average over tasks" if task == AVERAGE else task_heading(sweep, task)
            panels.append((heading, rows))
    return panels


def _bar(contrast: Contrast | None) -> Bar | None:
    if contrast is None:
        return None
    bounds = contrast.estimate.bounds
    return Bar(
        value=contrast.estimate.value,
        low=bounds.low,
        high=bounds.high,
        low90=bounds.low90,
        high90=bounds.high90,
        verdict=contrast.verdict,
    )
