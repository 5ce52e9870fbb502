"""The AdaLoRA linear in plain PyTorch: the meaning of the op, and its implementation on a CPU.

Forward (semantics of AdaLoRA, arXiv 2303.10512, eq. 1, with PEFT's scale)::

    S  = scaling * E * A                      [R, K]   the right factor with the singular values folded in
    h  = x' Sᵀ                                [M, R]
    y  = x Wᵀ + b + h Bᵀ                      [M, N]

Backward, with g = dy B [M, R] and V = gᵀ x' [R, K]::

    dx = dy W  (+ g S where x' is x)          [M, K]
    dx' = g S                                 [M, K]
    dA = scaling * E * V                      [R, K]
    dE = scaling * Σ_k (V * A)                [R, 1]
    dB = dyᵀ h                                [N, R]

Folding E into A costs one pass over R x K instead of one over M x R, and V gives dA and dE together, so that each
activation is read once per product. Legend: M tokens, K in, N out, R rank; x' is the adapter's input (x, or x after
dropout). Products accumulate in float32 for half types (float64 for float64).
"""

import torch
from torch import Tensor


def _factors(
    lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(S, B) in the type of the products; the fold is done in the factors' own type and rounded once."""
    return (lora_A * (lora_E * scaling)).to(dtype), lora_B.to(dtype)  # [R, K], [N, R]


def _add_product(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """y += h Bᵀ in place, in the wider of the two types."""
    if h.dtype == y.dtype:
        return y.addmm_(h, B.t())
    return y.add_(h @ B.t())


def linear(
    x: Tensor,
    adapter_input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    scaling: float,
    highest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, S) of the module's docstring for a plain linear base; ``highest`` computes in the factors' type."""
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    y = torch.addmm(bias, rows, weight.t()) if bias is not None else rows @ weight.t()  # [M, N]
    inputs = rows if adapter_input is None else adapter_input.reshape(-1, x.shape[-1])
    dtype = lora_A.dtype if highest else x.dtype
    S, B = _factors(lora_A, lora_E, lora_B, scaling, dtype)
    h = inputs.to(dtype) @ S.t()  # [M, R]
    return _add_product(y, h, B).view(*x.shape[:-1], weight.shape[0]), h, S


def delta(
    result: Tensor, x: Tensor, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, scaling: float, highest: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(result + h Bᵀ, h, S) for any base whose output is ``result``; ``result`` is left as it is."""
    dtype = lora_A.dtype if highest else x.dtype
    S, B = _factors(lora_A, lora_E, lora_B, scaling, dtype)
    h = x.reshape(-1, x.shape[-1]).to(dtype) @ S.t()  # [M, R]
    rows = result.reshape(-1, result.shape[-1])  # [M, N]
    y = torch.addmm(rows, h, B.t()) if h.dtype == rows.dtype else (rows + h @ B.t()).to(rows.dtype)
    return y.view(result.shape), h, S


def delta_(
    result: Tensor, x: Tensor, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, scaling: float, highest: bool
) -> None:
    """result += h Bᵀ in place, without what a backward would need."""
    dtype = lora_A.dtype if highest else x.dtype
    S, B = _factors(lora_A, lora_E, lora_B, scaling, dtype)
    h = x.reshape(-1, x.shape[-1]).to(dtype) @ S.t()  # [M, R]
    _add_product(result.view(-1, result.shape[-1]), h, B)


def backward(
    grad: Tensor,
    adapter_input: Tensor,
    h: Tensor,
    S: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    scaling: float,
    shared_input: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx', dA, dE, dB); what ``needs`` (in this order) leaves out is an empty tensor.

    ``shared_input``: x' is x, so dx carries both paths and dx' is empty. ``weight`` None: no base, so dx is empty.
    """
    rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
    inputs = adapter_input.reshape(-1, adapter_input.shape[-1])  # [M, K]
    need_x, need_input, need_A, need_E, need_B = needs
    empty = grad.new_empty(0)
    dx = d_input = dA = dE = dB = empty

    if need_B:
        dB = (rows.to(h.dtype).t() @ h).to(lora_B.dtype)  # [N, R]
    adapter_path = need_input or (need_x and shared_input)
    if adapter_path or need_A or need_E:
        g = rows.to(h.dtype) @ lora_B.to(h.dtype)  # [M, R]
    if need_x:
        dx = rows @ weight  # [M, K]
        if shared_input:
            dx = dx.addmm_(g, S) if g.dtype == dx.dtype else dx.add_(g @ S)
        dx = dx.view(adapter_input.shape)
    if need_input:
        d_input = (g @ S).to(adapter_input.dtype).view(adapter_input.shape)
    if need_A or need_E:
        V = (g.t() @ inputs.to(h.dtype)).to(lora_A.dtype)  # [R, K]
        if need_A:
            dA = V * (lora_E * scaling)
        if need_E:
            dE = V.mul_(lora_A).sum(1, keepdim=True).mul_(scaling)
    return dx, d_input, dA, dE, dB
