"""Pictures of benchmark results: bars of the whole step and of one layer, roofline, growth."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_fast.experiments.report.plots.style import save, styled
from benchmarks.report.report import warnings, with_unit
from benchmarks.report.results import Results, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind people, and a contestant has the same colour everywhere.
COLOURS = {
    "frozen": "#BBBBBB", "adalora_fast": "#0072B2", "adalora_fast eager": "#56B4E9",
    "adalora_fast reference": "#56B4E9", "adalora_fast compacted": "#56B4E9",
    "adalora_fast merged": "#009E73",
    "peft": "#E69F00", "peft compiled": "#D55E00", "peft lora": "#F0E442", "peft merged": "#F0E442",
    "unsloth style": "#CC79A7", "plain pytorch": "#999999", "reference": "#56B4E9", "copy": "#BBBBBB",
}  # fmt: skip
OTHER = "#666666"
MARKERS = {"adalora_fast": "o", "peft": "s", "frozen": "^"}
LABELS = {"frozen": "frozen model, no adapter", "peft": "PEFT AdaLoRA", "peft lora": "PEFT LoRA"}


def draw(results: Results, folder: Path) -> tuple[list[Path], list[str]]:
    """Write every picture that the results have data for, as PNG and SVG.

    Returns:
        (the files; a line for each picture that there is nothing to draw of).
    """
    files, without = [], []
    folder.mkdir(parents=True, exist_ok=True)
    with styled():
        for name, make in PICTURES.items():
            figure = make(results)
            if figure is None:
                without.append(f"{name}: the results have nothing to draw")
                continue
            files += save(figure, folder / f"{name}_{results.device}")
    return files, without


def _rows(results: Results, suite: str, **what) -> list[Row]:
    """The suite's rows with a value whose ``what`` has these."""
    return [
        row
        for row in results.rows
        if row.suite == suite
        and row.value is not None
        and all(row.what.get(name) == value for name, value in what.items())
    ]


def _below(results: Results) -> str:
    """Machine and versions, for a title's second line."""
    machine, versions = results.environment["machine"], results.environment["versions"]
    hardware = ", ".join(machine.get("gpus") or []) or machine.get("processor", "")
    threads = "" if results.device != "cpu" else f", {machine.get('threads', '?')} thread(s)"
    text = f"{hardware}{threads}, PyTorch {versions.get('torch')}, PEFT {versions.get('peft')}"
    return "\n".join([text, *warnings(results)])


