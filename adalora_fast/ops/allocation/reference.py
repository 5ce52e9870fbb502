"""Global selection of the budget's triplets in plain PyTorch, without a host synchronisation.

Keeps exactly b of T triplets: the b highest scores, ties broken by position, which is (matrix, triplet). A
stable descending sort has that rule built in; a score that is not a number counts as the lowest.
"""

import torch
from torch import Tensor


def select(scores: Tensor, budget: Tensor) -> Tensor:
    """[T] bool: which triplets are kept; ``budget`` is an integer scalar tensor."""
    ordered = torch.where(scores.isnan(), float("-inf"), scores).sort(descending=True, stable=True).indices
    ranks = torch.arange(scores.numel(), device=scores.device)
    return torch.empty_like(ranks, dtype=torch.bool).scatter_(0, ordered, ranks < budget)


def apply_mask_(mask: Tensor, lora_E: list[Tensor]) -> None:
    """Set λ of every triplet outside ``mask`` to zero, in place."""
    values = torch.cat(lora_E).squeeze(1)  # [T]
    kept = torch.where(mask, values, 0.0).unsqueeze(1)
    torch._foreach_copy_(lora_E, kept.split([e.shape[0] for e in lora_E]))
