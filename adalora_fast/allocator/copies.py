"""Second copies of the weights, in which pruned triplets live on: in optimizers, and in averaged models.

Schedule-free optimizers evaluate x = y + (1 - 1/β) (z - y) with z in their state, Lookahead and its
relatives go back to slow weights, SAM restores what it saved: zeroing λ in the model alone would not last.
So the copies of Λ in the state of an attached optimizer are zeroed with it. Which tensors are copies is not
written anywhere; all of Λ's shape are zeroed, except the moments of gradients under the names that torch's
optimizers give them.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from adalora_fast.distributed.processes import add_, apply_mask_

MOMENTS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),  # Adam, AdamW, Adamax, SGD
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size"),  # RMSprop, Adadelta, Adagrad, Rprop
    *("state1", "state2"),  # bitsandbytes
}


def mask_optimizers_(optimizers: Iterable[object], mask: Tensor, lambdas: list[Tensor]) -> None:
    """Zero the pruned entries of every copy of Λ in the optimizers' state; ``mask`` [T] as in
    :func:`adalora_fast.ops.apply_mask_`.
    """
    for keep, copies in _copies(optimizers, mask, lambdas):
        apply_mask_(keep, copies)


def add_to_optimizers_(optimizers: Iterable[object], added: Tensor, lambdas: list[Tensor]) -> None:
    """Add ``added`` [T] to every copy of Λ in the optimizers' state, as it was added to Λ."""
    for values, copies in _copies(optimizers, added, lambdas):
        add_(values, copies)


def _copies(
    optimizers: Iterable[object], of_triplets: Tensor, lambdas: list[Tensor]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(the part of ``of_triplets`` [T] that belongs to them, copies of some matrices' Λ under one name)."""
    parts = of_triplets.split([values.shape[0] for values in lambdas])
    for state in _states(optimizers):
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for values, part in zip(lambdas, parts, strict=True):
            for name, tensor in state.get(values, {}).items():
                if name not in MOMENTS and _is_like(tensor, values):
                    found.setdefault(name, []).append((part.to(tensor.device), tensor))
        for pairs in found.values():
            yield torch.cat([part for part, _ in pairs]), [tensor for _, tensor in pairs]


def _states(optimizers: Iterable[object]) -> list[Mapping]:
    """Every optimizer's state once (a wrapper may show that of the one inside)."""
    states = {id(state): state for state in (getattr(each, "state", None) for each in optimizers)}
    return [state for state in states.values() if isinstance(state, Mapping)]


def _is_like(tensor: object, values: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor is not values
        and tensor.shape == values.shape
        and tensor.is_floating_point()
    )
