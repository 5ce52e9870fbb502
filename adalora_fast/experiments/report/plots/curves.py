"""Training by step: the budget, the development metric, and the importance scores of all triplets."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
BAND = "#56B4E9"


class Band(Protocol):
    """A quantity by step, with its lowest and highest over seeds; all [steps]."""

    steps: "np.ndarray"
    mean: "np.ndarray"
    low: "np.ndarray"
    high: "np.ndarray"


class Curves(Protocol):
    """What one arm logged; None and {} where it logged nothing."""

    budget: Band | None
    metric: Band | None
    scores: Mapping[str, Band]


def curves_figure(
    curves: Mapping[str, Curves], *, styles: Mapping[str, dict[str, Any]], heading: str
) -> "Figure":
    """Budget and metric side by side, all arms in each; below, one panel of scores for every arm that has
    them: their units differ.
    """
    from matplotlib.figure import Figure

    scored = {arm: own.scores for arm, own in curves.items() if own.scores}
    lines = -(-len(scored) // COLUMNS)
    figure = Figure(figsize=(9.6, 3.5 + 1.9 * lines), layout="constrained")
    upper, lower = figure, None
    if scored:
        upper, lower = figure.subfigures(2, 1, height_ratios=(3.3, 1.9 * lines), squeeze=True)
    figure.suptitle(heading)
    budget, metric = upper.subplots(1, 2)
    for same in _same_budget(curves):
        words = same[0] if len(same) == 1 else f"{len(same)} arms alike"
        _draw(
            budget, curves[same[0]].budget, words, styles[same[0]] if len(same) == 1 else {"color": "black"}
        )
    for arm, own in curves.items():
        _draw(metric, own.metric, arm, styles[arm])
    budget.set_ylabel("budget, triplets")
    metric.set_ylabel("development metric, points")
    if budget.lines:
        budget.set_ylim(bottom=0)
        budget.legend(fontsize=8, frameon=False, loc="lower left")
    else:
        budget.text(
            0.5, 0.5, "no budget was logged", ha="center", transform=budget.transAxes, color="#555555"
        )
    if metric.lines:
        # Beside the axes: with a dozen arms there is no free corner among the lines.
        metric.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (budget, metric):
        axis.set_xlabel("optimizer step")
    if lower is not None:
        _scores(lower, scored, lines)
    return figure


def _same_budget(curves: Mapping[str, Curves]) -> list[list[str]]:
    """The arms with a budget, those with the same one together: their lines would hide each other."""
    import numpy as np

    groups: list[list[str]] = []
    for arm, own in curves.items():
        if own.budget is None:
            continue
        for group in groups:
            there = curves[group[0]].budget
            if np.array_equal(there.steps, own.budget.steps) and np.array_equal(there.mean, own.budget.mean):
                group.append(arm)
                break
        else:
            groups.append([arm])
    return groups


def _draw(axis: "Axes", band: Band | None, label: str, style: dict[str, Any]) -> None:
    if band is None:
        return
    marker = "o" if len(band.steps) < 15 else None
    axis.plot(band.steps, band.mean, label=label, marker=marker, markersize=3, linewidth=1.4, **style)
    if (band.low < band.high).any():
        axis.fill_between(band.steps, band.low, band.high, color=style["color"], alpha=0.08, linewidth=0)


def _scores(figure: Any, scored: Mapping[str, Mapping[str, Band]], lines: int) -> None:
    """p10 to p90, the median, and the lowest score that is kept, on a logarithmic axis where all are > 0."""
    import numpy as np

    columns = min(COLUMNS, len(scored))
    axes = figure.subplots(lines, columns, squeeze=False)
    for number, (axis, (arm, bands)) in enumerate(zip(axes.flat, scored.items(), strict=False)):
        low, middle, high, kept = (bands[name] for name in ("p10", "p50", "p90", "lowest_kept"))
        axis.fill_between(
            low.steps, low.mean, high.mean, color=BAND, alpha=0.45, linewidth=0, label="p10 to p90"
        )
        axis.plot(middle.steps, middle.mean, color="#0072B2", linewidth=1.3, label="median")
        axis.plot(kept.steps, kept.mean, color="#D55E00", linewidth=1.3, linestyle="--", label="lowest kept")
        values = np.concatenate([band.mean for band in (low, middle, high, kept)])
        if (values > 0).all():
            axis.set_yscale("log")
        elif np.abs(values).max() > 0:
            # Of the ticks on both sides of zero only the outermost: their labels would lie on one another.
            power = 10.0 ** np.floor(np.log10(np.abs(values).max()))
            axis.set_yscale("symlog", linthresh=power / 10)
            axis.set_yticks([-power, 0.0, power])
        axis.minorticks_off()
        axis.set_title(arm, fontsize=8.5)
        axis.tick_params(labelsize=7)
        if number % columns == 0:
            axis.set_ylabel("importance S\n(own unit)", fontsize=8)
        if number + columns >= len(scored):
            axis.set_xlabel("optimizer step", fontsize=8)
    for axis in axes.flat[len(scored) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
