"""How every picture looks, and how it is saved."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "adalora_fast",  # the same picture gives the same file
}
COLOURS = "cividis"  # the same order in grey and for every kind of colour vision
BOTH_WAYS = "PuOr"  # from -1 to 1, told apart by colour-blind people
# Okabe and Ito's palette without its yellow, which is too faint for a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")


def styled() -> AbstractContextManager[None]:
    """`with styled():` draws and saves in this package's style."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def arm_styles(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of every arm: no two of the first 28 look the same."""
    return {
        arm: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": DASHES[i // len(PALETTE) % len(DASHES)],
        }
        for i, arm in enumerate(arms)
    }


def save(figure: "Figure", stem: Path) -> list[Path]:
    """`stem`.png and `stem`.svg; the same figure gives the same bytes."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
        figure.set_layout_engine("none")  # the places are found: finding them again costs as much as drawing
    return files
