"""The adapter as a composition of PyTorch's operators, for transforms that cannot look into the op.

The same sums as ``reference.py`` in the same types; vmap, jvp, higher derivatives and ``torch.jit.trace`` are
the operators' own. It keeps more for the backward and takes more launches than the op.
"""

import torch.nn.functional as F
from torch import Tensor

from adalora_fast.ops.dispatch.library import without_autocast


def delta(
    result: Tensor,
    adapter_input: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    scaling: float,
    highest: bool,
) -> Tensor:
    """``result + scaling · (x' Aᵀ ⊙ Eᵀ) Bᵀ`` in ``result``'s type; x' is the input after dropout."""
    dtype = lora_A.dtype if highest else result.dtype
    with without_autocast(result.device.type):
        h = F.linear(adapter_input.to(dtype), (lora_A * lora_E).to(dtype))
        return result + (scaling * F.linear(h, lora_B.to(dtype))).to(result.dtype)
