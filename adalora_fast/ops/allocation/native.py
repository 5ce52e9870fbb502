"""Selection and masking in C++ (csrc/cpu/): one call each, without sorting.

The budget-th highest score is found in linear time; of the triplets that share it, the first are kept, which
is the reference's rule for ties and for scores that are not numbers.
"""

import torch
from torch import Tensor


def select(scores: Tensor, budget: Tensor) -> Tensor:
    """[T] bool: which triplets are kept; ``budget`` is an integer scalar tensor."""
    return torch.ops.adalora_fast_C.allocation_select(scores, budget)


def apply_mask_(mask: Tensor, lora_E: list[Tensor]) -> None:
    """Set λ of every triplet outside ``mask`` to zero, in place."""
    torch.ops.adalora_fast_C.allocation_apply_mask_(mask.contiguous(), lora_E)
    torch.autograd.graph.increment_version(lora_E)
