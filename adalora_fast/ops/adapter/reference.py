"""The AdaLoRA linear in plain PyTorch: the meaning of the op, and its implementation on a CPU.

Forward (AdaLoRA, arXiv 2303.10512, eq. 1, with PEFT's scale c)::

    S  = A ⊙ E                     [R, K]   the right factor with the singular values folded in
    h  = x' Sᵀ                     [M, R]
    y  = x Wᵀ + b + c h Bᵀ         [M, N]

Backward, with g = c dy B [M, R] and V = gᵀ x' [R, K]::

    dx  = dy W (+ g S where x' is x)       [M, K]
    dx' = g S                              [M, K]
    dA  = V ⊙ E                            [R, K]
    dE  = Σ_k V ⊙ A                        [R, 1]
    dB  = c dyᵀ h                          [N, R]

Folding E into A costs one pass over R x K instead of one over M x R, the scale rides on the products (a
multiplication by a Python number is three calls), and V gives dA and dE together, so that each activation
is read once per product.
Legend: M tokens, K in, N out, R rank; x' is the adapter's input: x, or x after
dropout, which either the caller did (``adapter_input``) or ``seed`` and ``dropout_p`` say (dropout.py).
Products accumulate in float32 for half types (float64 for float64).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .adapter import Adapter
from .dropout import survivors, survivors_scale

Finish = Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor | None, Tensor | None]]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` without the call where nothing changes: there are dozens of layers."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left @ right in one call (with beta = 0 the first operand is not read)."""
    unread = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(unread, left, right, beta=0, alpha=scaling)


def _add_product(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y += scaling * h Bᵀ in place; y may be of a narrower type."""
    if h.dtype == y.dtype:
        return y.addmm_(h, B.t(), alpha=scaling)
    return y.add_(_scaled_product(h, B.t(), scaling))


def output(like: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """(y [..., N], y as rows [M, N]) to be written. y itself must be no view, as a linear layer's output is
    none: autograd lets nobody change a view in place that was made inside an op.
    """
    y = like.new_empty(*like.shape[:-1], features)
    return y, y.view(y.shape[:-1].numel(), features)


def base_product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = rows Wᵀ + b."""
    if bias is not None:
        torch.addmm(bias, rows, weight.t(), out=out)
    else:
        torch.mm(rows, weight.t(), out=out)


DROPS_INSIDE = False  # dropout is the caller's, so that it draws PyTorch's random numbers


def limit(rank: int, dtype: torch.dtype) -> str | None:
    """Nothing is too much for plain PyTorch."""
    return None


def saved_shapes(rows: int, lora_A: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the second and third result of :func:`linear`, which go to :func:`backward`."""
    return (rows, lora_A.shape[0]), tuple(lora_A.shape)


def _keep(like: Tensor, adapter: Adapter) -> Tensor | None:
    """[M, K] the factor that dropout gives every entry of x: 0 or 1 / (1 - p); None without dropout."""
    if adapter.seed is None:
        return None
    alive = survivors(adapter.seed, *like.shape, adapter.dropout_p)
    return alive.to(like.dtype) * survivors_scale(adapter.dropout_p)


def _project(inputs: Tensor, adapter: Adapter, output: torch.dtype) -> tuple[Tensor, Tensor]:
    """(h, S) of x [M, K]; the fold is done in the factors' own type and rounded once."""
    keep, dtype = _keep(inputs, adapter), adapter.product_dtype(output)
    if keep is not None:
        inputs = inputs * keep
    S = _cast(adapter.lora_A * adapter.lora_E, dtype)  # [R, K]
    return _cast(inputs, dtype) @ S.t(), S  # [M, R]


def linear(
    x: Tensor,
    adapter_input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, S) for a plain linear base."""
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    y, out = output(x, weight.shape[0])
    base_product(rows, weight, bias, out)
    inputs = rows if adapter_input is None else adapter_input.reshape(-1, x.shape[-1])
    h, S = _project(inputs, adapter, x.dtype)
    _add_product(out, h, _cast(adapter.lora_B, h.dtype), adapter.scaling)
    return y, h, S


def delta(result: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """(result + c h Bᵀ, h, S) for any base whose output is ``result``; ``result`` is left as it is."""
    inputs = x.reshape(-1, x.shape[-1])
    h, S = _project(inputs, adapter, result.dtype)
    rows, B = result.reshape(-1, result.shape[-1]), _cast(adapter.lora_B, h.dtype)  # [M, N], [N, R]
    y, out = output(result, B.shape[0])
    if h.dtype == rows.dtype:
        torch.addmm(rows, h, B.t(), alpha=adapter.scaling, out=out)
    else:
        out.copy_(rows + _scaled_product(h, B.t(), adapter.scaling))
    return y, h, S


def delta_(result: Tensor, x: Tensor, adapter: Adapter) -> None:
    """result += c h Bᵀ in place, without what a backward would need."""
    inputs = x.reshape(-1, x.shape[-1])
    h, _ = _project(inputs, adapter, result.dtype)
    _add_product(result.view(-1, result.shape[-1]), h, _cast(adapter.lora_B, h.dtype), adapter.scaling)


def right_factor_gradients(
    V: Tensor, lora_A: Tensor, lora_E: Tensor, need_A: bool, need_E: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dA, dE) of V [R, K], None where not needed; V is used up."""
    dA = V * lora_E if need_A else None
    return dA, V.mul_(lora_A).sum(1, keepdim=True) if need_E else None


def backward(
    grad: Tensor,
    adapter_input: Tensor,
    h: Tensor,
    S: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    shared_input: bool,
    needs: list[bool],
    finish: Finish = right_factor_gradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx', dA, dE, dB); what ``needs`` (in this order) leaves out is an empty tensor.

    ``shared_input``: x' is x or is made of it by ``seed``, so dx carries both paths and dx' is empty.
    ``weight`` None: no base, so dx is empty. ``finish``: what makes dA and dE of V.
    """
    rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
    inputs = adapter_input.reshape(-1, adapter_input.shape[-1])  # [M, K]
    need_x, need_input, need_A, need_E, need_B = needs
    dx, d_input, dA, dE, dB = (None if needed else grad.new_empty(0) for needed in needs)
    lora_A, lora_E, lora_B, scaling, *_ = adapter
    keep = _keep(inputs, adapter)

    if need_B:
        dB = _cast(_scaled_product(_cast(rows, h.dtype).t(), h, scaling), lora_B.dtype)  # [N, R]
    if need_input or need_A or need_E or (need_x and shared_input):
        g = _scaled_product(_cast(rows, h.dtype), _cast(lora_B, h.dtype), scaling)  # [M, R]
    if need_x:
        dx = rows @ weight  # [M, K]
        if shared_input and keep is not None:
            dx = dx.add_((g @ S) * keep)
        elif shared_input:
            dx = dx.addmm_(g, S) if g.dtype == dx.dtype else dx.add_(g @ S)
        dx = dx.view(adapter_input.shape)
    if need_input:
        change = g @ S if keep is None else (g @ S) * keep
        d_input = _cast(change, adapter_input.dtype).view(adapter_input.shape)
    if need_A or need_E:
        dropped = inputs if keep is None else inputs * keep
        V = _cast(g.t() @ _cast(dropped, h.dtype), lora_A.dtype)  # [R, K]
        new_A, new_E = finish(V, lora_A, lora_E, need_A, need_E)
        dA, dE = new_A if need_A else dA, new_E if need_E else dE
    return dx, d_input, dA, dE, dB
