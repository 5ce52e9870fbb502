"""Launchers of the allocation kernels: one launch selects, one zeroes λ; none waits for the device.

Up to RESIDENT triplets the scores are read once, up to LARGEST they are read again for every bit of the
threshold; more of them, and float64 scores, are sorted by ``reference.py``, which does not wait either.
"""

import torch
from torch import Tensor

from adalora_fast.ops.dispatch import tables
from adalora_fast.ops.dispatch.launch import launch

from . import kernels, reference

RESIDENT = 16384  # keys that one program holds in its registers
LARGEST = 65536
RANKS = 64  # triplets of a matrix at a time


def select(scores: Tensor, budget: Tensor) -> Tensor:
    """See ``reference.select``."""
    count = scores.numel()
    reason = None
    if scores.dtype not in tables.TYPE_CODES:
        reason = f"scores are {scores.dtype}"
    elif count > LARGEST:
        reason = f"{count} triplets are more than the {LARGEST} they select from"
    if reason:
        tables.say_once("allocation", reason)
        return reference.select(scores, budget)
    mask = torch.empty(count, dtype=torch.bool, device=scores.device)
    if count == 0:
        return mask
    bits = max((count - 1).bit_length(), 6)
    block = min(1 << bits, RESIDENT)
    launch(
        kernels.select_kernel, (1,), scores.contiguous(), budget, mask.view(torch.uint8), count,
        BLOCK=block, BITS=bits, RESIDENT=count <= block, num_warps=min(max(block // 256, 4), 32),
    )  # fmt: skip
    return mask


def apply_mask_(mask: Tensor, lora_E: list[Tensor]) -> None:
    """See ``reference.apply_mask_``."""
    rows, first = [], 0
    for values in lora_E:
        size = values.element_size()
        rows += [values.data_ptr(), values.stride(0) * size, size, values.shape[0], first]
        first += values.shape[0]
    matrices = tables.table(tuple(rows), torch.int64, tables.place_on(mask.device))
    launch(
        kernels.zero_kernel, (len(lora_E),), matrices, mask.contiguous().view(torch.uint8),
        BLOCK=RANKS, num_warps=2,
    )  # fmt: skip
    torch.autograd.graph.increment_version(lora_E)  # as any operation of PyTorch that writes would
