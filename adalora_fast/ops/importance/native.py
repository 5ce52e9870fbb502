"""Importance statistics and triplet scores in C++ (csrc/cpu/): one call for all parameters.

The formulas, the order of rows and the treatment of missing and non-finite gradients are the reference's;
sums over a triplet are taken in float64. Legend: L matrices, parameters A_0, E_0, B_0, A_1, ...; T triplets.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .reference import layout_of, unknown
from .rule import ScoreRule

# What csrc/cpu/importance.h computes, as it numbers them. The reference may have more.
SCORE_NUMBERS = {"sensitivity": 0, "movement": 1, "fisher": 2, "gsnr": 3, "magnitude": 4}
SMOOTHING_NUMBERS = {"ema_uncertainty": 0, "ema": 1, "sum": 2, "none": 3}


def limit(score: str, smoothing: str) -> str | None:
    """Why the kernels do not compute this score with this smoothing, or None."""
    return unknown("the C++ kernels", tuple(SCORE_NUMBERS), tuple(SMOOTHING_NUMBERS), score, smoothing)


@lru_cache(maxsize=64)
def _places(shapes: tuple[torch.Size, ...], score: str) -> Tensor:
    places = [[-1, *shape] for shape in shapes]
    for group in layout_of([torch.empty(shape, device="meta") for shape in shapes], score).groups:
        size = group.shape[0] * group.shape[1]
        for position, member in enumerate(group.members):
            places[member][0] = group.start + position * size
    return torch.tensor(places, dtype=torch.int64)


def places_of(parameters: list[Tensor], score: str) -> Tensor:
    """[3L, 3] int64: each parameter's first column in the statistics (-1: none), its rows and columns."""
    return _places(tuple(parameter.shape for parameter in parameters), score)


def update_(
    parameters: list[Tensor],
    grads: list[Tensor | None],
    statistics: Tensor,
    updates: Tensor,
    rule: ScoreRule,
    active: Tensor | None = None,
) -> None:
    """One optimizer step's update of ``statistics`` [rows, size] and of each parameter's count ``updates``
    [3L]; none where ``active`` is False.
    """
    if active is not None and not active:
        return
    torch.ops.adalora_fast_C.importance_update_(
        parameters,
        grads,
        statistics,
        updates,
        places_of(parameters, rule.score),
        SCORE_NUMBERS[rule.score],
        SMOOTHING_NUMBERS[rule.smoothing],
        rule.beta1,
        rule.beta2,
    )
    torch.autograd.graph.increment_version([statistics, updates])


def triplet_scores(parameters: list[Tensor], statistics: Tensor, rule: ScoreRule) -> Tensor:
    """S of every triplet [T]."""
    return torch.ops.adalora_fast_C.importance_scores(
        statistics,
        places_of(parameters, rule.score),
        SCORE_NUMBERS[rule.score],
        SMOOTHING_NUMBERS[rule.smoothing],
    )
