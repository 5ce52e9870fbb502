"""The adapter as a composition of PyTorch's operators, for transforms that cannot look into the op.

The same sums as ``reference.py`` in the same types; vmap, jvp, higher derivatives and ``torch.jit.trace`` are
the operators' own. It keeps more for the backward and takes more launches than the op.
"""

import torch.nn.functional as F
from torch import Tensor

from adalora_fast.ops.dispatch.library import without_autocast

from .adapter import Adapter


def delta(result: Tensor, adapter_input: Tensor, adapter: Adapter) -> Tensor:
    """``result + scaling · (x' Aᵀ ⊙ Eᵀ) Bᵀ`` in ``result``'s type; x' is the input after dropout."""
    dtype = adapter.product_dtype(result.dtype)
    with without_autocast(result.device.type):
        h = F.linear(adapter_input.to(dtype), (adapter.lora_A * adapter.lora_E).to(dtype))
        return result + (adapter.scaling * F.linear(h, adapter.lora_B.to(dtype))).to(result.dtype)