def step_bars(results: Results) -> "Figure | None":
    """Bars of the median step of the first model, with its 20th and 80th percentile, fastest on top."""
    from matplotlib.figure import Figure

    rows = _rows(results, "step")
    first = rows[0].case if rows else ""
    # Each compiled contestant is a case of its own, "CASE, NAME", which has the baseline once more.
    rows = [row for row in rows if row.case in (first, f"{first}, {row.contestant}")]
    if not rows:
        return None
    rows.sort(key=lambda row: row.value)
    figure = Figure(figsize=(7.2, 1.3 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        spread = [[row.value - (row.p20 or row.value)], [(row.p80 or row.value) - row.value]]
        colour = COLOURS.get(row.contestant, OTHER)
        axis.barh(place, row.value, color=colour, alpha=0.75, xerr=spread,
                  error_kw={"elinewidth": 1, "capsize": 3})  # fmt: skip
        ratio = f" ({row.ratio:.2f}x)" if row.ratio and row.contestant != row.baseline else ""
        text = f"{LABELS.get(row.contestant, row.contestant)}: {with_unit(row)}{ratio}"
        axis.text(0.01 * rows[-1].value, place, text, va="center", fontsize=9)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.invert_yaxis()
    axis.set_xlabel("one training step, s (median, 20th to 80th percentile)")
    by_name = {row.contestant: row for row in rows}
    title = first
    if "peft" in by_name and "adalora_fast" in by_name:
        times = by_name["peft"].ratio / by_name["adalora_fast"].ratio
        title = f"{times:.2f}x PEFT's speed: {title}, r = {rows[0].what.get('rank')}"
    axis.set_title(f"{title}\n{_below(results)}", fontsize=9, loc="left")
    return figure


def layer_bars(results: Results) -> "Figure | None":
    """Forward and step of one adapted layer over the frozen one's, for every shape at the goals' setting."""
    from matplotlib.figure import Figure

    rows = _rows(results, "adapter", goal=True)
    if not rows:
        return None
    directions = list(dict.fromkeys(row.what["pass"] for row in rows))
    figure = Figure(figsize=(7.2, 2.9 * len(directions) + 0.6), layout="constrained")
    axes = figure.subplots(len(directions), 1, squeeze=False)[:, 0]
    for axis, direction in zip(axes, directions, strict=True):
        own = [row for row in rows if row.what["pass"] == direction and row.ratio is not None]
        cases = list(dict.fromkeys(f"{row.what['inner']} → {row.what['outer']}" for row in own))
        names = [name for name in dict.fromkeys(row.contestant for row in own) if name != "frozen"]
        width = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            found = {f"{r.what['inner']} → {r.what['outer']}": r.ratio for r in own if r.contestant == name}
            places = [j - 0.4 + (i + 0.5) * width for j, case in enumerate(cases) if case in found]
            heights = [found[case] for case in cases if case in found]
            axis.bar(places, heights, width, color=COLOURS.get(name, OTHER), label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(cases)), cases)
        axis.set_ylabel(f"{direction}, times the frozen layer")
    axes[0].legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    what = rows[0].what
    figure.suptitle(
        f"One adapted layer, r = {what['rank']}, {what['dtype']}, {what['tokens']} tokens (1: frozen layer)\n"
        f"{_below(results)}",
        fontsize=9,
    )
    return figure


def roofline(results: Results) -> "Figure | None":
    """Operations per second against operations per byte, below the ceilings of the same run."""
    import numpy as np
    from matplotlib.figure import Figure

    if results.ceilings is None:
        return None
    rows = [r for r in _rows(results, "adapter") if r.operations and r.moved and "adalora" in r.contestant]
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    bandwidth, styles = results.ceilings["bandwidth"], {"forward": "o", "step": "s"}
    dtypes = list(dict.fromkeys(row.what["dtype"] for row in rows))
    palette = dict(zip(dtypes, ("#0072B2", "#E69F00", "#009E73"), strict=False))
    intensities = [row.operations / row.moved for row in rows]
    ridges = [results.ceilings["flops"][dtype] / bandwidth for dtype in dtypes]
    span = np.geomspace(min(intensities + ridges) / 4, max(intensities + ridges) * 4, 200)
    for dtype in dtypes:
        peak = results.ceilings["flops"][dtype]
        axis.plot(span, np.minimum(span * bandwidth, peak), color=palette[dtype], linewidth=1)
        for direction, marker in styles.items():
            own = [row for row in rows if row.what["dtype"] == dtype and row.what["pass"] == direction]
            axis.scatter(
                [row.operations / row.moved for row in own],
                [row.operations / row.value for row in own],
                s=18, marker=marker, color=palette[dtype], label=f"{dtype}, {direction}", alpha=0.8,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set_xlabel("operations per byte that must move (line: this device's ceiling)")
    axis.set_ylabel("operations per second")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.set_title(f"Adapted layers below this device's ceilings\n{_below(results)}", fontsize=9, loc="left")
    return figure


def growth(results: Results) -> "Figure | None":
    """Time against layers, rank and tokens, a line per contestant, with the 20th to 80th percentile."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in _rows(results, "growth"):
        panels.setdefault((row.what.get("part", ""), row.what.get("varies", "")), []).append(row)
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.9 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, ((part, varies), rows) in zip(axes, panels.items(), strict=False):
        for name in dict.fromkeys(row.contestant for row in rows):
            own = sorted((r for r in rows if r.contestant == name), key=lambda row: row.what[varies])
            x = [row.what[varies] for row in own]
            colour = COLOURS.get(name, OTHER)
            axis.plot(x, [1e3 * row.value for row in own], color=colour, marker=MARKERS.get(name, "d"),
                      markersize=4, label=LABELS.get(name, name))  # fmt: skip
            low = [1e3 * (row.p20 or row.value) for row in own]
            high = [1e3 * (row.p80 or row.value) for row in own]
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = sorted({row.what[varies] for row in rows})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(_few)
        axis.set_xlabel({"layers": "adapted layers", "rank": "rank r"}.get(varies, varies))
        axis.set_ylabel("ms")
        axis.set_title(_panel_title(part, rows[0]), fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"Growth\n{_below(results)}", fontsize=9)
    return figure


def _few(value: float, place: int) -> str:
    """Of the numbers between powers of ten 2 and 5."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _panel_title(part: str, row: Row) -> str:
    names = {
        "bookkeeping": "importance and allocation of one step",
        "layer": "one layer, forward and backward",
    }
    width = row.what.get("width", row.what.get("inner"))
    return names.get(part, part) + (f", width {width}" if width else "")


PICTURES: dict[str, Callable[[Results], "Figure | None"]] = {
    "step": step_bars,
    "layer": layer_bars,
    "roofline": roofline,
    "growth": growth,
}
