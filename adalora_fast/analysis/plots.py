"""Figures of comparisons, drawn from what `analyses` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adalora_fast.experiments.report.plots.style import COLOURS, PALETTE, arm_styles, save, styled
from adalora_fast.experiments.report.tables import metric_name, task_name

from .connectivity import chord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_RUNS = 16  # of more, a heat-map names the groups, and has no numbers
NAMED_PATHS = 8  # more lines than these are not told apart
SMALLEST_RANGE = 0.01  # of a loss: rounding and a few rows should not look like hills
NOT_COMPUTED = "0.88"
PRECISIONS = {"fp32": "float32", "bf16": "bf16"}


def cka_figures(result: dict[str, Any], folder: Path) -> list[Path]:
    """`folder`/cka.png and .svg from cka.json's content, and cka-layers.png and .svg where it has layers."""
    names = [run["name"] for run in result["runs"]]
    where = f"on {result['rows']['rows']} texts of {_task(result)}"
    values = np.array(result["cka"])
    limits = (min(np.floor(10 * values.min()) / 10, 0.9), 1.0)
    with styled():
        title = f"Linear CKA of layer {result['layer']} {where}"
        figure = comparison_figure(result, values, title=title, label="CKA", limits=limits)
        files = save(figure, folder / "cka")
        if result.get("layers"):
            pairs = result["layers"]
            mean = np.mean([pair["cka"] for pair in pairs], axis=0)
            if len(pairs) == 1:
                first, second = names[pairs[0]["a"]], names[pairs[0]["b"]]
            else:
                mean = (mean + mean.T) / 2  # neither of a pair is the first
                first, second = "one run", f"another (mean of {len(pairs)} pairs)"
            title = f"Linear CKA, layer by layer, {where}"
            files += save(layer_figure(mean, (first, second), title=title), folder / "cka-layers")
    return files


def connectivity_figures(result: dict[str, Any], folder: Path) -> list[Path]:
    """`folder`/convexity-gap and `folder`/paths, each as .png and .svg, from connectivity.json's content."""
    gaps = np.array(result["convexity_gap"], dtype=float)
    title = f"Convexity gap between runs on {result['rows']['rows']} rows of {_task(result)}"
    with styled():
        limits = (0.0, max(np.nanmax(gaps), SMALLEST_RANGE))
        label = "convexity gap of the loss"
        figure = comparison_figure(result, gaps, title=title, label=label, limits=limits)
        paths = path_figure(result) if len(result["paths"]) <= NAMED_PATHS else paths_figure(result)
        return [*save(figure, folder / "convexity-gap"), *save(paths, folder / "paths")]


