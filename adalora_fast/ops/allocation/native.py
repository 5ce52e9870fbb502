"""Selection and masking in C++ (csrc/cpu/) and CUDA C++ (csrc/cuda/): one call or launch, without sorting.

The budget-th highest score is found in linear time; of the triplets that share it, the first are kept, which
is the reference's rule for ties and for scores that are not numbers. On a GPU nothing waits for the device.
"""

import torch
from torch import Tensor

from . import reference


def _as_kernels_take_it(scores: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    if scores.device.type == "cpu":
        return scores, budget
    scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    return scores.contiguous(), budget.to(torch.int64)


def _in_reach(lora_E: list[Tensor]) -> bool:
    """The GPU's kernels take contiguous λ only."""
    return all(values.device.type == "cpu" or values.is_contiguous() for values in lora_E)


def select(scores: Tensor, budget: Tensor) -> Tensor:
    """[T] bool: which triplets are kept; ``budget`` is an integer scalar tensor."""
    return torch.ops.adalora_fast_C.allocation_select(*_as_kernels_take_it(scores, budget))


def apply_mask_(mask: Tensor, lora_E: list[Tensor]) -> None:
    """Set λ of every triplet outside ``mask`` to zero, in place."""
    if not _in_reach(lora_E):
        return reference.apply_mask_(mask, lora_E)
    torch.ops.adalora_fast_C.allocation_apply_mask_(mask.contiguous(), lora_E)
    torch.autograd.graph.increment_version(lora_E)


def allocate_(scores: Tensor, budget: Tensor, lora_E: list[Tensor]) -> Tensor:
    """:func:`select` and :func:`apply_mask_` at once; the mask."""
    if not _in_reach(lora_E):
        mask = select(scores, budget)
        apply_mask_(mask, lora_E)
        return mask
    mask, _ = torch.ops.adalora_fast_C.allocation_allocate_(*_as_kernels_take_it(scores, budget), lora_E)
    torch.autograd.graph.increment_version(lora_E)
    return mask
