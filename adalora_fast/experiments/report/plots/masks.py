"""Churn: which part of the kept triplets every mask brought back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .curves import Band

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def churn_figure(
    tasks: Mapping[str, Mapping[str, Band]], *, styles: Mapping[str, dict[str, Any]]
) -> "Figure":
    """One panel a task, one line an arm: churn in per cent by optimizer step.

    Args:
        tasks: heading → arm → churn.
        styles: of the arms.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 4.4 * len(tasks), 3.8), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axis, (heading, arms) in zip(axes, tasks.items(), strict=True):
        for arm, band in arms.items():
            (line,) = axis.plot(band.steps, band.mean, linewidth=1.4, label=arm, **styles[arm])
            handles.setdefault(arm, line)
            if (band.low < band.high).any():
                color = styles[arm]["color"]
                axis.fill_between(band.steps, band.low, band.high, color=color, alpha=0.08, linewidth=0)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("returned triplets, % of the kept")
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, loc="outside right center")
    return figure
