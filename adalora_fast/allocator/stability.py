"""Stable allocation: what triplets keep when the mask changes. AdaLoRA and PEFT have neither.

*Hysteresis.* A kept triplet defends its place: to return, a pruned one must beat it by h interquartile ranges
of the scores. With K the kept triplets and IQR that of the finite scores, selection goes by ::

    S_i + h · IQR   for i in K        S_i   for the others

*Remembered λ.* A mask sets λ of a pruned triplet to zero, so one that returns begins anew, from what λ has
regrown since the last mask. With memory m (zero at first), a mask that goes from K to K' does::

    λ_i ← λ_i + m_i,  m_i ← 0    for i in K' without K        it goes on from where it was
    m_i ← λ_i,        λ_i ← 0    for i in K without K'        as it was when it was pruned
    λ_i ← 0                      for i in neither             m_i stays: what regrew is dropped

Scores and the optimizer see the current λ alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def check_stability(hysteresis: float, remember: bool) -> None:
    """Refuse what is no hysteresis, and no choice.

    Raises:
        ValueError, TypeError: the value and the remedy.
    """
    if isinstance(hysteresis, bool) or not isinstance(hysteresis, int | float):
        raise TypeError(f"hysteresis must be a number of interquartile ranges, got {hysteresis!r}")
    if not 0 <= hysteresis < float("inf"):
        raise ValueError(f"hysteresis must be finite and at least 0, got {hysteresis}; 0 turns it off")
    if not isinstance(remember, bool):
        raise TypeError(f"remember must be True or False, got {remember!r}")


def defended(scores: Tensor, kept: Tensor, hysteresis: float) -> Tensor:
    """Numbers in the order in which triplets are to be kept, the highest first: those of ``kept`` have the
    bonus. The order is made in float64 and returned as places in it: a bonus of the spread of all scores is
    millions of times the smallest ones, which float32 could not tell apart any longer.

    Args:
        scores: S [T]; one that is no number stays the lowest.
        kept: [T] bool.
        hysteresis: h ≥ 0, in interquartile ranges of the finite scores. Where that range is zero the whole
            range counts, and where all are equal any number does.

    Returns:
        [T] float32 whole numbers (exact up to 2²⁴ triplets). Nothing waits for the device.
    """
    wide = scores.double()
    bonus = hysteresis * _spread(wide)
    wide = torch.where(wide.isnan(), float("-inf"), wide + kept * bonus)
    order = wide.sort(descending=True, stable=True).indices
    places = torch.arange(0, -len(order), -1, dtype=torch.float32, device=order.device)
    return torch.empty_like(places).scatter_(0, order, places)


def _spread(scores: Tensor) -> Tensor:
    """The interquartile range of the finite scores (order statistics, no interpolation), or more."""
    finite = scores.isfinite()
    ordered = torch.where(finite, scores, float("inf")).sort().values
    last = (finite.sum() - 1).clamp(min=0)
    low, quarter, upper, high = (ordered.take(last * part // 4) for part in (0, 1, 3, 4))
    spread = torch.where(upper > quarter, upper - quarter, high - low)
    return torch.where((spread > 0) & spread.isfinite(), spread, 1.0)


def exchange(remembered: Tensor, before: Tensor, after: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """(what is added to λ, the new memory), both [T], of a mask that goes from ``before`` to ``after``.

    Args:
        remembered: m.
        before, after: [T] bool, the kept triplets.
        current: λ as it was before the mask set any to zero.
    """
    returns = after & ~before
    added = torch.where(returns, remembered, 0.0)
    kept_back = torch.where(before & ~after, current, remembered)
    return added, torch.where(returns, 0.0, kept_back)


@dataclass(frozen=True, kw_only=True)
class MaskChange:
    """How a mask differs from the one before.

    Args:
        kept: triplets that it keeps.
        revived: those of them that the mask before had pruned.
        dropped: triplets that it prunes and the mask before had kept.
    """

    kept: int
    revived: int
    dropped: int

    @property
    def churn(self) -> float:
        """The revived share of the kept triplets; 0 where nothing is kept."""
        return self.revived / self.kept if self.kept else 0.0
