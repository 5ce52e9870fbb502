"""Pictures made from result files: PNG and SVG, readable by colour-blind people, looked at before they
are shown.
"""

from .ranks import plot_ranks, rank_figure, rank_grid
from .style import COLOURS, STYLE

__all__ = ["COLOURS", "STYLE", "plot_ranks", "rank_figure", "rank_grid"]
