"""The picture of ``benchmarks.step_cpu``: bars of the median step with the 20th and 80th percentile, from its
result file.

python -m benchmarks.plot_step benchmarks/results/cpu/step.json docs/images/step_cpu
"""

import argparse
import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from adalora_fast.experiments.plots import STYLE

BARS = {
    "frozen": ("frozen model, no adapter", "#BBBBBB"),
    "adalora_fast": ("adalora_fast", "#56B4E9"),
    "peft": ("PEFT AdaLoRA", "#E69F00"),
}


def draw(result: dict) -> Figure:
    """Horizontal bars, shortest on top, the ratio to PEFT in the title."""
    machine, versions = result["environment"]["machine"], result["environment"]["versions"]
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    axis = figure.subplots()
    for row, (name, (label, colour)) in enumerate(BARS.items()):
        figures = result["figures"][name]
        median = figures["median_ms"]
        spread = [[median - figures["p20_ms"]], [figures["p80_ms"] - median]]
        axis.barh(row, median, color=colour, xerr=spread, error_kw={"elinewidth": 1, "capsize": 3})
        axis.text(4, row, f"{label}: {median:.0f} ms", va="center", color="black", fontsize=9)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.invert_yaxis()
    axis.set_xlabel("one training step, ms (median, 20th to 80th percentile)")
    axis.set_title(
        f"{result['ratio_of_pairs']:.2f}x faster than PEFT: MiniLM-L6, r = 16, batch 16 x 64, float32\n"
        f"{machine['processor']}, {result['threads']} threads, PyTorch {versions['torch']}, PEFT "
        f"{versions['peft']}",
        fontsize=9,
        loc="left",
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="what benchmarks.step_cpu --json wrote")
    parser.add_argument("stem", type=Path, help="the picture's path without its ending")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    with rc_context(STYLE):
        figure = draw(result)
        figure.savefig(arguments.stem.with_suffix(".png"), dpi=160)
        figure.savefig(arguments.stem.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
