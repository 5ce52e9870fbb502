"""Matrices of rank correlations between arms."""

from typing import TYPE_CHECKING

from .style import BOTH_WAYS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def agreement_figure(tables: dict[str, tuple[list[str], "np.ndarray"]]) -> "Figure":
    """One panel per task, (arms, Spearman [arms, arms]), each cell with its number; grey where undefined."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    most = max(len(arms) for arms, _ in tables.values())
    longest = max(len(arm) for arms, _ in tables.values() for arm in arms)
    panel = 0.4 * most + 0.4
    columns = min(len(tables), max(1, int(11 / (panel + 0.075 * longest))))
    lines = -(-len(tables) // columns)
    # A short figure needs room for its title beside the panels.
    size = (
        max(columns * (panel + 0.075 * longest) + 1.5, 4.6),
        lines * (panel + 0.05 * longest) + 0.5,
    )
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle("Do the arms put rank in the same places?")
    axes = figure.subplots(lines, columns, squeeze=False)
    colours = colormaps[BOTH_WAYS].with_extremes(bad="#DDDDDD")
    for axis, (task, (arms, table)) in zip(axes.flat, tables.items(), strict=False):
        image = axis.imshow(np.ma.masked_invalid(table), vmin=-1, vmax=1, cmap=colours)
        for row, column in np.ndindex(table.shape):
            value = table[row, column]
            text = "–" if np.isnan(value) else f"{value:.2f}".replace("-", "−")
            colour = "white" if abs(value) > 0.65 else "black"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
        axis.set_title(task)
        axis.set_xticks(range(len(arms)), arms, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(arms)), arms)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    figure.colorbar(
        image,
        ax=axes,
        label="Spearman's correlation of mean final ranks" if size[1] > 3 else "Spearman's ρ of mean ranks",
        shrink=0.8,
        aspect=max(20, 16 * lines),
    )
    return figure
