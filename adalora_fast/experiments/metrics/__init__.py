"""The metrics of the tasks: `glue(task)`, `squad()` and `squad_v2()` as modules for Hugging Face's
`evaluate`, their numeric cores, and bootstrap intervals.

The modules need the package `evaluate`. `glue_core`, `squad_core` and `bootstrap` need numpy, scikit-learn
and scipy only, `translation` sacrebleu when one of its functions is called.
"""

from typing import Any

from .bootstrap import Interval, interval
from .glue_core import METRICS, accuracy, compute, f1, matthews, pearson, pearson_spearman, spearman

MODULES = ("glue", "squad", "squad_v2")

__all__ = [
    "METRICS",
    "compute",
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "pearson_spearman",
    "Interval",
    "interval",
    *MODULES,
]


def __getattr__(name: str) -> Any:
    if name in MODULES:  # only then is `evaluate` needed
        from . import evaluate_modules

        return getattr(evaluate_modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
