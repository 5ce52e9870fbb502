"""Comparing finished runs with each other: what their layers say (CKA), how the loss bends on the way from
one to another (connectivity), and mixtures of their weights (soups).

Read from the bottom up: `saved` opens run folders, `groups` says which belong together, `changes` reads what
a run changed in its base model, `shared` puts any weighted mixture of such changes into one base model,
`rows` evaluates it and `evaluations` keeps what came out; `cka` and `connectivity` are the measures as
functions of numbers, `features` the representations, `soup` the search and `soup_files` what is saved of it;
`analyses` and `soups` put these together, one function for each command, `plots` draws what they return, and
`report` puts it into words.
"""

from .analyses import analyze_cka, analyze_connectivity
from .changes import RunChange, mixture, read_change
from .cka import MinibatchCKA, cka_matrix, linear_cka
from .connectivity import ConvexityGap, convexity_gap, error_barrier, height
from .progress import AnalysisProgress
from .saved import SavedRun, check_comparable, open_run, open_runs
from .shared import SharedModel, open_model
from .soups import make_soup

__all__ = [
    "analyze_cka",
    "analyze_connectivity",
    "make_soup",
    "RunChange",
    "mixture",
    "read_change",
    "AnalysisProgress",
    "MinibatchCKA",
    "cka_matrix",
    "linear_cka",
    "ConvexityGap",
    "convexity_gap",
    "error_barrier",
    "height",
    "SavedRun",
    "check_comparable",
    "open_run",
    "open_runs",
    "SharedModel",
    "open_model",
]
