"""Forest plots: differences from the baseline with their intervals and the margin of equivalence."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .style import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEYOND, BETWEEN = PALETTE[1], PALETTE[0]  # whether the interval excludes 0


def contrasts_figure(
    panels: Sequence[tuple[str, Sequence[tuple[str, float, float, float]]]], *, baseline: str, margin: float
) -> "Figure":
    """One panel per task: (heading, [(arm, difference, low, high)]) in points; NaN: nothing to compare.

    An interval that excludes 0 is drawn in another colour with a square, the others with a circle.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    arms = [arm for arm, *_ in panels[0][1]]
    left = 0.07 * max(map(len, arms))
    size = (max(2.7 * columns + left + 0.3, 5.2), lines * (0.24 * len(arms) + 0.75) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for number, (axis, (heading, rows)) in enumerate(zip(axes.flat, panels, strict=False)):
        axis.axvspan(-margin, margin, color="#DDDDDD", linewidth=0)
        axis.axvline(0, color="black", linewidth=0.8)
        for place, (_, value, low, high) in enumerate(rows):
            if math.isnan(value):
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.text(0, place, "incomplete", ha="center", va="center", fontsize=7, bbox=box)
                continue
            beyond = low > 0 or high < 0
            colour, marker = (BEYOND, "s") if beyond else (BETWEEN, "o")
            axis.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
            axis.plot([value], [place], marker=marker, color=colour, markersize=4.5)
        reach = [x for _, *numbers in rows for x in numbers if not math.isnan(x)]
        least, most = min(-margin, *reach), max(margin, *reach)
        room = 0.06 * (most - least)
        axis.set_xlim(least - room, most + room)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(heading)
        axis.set_yticks(range(len(rows)), arms if number % columns == 0 else [""] * len(rows))
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#EEEEEE", linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"difference from {baseline}, points (right: better)", fontsize=9)
    figure.legend(
        handles=[
            Line2D([], [], color=BETWEEN, marker="o", markersize=4.5, label="95 % interval holds 0"),
            Line2D([], [], color=BEYOND, marker="s", markersize=4.5, label="excludes 0"),
            Patch(color="#DDDDDD", label=f"±{margin:g} points"),
        ],
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure
