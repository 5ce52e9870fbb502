"""Heat-maps of final ranks, layer by adapted matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_fast.experiments.models.families import locate_matrix
from adalora_fast.experiments.settings.files import read_json

from .style import COLOURS, save, styled

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def rank_grid(ranks: Mapping[str, float]) -> tuple["np.ndarray", list[int], list[str]]:
    """Ranks as [layers, matrices], and what the rows and columns are; NaN where a matrix is not adapted."""
    import numpy as np

    located = {place: rank for name, rank in ranks.items() if (place := locate_matrix(name)) is not None}
    if not located:
        raise ValueError(f"none of {list(ranks)[:3]} is in a numbered layer; nothing to draw")
    layers = sorted({layer for layer, _ in located})
    matrices = list(dict.fromkeys(matrix for _, matrix in located))
    grid = np.array(
        [[located.get((layer, matrix), np.nan) for matrix in matrices] for layer in layers], dtype=float
    )
    return grid, layers, matrices


def on_common_grid(
    own: tuple["np.ndarray", list[int], list[str]], layers: list[int], matrices: list[str]
) -> "np.ndarray":
    """One run's grid with the rows and columns of all runs; NaN where this one adapts nothing."""
    import numpy as np

    values, rows, columns = own
    grid = np.full((len(layers), len(matrices)), np.nan)
    for i, layer in enumerate(rows):
        for j, matrix in enumerate(columns):
            grid[layers.index(layer), matrices.index(matrix)] = values[i, j]
    return grid


def plot_ranks(folders: list[Path], stem: Path, *, title: str) -> list[Path]:
    """One panel of final ranks per run folder, written to `stem`.png and `stem`.svg."""
    panels = []
    for folder in folders:
        result, saved = read_json(folder / "result.json"), read_json(folder / "ranks.json")
        panels.append(
            (f"{result['method']}: {result['primary_metric']} {result['primary']:.3f}", saved["ranks"])
        )
    with styled():
        return save(rank_figure(panels, init_r=saved["init_r"], title=title), stem)


def rank_figure(panels: Sequence[tuple[str, Mapping[str, float]]], *, init_r: int, title: str) -> "Figure":
    """Heat-maps with a common colour scale, each cell with its rank in it: with a decimal where the ranks
    of a panel are means.
    """
    import numpy as np
    from matplotlib.figure import Figure

    grids = [rank_grid(ranks) for _, ranks in panels]
    layers = sorted({layer for _, rows, _ in grids for layer in rows})
    matrices = list(dict.fromkeys(name for _, _, names in grids for name in names))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    size = (0.62 * len(matrices) * columns + 2.0, (0.34 * len(layers) + 1.15) * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for number, (axis, (label, _), own) in enumerate(zip(axes.flat, panels, grids, strict=False)):
        grid = on_common_grid(own, layers, matrices)
        image = axis.imshow(grid, vmin=0, vmax=init_r, cmap=COLOURS, aspect="auto")
        axis.set_title(label)
        digits = int((grid != np.round(grid))[~np.isnan(grid)].any())
        for row, column in np.argwhere(~np.isnan(grid)):
            value = grid[row, column]
            colour = "black" if value > init_r / 2 else "white"
            axis.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(matrices)), [name.replace(" ", "\n") for name in matrices], rotation=40)
        axis.set_yticks(range(len(layers)), layers)
        lowest, leftmost = number + columns >= len(panels), number % columns == 0
        axis.tick_params(length=0, labelbottom=lowest, labelleft=leftmost)
        axis.set_xlabel("adapted matrix" if lowest else "")
        axis.set_ylabel("layer" if leftmost else "")
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.colorbar(
        image, ax=axes, label=f"final rank (triplets kept of {init_r})", shrink=0.8, aspect=max(20, 14 * rows)
    )
    return figure
