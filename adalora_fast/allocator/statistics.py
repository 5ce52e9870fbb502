"""What was learnt about the adapter's parameters so far: running statistics of their gradients, and the
triplets' scores that are made of them.
"""

import torch
from torch import Tensor

from adalora_fast.distributed import shards as sharding
from adalora_fast.distributed.processes import refuse_emptied
from adalora_fast.ops import importance_scores, importance_update_
from adalora_fast.ops.importance import ScoreRule, layout_of, reference

from .scores import Score, update_user_statistics_

TRIPLETS = ("full", "lambda")


def check_triplet(triplet: str) -> None:
    """ValueError where this is no part of a triplet that can be scored."""
    if triplet not in TRIPLETS:
        raise ValueError(f"triplet {triplet!r} is not one of {TRIPLETS}")


class Statistics:
    """The statistics of one score over a model's parameters A_0, E_0, B_0, A_1, ... (arXiv 2303.10512,
    eq. 7-11).

    Args:
        score, smoothing: what is kept, see :mod:`adalora_fast.ops.importance`.
        beta1, beta2: decay of Ī (and gsnr's moments) and of Ū, in (0, 1).
        triplet: ``"full"``, or ``"lambda"`` to keep and score λ's entries alone.

    Attributes:
        values: [rows, entries] in float32, or float64 where a parameter is; of parameters that are sharded
            over processes, for the entries that this one holds.
        updates: [parameters] int64, how often each was updated.
        user_state: tensors of a registered score's own.

    Raises:
        ValueError: a decay out of range, or an unknown ``triplet``.
    """

    def __init__(
        self, score: Score, smoothing: str, beta1: float, beta2: float, triplet: str = "full"
    ) -> None:
        check_triplet(triplet)
        self.score, self.triplet = score, triplet
        self.rule = ScoreRule(score.name, smoothing, beta1, beta2)

    @property
    def names(self) -> tuple[str, ...]:
        """What the rows of ``values`` are."""
        return self.rule.statistics

    def reset(self, parameters: list[Tensor]) -> None:
        """Forget everything; from now on these parameters count."""
        self.device, self.dtype = _placement(parameters)
        self._shapes = [parameter.shape for parameter in parameters]
        self._shards = self._shards_of(parameters)
        self.values = self._held(self.new(parameters))
        self.updates = torch.zeros(len(parameters), dtype=torch.int64, device=self.device)
        self.user_state: dict[str, Tensor] = {}

    def judged(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Parameters or gradients A_0, E_0, B_0, A_1, ... as far as they are scored: with
        ``triplet="lambda"`` those of P and Q are [r, 0] and [0, N], which have no entries.
        """
        if self.triplet == "full":
            return tensors
        return [
            tensor if tensor is None or i % 3 == 1 else _without_entries(tensor, i % 3 == 0)
            for i, tensor in enumerate(tensors)
        ]

    def new(self, parameters: list[Tensor]) -> Tensor:
        """Statistics of no gradient at all, for whole parameters."""
        size = layout_of(self.judged(parameters), self.score.name).size
        return torch.zeros(len(self.names), size, dtype=self.dtype, device=self.device)

    def fit(self, parameters: list[Tensor]) -> bool:
        """Whether the parameters are where the statistics are, in types that theirs is made for.

        Raises:
            ValueError: the parameters lie on several devices, or have other shapes than before.
        """
        if [parameter.shape for parameter in parameters] != self._shapes:
            refuse_emptied(parameters)
            raise ValueError("adapter shapes changed since the allocator was made; call rebind() on it")
        if self._shards_of(parameters) != self._shards:
            return False
        return _placement(parameters) == (self.device, self.dtype)

    def _shards_of(self, parameters: list[Tensor]) -> sharding.Shards | None:
        shards = sharding.shards_of(self.judged(parameters))
        if shards is not None and self.score.function is not None:
            raise ValueError(
                f"score {self.score.name!r} is a registered function, which needs whole factors, and these "
                "are sharded; use a built-in score, or DistributedDataParallel"
            )
        return shards

    def _held(self, values: Tensor) -> Tensor:
        shards = self._shards
        return values if shards is None else sharding.held_statistics(shards, values, self.score.name)

    def whole(self) -> Tensor:
        """``values`` for whole parameters; where they are sharded, all processes must ask for it."""
        shards = self._shards
        if shards is None:
            return self.values
        return sharding.whole_statistics(shards, self.values, self.score.name)

    def move_to(self, parameters: list[Tensor]) -> None:
        """Follow a model that was moved, cast or sharded."""
        self.device, self.dtype = _placement(parameters)
        values = self.whole()
        self._shards = self._shards_of(parameters)
        self.values = self._held(values.to(self.device, self.dtype))
        self.updates = self.updates.to(self.device)
        self.user_state = {key: value.to(self.device) for key, value in self.user_state.items()}

    def restore(self, values: Tensor, updates: Tensor, user_state: dict[str, Tensor]) -> None:
        """Take these instead, ``values`` those of whole parameters."""
        self.values, self.updates, self.user_state = self._held(values), updates, user_state

    def update_(
        self, parameters: list[Tensor], grads: list[Tensor | None], active: Tensor | None = None
    ) -> None:
        """Take in one optimizer step's gradients; where ``active`` is False on the device, nothing
        changes.
        """
        parameters, grads = self.judged(parameters), self.judged(grads)
        shards = self._shards
        if shards is not None:
            parameters, grads = shards.held(parameters), shards.held(grads)
            active = shards.all_of(sharding.finite(parameters, grads, self.score.name, self.dtype))
        if self.score.function is None:
            importance_update_(parameters, grads, self.values, self.updates, self.rule, active)
        else:
            self.user_state = update_user_statistics_(
                self.score, self.rule, parameters, grads, self.values, self.updates, self.user_state
            )

    def scores(self, parameters: list[Tensor]) -> Tensor:
        """S of every triplet [T]."""
        parameters = self.judged(parameters)
        shards = self._shards
        if shards is not None:
            parts = shards.held(parameters)
            return sharding.triplet_scores(shards, parts, self.values, self.rule)
        score = importance_scores if self.score.function is None else reference.triplet_scores
        return score(parameters, self.values, self.rule)

    def terms(self, parameters: list[Tensor]) -> dict[str, Tensor]:
        """The parts of S of every triplet, by kind: λ's own (``lora_E``) and the means over Q (``lora_A``)
        and P (``lora_B``), each [T]. Where factors are sharded, all processes must ask for it.
        """
        parts = reference.triplet_terms(self.judged(parameters), self.whole(), self.rule)
        return dict(zip(reference.KINDS, parts, strict=True))

    def enough(self) -> Tensor:
        """Bool scalar on the device: the score has seen as many updates as it needs."""
        return self.updates.max() >= self.score.min_updates

    def drop(self) -> None:
        """They are never read again."""
        self.values, self.user_state = self.values[:, :0], {}


def _without_entries(factor: Tensor, is_lora_A: bool) -> Tensor:
    """A factor's [r, 0] or [0, N]; plain where the factor is sharded."""
    shape = (factor.shape[0], 0) if is_lora_A else (0, factor.shape[1])
    return torch.empty(shape, dtype=factor.dtype, device=factor.device)


def _placement(parameters: list[Tensor]) -> tuple[torch.device, torch.dtype]:
    """Where statistics live and in which type: float64 if any parameter is, else float32."""
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"adapter parameters lie on several devices ({sorted(map(str, devices))}); use one")
    wide = any(parameter.dtype == torch.float64 for parameter in parameters)
    return devices.pop(), torch.float64 if wide else torch.float32
