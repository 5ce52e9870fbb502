"""Forest plots: differences of arms, their intervals and verdicts, the margin of equivalence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {  # colour and marker by how a verdict begins
    "differs, by less": (PALETTE[1], "D"),
    "differs": (PALETTE[1], "s"),
    "equivalent": (PALETTE[2], "^"),
    "not decided": (PALETTE[0], "o"),
    "exploratory": ("#888888", "x"),
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One difference in points, its 95 % and 90 % intervals, and the verdict on it."""

    value: float
    low: float
    high: float
    low90: float
    high90: float
    verdict: str

    @property
    def words(self) -> str:
        """In the legend: an exploratory interval shows by itself where it lies."""
        return "exploratory" if self.verdict.startswith("exploratory") else self.verdict

    @property
    def look(self) -> tuple[str, str]:
        """Colour and marker."""
        return next(look for words, look in LOOKS.items() if self.verdict.startswith(words))


def contrasts_figure(
    panels: Sequence[tuple[str, Sequence[tuple[str, Bar | None]]]], *, margin: float
) -> "Figure":
    """One panel per task: (heading, [(pair of arms, its difference)]) in points; None: nothing to compare.

    Colour and marker are the verdict's, which is corrected for the number of declared contrasts; the
    intervals are not, so one that excludes 0 may be of two arms that are "not decided", or of a pair that is
    exploratory. The thick part is the 90 % interval, by which arms count as equivalent.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    arms = [arm for arm, *_ in panels[0][1]]
    left = 0.065 * max(map(len, arms))
    size = (max(2.7 * columns + left + 0.3, 5.2), lines * (0.24 * len(arms) + 0.75) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for number, (axis, (heading, rows)) in enumerate(zip(axes.flat, panels, strict=False)):
        axis.axvspan(-margin, margin, color="#DDDDDD", linewidth=0)
        axis.axvline(0, color="black", linewidth=0.8)
        for place, (_, bar) in enumerate(rows):
            if bar is None:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.text(0, place, "incomplete", ha="center", va="center", fontsize=7, bbox=box)
                continue
            colour, marker = bar.look
            for low, high, width in ((bar.low, bar.high, 1.2), (bar.low90, bar.high90, 2.8)):
                axis.plot([low, high], [place, place], color=colour, linewidth=width, solid_capstyle="butt")
            axis.plot([bar.value], [place], marker=marker, color=colour, markersize=5)
        reach = [x for _, bar in rows if bar is not None for x in (bar.low, bar.high)]
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
    figure.supxlabel("difference, points (right: the first is better)", fontsize=9)
    looks = {bar.words: bar.look for _, rows in panels for _, bar in rows if bar is not None}
    figure.legend(
        handles=[
            *(
                Line2D([], [], color=colour, marker=marker, markersize=5, label=verdict)
                for verdict, (colour, marker) in sorted(looks.items())
            ),
            Line2D([], [], color="black", linewidth=1.2, label="95 % interval, not corrected (thick: 90 %)"),
            Patch(color="#DDDDDD", label=f"±{margin:g} points"),
        ],
        loc="outside upper center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return figure
