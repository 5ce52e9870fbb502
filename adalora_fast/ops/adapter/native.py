"""The adapter op on a CPU with the C++ library: the reference, but its backward ends in one call, not four.

The products are PyTorch's; from V = gᵀ x' on, dA and dE are one pass over V (csrc/cpu/adapter.cpp).
"""

from functools import partial

import torch
from torch import Tensor

from . import reference
from .reference import DROPS_INSIDE, delta, delta_, limit, linear, saved_shapes

__all__ = ["DROPS_INSIDE", "backward", "delta", "delta_", "limit", "linear", "saved_shapes"]


_TYPES = (torch.float32, torch.float64)


def right_factor_gradients(
    V: Tensor, lora_A: Tensor, lora_E: Tensor, need_A: bool, need_E: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dA, dE), as the reference makes them; V is used up."""
    dtype = V.dtype  # that of lora_A; a product is contiguous
    if (
        need_A
        and need_E
        and dtype in _TYPES
        and lora_E.dtype is dtype
        and lora_A.is_contiguous()
        and lora_E.is_contiguous()
    ):
        return V, torch.ops.adalora_fast_C.adapter_right_factor_gradients_.default(V, lora_A, lora_E)
    return reference.right_factor_gradients(V, lora_A, lora_E, need_A, need_E)


backward = partial(reference.backward, finish=right_factor_gradients)
