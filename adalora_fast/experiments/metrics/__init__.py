"""The metrics of the tasks: numeric cores, bootstrap intervals, and modules for Hugging Face's `evaluate`.

`glue`, `squad` and `bootstrap` need numpy, scikit-learn and scipy only, `evaluate_modules` the package
`evaluate`, and `translation` sacrebleu when one of its functions is called.
"""

from .glue import METRICS, accuracy, compute, f1, matthews, pearson, pearson_spearman, spearman

__all__ = [
    "METRICS",
    "compute",
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "pearson_spearman",
]
