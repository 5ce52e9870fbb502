"""Figures of comparisons, drawn from what `analyses` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adalora_fast.experiments.plots.style import COLOURS, arm_styles, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_PATHS = 8  # more lines than these are not told apart
SMALLEST_RANGE = 0.01  # of a loss: rounding and a few rows should not look like hills


def cka_figures(result: dict[str, Any], folder: Path) -> list[Path]:
    """`folder`/cka.png and .svg from cka.json's content, and cka-layers.png and .svg where it has layers."""
    names = [run["name"] for run in result["runs"]]
    texts = result["rows"]["rows"]
    title = f"Linear CKA of layer {result['layer']} on {texts} texts of {result['task']}"
    with styled():
        files = save(
            matrix_figure(np.array(result["cka"]), names, title=title, label="CKA", limits=(0.0, 1.0)),
            folder / "cka",
        )
        if result.get("layers"):
            pairs = result["layers"]
            mean = np.mean([pair["cka"] for pair in pairs], axis=0)
            if len(pairs) == 1:
                first, second = names[pairs[0]["a"]], names[pairs[0]["b"]]
            else:
                mean = (mean + mean.T) / 2  # neither of a pair is the first
                first, second = "one run", f"another (mean of {len(pairs)} pairs)"
            title = f"Linear CKA, layer by layer, on {texts} texts of {result['task']}"
            files += save(layer_figure(mean, (first, second), title=title), folder / "cka-layers")
    return files


def connectivity_figures(result: dict[str, Any], folder: Path) -> list[Path]:
    """`folder`/convexity-gap and `folder`/paths, each as .png and .svg, from connectivity.json's content."""
    names = [run["name"] for run in result["runs"]]
    gaps = np.array(result["convexity_gap"])
    title = f"Convexity gap between runs on {result['rows']['rows']} rows of {result['task']}"
    with styled():
        limits = (0.0, max(gaps.max(), SMALLEST_RANGE))
        figure = matrix_figure(gaps, names, title=title, label="convexity gap of the loss", limits=limits)
        return [*save(figure, folder / "convexity-gap"), *save(path_figure(result), folder / "paths")]


def matrix_figure(
    values: np.ndarray, names: Sequence[str], *, title: str, label: str, limits: tuple[float, float]
) -> "Figure":
    """Heat-map [R, R] of runs with runs, with the numbers in the cells where they can be read."""
    from matplotlib.figure import Figure

    size = 0.5 * len(names) + 0.09 * max(map(len, names)) + 1.6
    figure = Figure(figsize=(max(size + 1.0, 5.2), max(size, 3.6)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axis = figure.subplots()
    _heat_map(figure, axis, values, limits, label)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    return figure


def layer_figure(values: np.ndarray, runs: tuple[str, str], *, title: str) -> "Figure":
    """Heat-map [layers + 1, layers + 1], the embeddings at the lower left."""
    from matplotlib.figure import Figure

    size = 0.42 * len(values) + 1.6
    figure = Figure(figsize=(max(size + 1.0, 5.2), max(size, 3.6)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axis = figure.subplots()
    _heat_map(figure, axis, values, (0.0, 1.0), "CKA")
    axis.set_xticks(range(len(values)))
    axis.set_yticks(range(len(values)))
    axis.invert_yaxis()
    axis.set_xlabel(f"layer of {runs[1]}")
    axis.set_ylabel(f"layer of {runs[0]}")
    return figure


def path_figure(result: dict[str, Any]) -> "Figure":
    """Loss and primary metric on every path, and in grey the ones that have no name where there are many."""
    from matplotlib.figure import Figure

    names = [run["name"] for run in result["runs"]]
    alphas, metric = result["alphas"], result["primary_metric"]
    ordered = sorted(result["paths"], key=lambda path: -path["convexity_gap"])
    named = {(path["a"], path["b"]): path for path in ordered[:NAMED_PATHS]}
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    rows = result["rows"]["rows"]
    figure.suptitle(f"α θ₁ + (1 − α) θ₂ on {rows} rows of {result['task']}", fontsize=10)
    panels = figure.subplots(1, 2)
    for path in ordered[NAMED_PATHS:]:
        for axis, values in zip(panels, (path["loss"], path["metrics"][metric]), strict=True):
            axis.plot(alphas, values, color="0.8", linewidth=0.8, zorder=1)
    styles = arm_styles([f"{names[a]} – {names[b]}" for a, b in named])
    for (label, style), path in zip(styles.items(), named.values(), strict=True):
        gap = f"{label}, gap {path['convexity_gap']:.2g}"
        panels[0].plot(alphas, path["loss"], label=gap, marker="o", markersize=3, **style)
        panels[1].plot(alphas, path["metrics"][metric], marker="o", markersize=3, **style)
    for axis, label in zip(panels, ("loss", metric), strict=True):
        axis.set_xlabel("α (0 is the second run, 1 the first)")
        axis.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=1 if len(named) < 3 else 2, fontsize=7, frameon=False)
    return figure


def _heat_map(
    figure: "Figure",
    axis: "Axes",
    values: np.ndarray,
    limits: tuple[float, float],
    label: str,
) -> None:
    digits = 2 if limits[1] >= 1 else 3 if limits[1] >= 0.1 else 4
    image = axis.imshow(values, vmin=limits[0], vmax=limits[1], cmap=COLOURS, aspect="equal")
    if len(values) <= 16:
        for row, column in np.ndindex(*values.shape):
            dark = values[row, column] < (limits[0] + limits[1]) / 2
            axis.text(
                column,
                row,
                f"{values[row, column]:.{digits}f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize=6.5,
            )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=label, shrink=0.85)