def comparison_figure(
    result: dict[str, Any], values: np.ndarray, *, title: str, label: str, limits: tuple[float, float]
) -> "Figure":
    """Heat-map [R, R] of runs with runs, and beside it one of the means by group where a group has several.

    NaN is grey: not computed.
    """
    from matplotlib.figure import Figure

    names, groups = [run["name"] for run in result["runs"]], [run["group"] for run in result["runs"]]
    several = len(result["groups"]) < len(names)
    panels = 2 if several else 1
    shown = names if len(names) <= NAMED_RUNS else result["groups"]
    side = 0.42 * max(min(len(names), NAMED_RUNS), 6) + 0.07 * max(map(len, shown))
    figure = Figure(figsize=(max(panels * side + 1.2, 5.2), side + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = np.atleast_1d(figure.subplots(1, panels))
    image = _heat_map(axes[0], values, limits)
    if len(names) <= NAMED_RUNS:
        _name(axes[0], range(len(names)), names)
    else:
        starts = [groups.index(group) for group in result["groups"]]
        sizes = [groups.count(group) for group in result["groups"]]
        middles = [start + (size - 1) / 2 for start, size in zip(starts, sizes, strict=True)]
        _name(axes[0], middles, result["groups"])
        for start in starts[1:]:
            axes[0].axhline(start - 0.5, color="white", linewidth=1.2)
            axes[0].axvline(start - 0.5, color="white", linewidth=1.2)
    axes[0].set_title("every run with every other" + (", by seed" if len(names) > NAMED_RUNS else ""))
    if several:
        means = np.array(result["group_means"], dtype=float)
        _heat_map(axes[1], means, limits)
        _name(axes[1], range(len(means)), result["groups"])
        axes[1].set_title("groups: means over pairs")
    if np.isnan(values).any():
        label += " (grey: not computed)"
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.85)
    return figure


def layer_figure(values: np.ndarray, runs: tuple[str, str], *, title: str) -> "Figure":
    """Heat-map [layers + 1, layers + 1], the embeddings at the lower left."""
    from matplotlib.figure import Figure

    size = 0.42 * len(values) + 1.6
    figure = Figure(figsize=(max(size + 1.0, 5.2), max(size, 3.6)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axis = figure.subplots()
    figure.colorbar(_heat_map(axis, values, (0.0, 1.0)), ax=axis, label="CKA", shrink=0.85)
    axis.set_xticks(range(len(values)))
    axis.set_yticks(range(len(values)))
    axis.invert_yaxis()
    axis.set_xlabel(f"layer of {runs[1]}")
    axis.set_ylabel(f"layer of {runs[0]}")
    return figure


def path_figure(result: dict[str, Any]) -> "Figure":
    """Loss and primary metric on every path, for few of them."""
    names = [run["name"] for run in result["runs"]]
    metric = result["primary_metric"]
    ordered = sorted(result["paths"], key=lambda path: -path["convexity_gap"])
    figure, panels = _path_panels(
        result, "α (0 is the second run, 1 the first)", ("loss", metric_name(metric))
    )
    styles = arm_styles([f"{names[path['a']]} – {names[path['b']]}" for path in ordered])
    for (label, style), path in zip(styles.items(), ordered, strict=True):
        gap = f"{label}, gap {path['convexity_gap']:.2g}"
        panels[0].plot(result["alphas"], path["loss"], label=gap, marker="o", markersize=3, **style)
        panels[1].plot(result["alphas"], path["metrics"][metric], marker="o", markersize=3, **style)
    figure.legend(loc="outside lower center", ncols=1 if len(ordered) < 3 else 2, fontsize=7, frameon=False)
    return figure


def paths_figure(result: dict[str, Any]) -> "Figure":
    """Loss and primary metric above the chord of their path, for many of them: the median, the middle 80 %
    and the extremes of those within a group and of those between groups.
    """
    runs, metric = result["runs"], result["primary_metric"]
    alphas = np.array(result["alphas"])
    labels = ("loss above the chord", f"{metric_name(metric)} above the chord")
    figure, panels = _path_panels(result, "α", labels)
    within = [runs[path["a"]]["group"] == runs[path["b"]]["group"] for path in result["paths"]]
    for axis, values in zip(panels, ("loss", metric), strict=True):
        lines = np.array([_of_path(path, values) for path in result["paths"]])
        axis.axhline(0.0, color="0.3", linewidth=0.8)
        for same, name, colour in (
            (False, "runs of two groups", PALETTE[1]),
            (True, "runs of one group, other seed", PALETTE[0]),
        ):
            chosen = lines[np.array(within) == same]
            if not len(chosen):
                continue
            low, middle, high = np.quantile(chosen, (0.1, 0.5, 0.9), axis=0)
            axis.fill_between(alphas, low, high, color=colour, alpha=0.25, linewidth=0)
            for extreme in (chosen.min(axis=0), chosen.max(axis=0)):
                axis.plot(alphas, extreme, color=colour, linewidth=0.8, linestyle=":")
            count = f"{name} ({len(chosen)} paths)" if axis is panels[0] else None
            axis.plot(alphas, middle, color=colour, linewidth=1.8, label=count)
    figure.legend(
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        frameon=False,
        title="median, middle 80 % and (dotted) extremes",
        title_fontsize=8,
    )
    return figure


def _of_path(path: dict[str, Any], what: str) -> np.ndarray:
    values = np.array(path["loss"] if what == "loss" else path["metrics"][what])
    return values - chord(values)


def _path_panels(result: dict[str, Any], xlabel: str, labels: Sequence[str]) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    figure.suptitle(f"α θ₁ + (1 − α) θ₂ on {result['rows']['rows']} rows of {_task(result)}", fontsize=10)
    panels = figure.subplots(1, 2)
    for axis, label in zip(panels, labels, strict=True):
        axis.set_xlabel(xlabel)
        axis.set_ylabel(label)
    return figure, panels


def _task(result: dict[str, Any]) -> str:
    return f"{task_name(result['task'])} (computed in {PRECISIONS[result['precision']]})"


def _name(axis: "Axes", places: Sequence[float], names: Sequence[str]) -> None:
    axis.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(places, names)


def _heat_map(axis: "Axes", values: np.ndarray, limits: tuple[float, float]) -> Any:
    digits = 2 if limits[1] >= 1 else 3 if limits[1] >= 0.1 else 4
    image = axis.imshow(values, vmin=limits[0], vmax=limits[1], cmap=COLOURS, aspect="equal")
    axis.set_facecolor(NOT_COMPUTED)
    if len(values) <= NAMED_RUNS:
        for row, column in np.argwhere(np.isfinite(values)):
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
    return image
