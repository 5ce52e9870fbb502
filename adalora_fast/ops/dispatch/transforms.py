"""When an op must be a composition of PyTorch's own: under transforms that cannot look into a kernel."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` meets ``torch.func`` (vmap, grad, jvp, ...), forward-mode differentiation,
    ``torch.jit.trace`` or is nested: the op is then computed by PyTorch's own operators, which know these.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or tensor.is_nested
        or torch.jit.is_tracing()
    )
