"""The adapted layers of an allocator: their factors in the order of ties, and which triplets are kept."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adalora_fast.distributed.processes import Processes
from adalora_fast.nn import Factors

from .schedule import BudgetSchedule, Position
from .scores import Score
from .stability import MaskChange
from .statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What an allocator has learnt and decided so far."""

    position: Position
    mask: Tensor  # bool [T]
    values: Tensor  # the statistics [statistics, entries]
    updates: Tensor  # int64, how many each parameter has had
    user_state: dict[str, Tensor]  # of a registered score
    remembered: Tensor  # λ [T] of the pruned; empty unless `remember`


class AllocatedLayers(ABC):
    """What an allocator has and tells of its layers, and what its parts (:mod:`.state`, :mod:`.regulariser`)
    know of it.

    Attributes:
        score, smoothing, score_gradient, weights, triplet, hysteresis, remember: as it was made
            (:class:`adalora_fast.RankAllocator`).
        schedule: the budget over the run.
        processes: who else trains, and agrees.
        regulariser: its orthogonality term; None if nobody has set its weight.
    """

    score: Score
    smoothing: str
    score_gradient: str
    weights: str
    triplet: str
    hysteresis: float
    remember: bool
    schedule: BudgetSchedule
    processes: Processes
    regulariser: Any  # :class:`.regulariser.Regulariser`, which knows this class
    _statistics: Statistics
    _wanted: int  # the target budget that was asked for
    _layers: dict[str, Callable[[], Factors | None]]
    _mask: Tensor  # bool [T]
    _mask_before: Tensor | None  # the one before
    _scores: Tensor | None  # [T], those that the mask was made of
    _terms: dict[str, Tensor] | None  # by kind [T]
    _said_nan: bool

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """What was learnt and decided so far, in memory: the tensors themselves."""

    @abstractmethod
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there; all of it fits."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """See :class:`adalora_fast.RankAllocator`."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """b(t) of the last step that was taken (b(0) before the first)."""

    @property
    @abstractmethod
    def orthogonality_note(self) -> Callable[[Tensor, list[Tensor]], None] | None:
        """What the orthogonality loss calls in its backward; None if nobody asks."""

    @abstractmethod
    def note_added(self, added: dict[int, Tensor], is_scaled: bool) -> None:
        """Called where the orthogonality term is added to the gradients."""

    def total_rank(self) -> int:
        """The triplets that exist, pruned ones included."""
        return sum(factors.lora_E.shape[0] for factors in self.factors())

    def factors(self) -> list[Factors]:
        """Those of every layer, in the order of ties."""
        return [find() for find in self._layers.values()]

    def parameters(self) -> list[Tensor]:
        """A_0, E_0, B_0, A_1, ... (looked up anew each time: a parameter object may be replaced)."""
        return [parameter for factors in self.factors() for parameter in factors]

    def lambdas(self) -> list[Tensor]:
        """E_0, E_1, ..."""
        return [factors.lora_E for factors in self.factors()]

    def count_returned(self) -> int:
        """Pruned triplets whose λ is not zero. Waits for the device."""
        alive = torch.cat([values.detach().flatten() != 0 for values in self.lambdas()])
        return int((alive & ~self._mask.to(alive.device)).sum())

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The adapted layers, in the order of ties."""
        return tuple(self._layers)

    def ranks(self) -> dict[str, int]:
        """Name of every layer and the number of its triplets that are kept. Waits for the device."""
        return {name: sum(kept) for name, kept in self.rank_pattern().items()}

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Name of every layer and, per triplet, whether it is kept. Waits for the device."""
        kept = self._mask.tolist()
        pattern, start = {}, 0
        for name, factors in zip(self._layers, self.factors(), strict=True):
            stop = start + factors.lora_E.shape[0]
            pattern[name] = kept[start:stop]
            start = stop
        if not self._said_nan and self._scores is not None and len(self._scores) == len(kept):
            self._said_nan = _warn_of_nan(self._scores, pattern, self.score.name)
        return pattern

    def scores(self) -> Tensor | None:
        """S of every triplet [T] at the last mask (semantics: s(λ) + mean s(P) + mean s(Q)), layer after
        layer; None before the first.
        """
        return None if self._scores is None else self._scores.detach().clone()

    def score_terms(self) -> dict[str, Tensor] | None:
        """What S was made of at the last mask: s(λ) as ``lora_E``, mean_j s(Q_j) as ``lora_A`` and
        mean_j s(P_j) as ``lora_B``, each [T], their sum being :meth:`scores`; None before the first mask, and
        unless ``keep_terms`` was set (it costs another pass over the statistics at every mask; a recorded
        step leaves it out).
        """
        return None if self._terms is None else {kind: term.clone() for kind, term in self._terms.items()}

    @property
    def last_mask_change(self) -> MaskChange | None:
        """What the last mask changed; None before the first, and after a state was loaded. Waits for the
        device.
        """
        if self._mask_before is None:
            return None
        before, after = self._mask_before, self._mask
        counts = torch.stack([after.sum(), (after & ~before).sum(), (before & ~after).sum()])
        kept, revived, dropped = counts.tolist()
        return MaskChange(kept=kept, revived=revived, dropped=dropped)


def _warn_of_nan(scores: Tensor, pattern: dict[str, list[bool]], name: str) -> bool:
    """Say that some of the ``scores`` [T] of the layers in ``pattern`` are not numbers; returns whether any
    is. Waits for the device.
    """
    wrong = scores.isnan().tolist()
    if any(wrong):
        owners = [layer for layer, kept in pattern.items() for _ in kept]
        warnings.warn(
            f"{sum(wrong)} of {len(wrong)} triplets have no number as their {name} score, the first in "
            f"{owners[wrong.index(True)]}; they are pruned before all others",
            UserWarning,
            stacklevel=4,
        )
    return any(wrong)
