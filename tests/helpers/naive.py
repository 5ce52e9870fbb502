"""The adapter's formula as autograd sees it: the truth in float64, and plain PyTorch in any other type."""

from typing import NamedTuple

import torch
from torch import Tensor

from adalora_fast.ops import adalora_delta_

NAMES = ("x", "weight", "bias", "lora_A", "lora_E", "lora_B")


class Case(NamedTuple):
    """Inputs of the adapter op."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_E: Tensor
    lora_B: Tensor
    scaling: float = 0.75

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_E, self.lora_B


def make_case(
    shape: tuple[int, ...] = (7, 5),
    out: int = 6,
    r: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 0,
    scaling: float = 0.75,
) -> Case:
    """Random inputs; x [*shape], of which the last dimension is K."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, std: float = 1.0, to: torch.dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).to(to)

    k, factor_dtype = shape[-1], factor_dtype or dtype
    return Case(
        x=draw(*shape, to=dtype),
        weight=draw(out, k, std=k**-0.5, to=dtype),
        bias=draw(out, to=dtype) if bias else None,
        lora_A=draw(r, k, std=k**-0.5, to=factor_dtype),
        lora_E=draw(r, 1, to=factor_dtype),
        lora_B=draw(out, r, std=max(r, 1) ** -0.5, to=factor_dtype),
        scaling=scaling,
    )


def formula(
    x, weight, bias, lora_A, lora_E, lora_B, scaling, *, adapter_input=None, product_dtype=None
) -> Tensor:
    """x Wᵀ + b + scaling · (x' Aᵀ ⊙ eᵀ) Bᵀ, rounded as plain PyTorch does in ``product_dtype``."""
    y = x @ weight.t()
    if bias is not None:
        y = y + bias
    inputs = x if adapter_input is None else adapter_input
    if product_dtype is not None:
        inputs, lora_A, lora_E, lora_B = (t.to(product_dtype) for t in (inputs, lora_A, lora_E, lora_B))
    return (y + ((inputs @ lora_A.t()) * lora_E[:, 0]) @ lora_B.t() * scaling).to(y.dtype)


def leaves(
    case: Case, dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ("weight", "bias")
) -> Case:
    """Copies of the inputs that record gradients, except ``frozen``; ``dtype`` casts them."""
    copies = {}
    for name in NAMES:
        tensor = getattr(case, name)
        if tensor is not None:
            tensor = tensor.detach().clone() if dtype is None else tensor.detach().to(dtype, copy=True)
            tensor.requires_grad_(name not in frozen)
        copies[name] = tensor
    return Case(**copies, scaling=case.scaling)


def results(y: Tensor, case: Case, grad: Tensor) -> dict[str, Tensor]:
    """y and the gradient of every leaf of ``case`` that records one."""
    y.backward(grad.to(y.dtype))
    out = {"y": y.detach()}
    for name in NAMES:
        tensor = getattr(case, name)
        if tensor is not None and tensor.requires_grad:
            assert tensor.grad is not None, f"no gradient for {name}"
            out[name] = tensor.grad
    return out


def draw_grad(case: Case, seed: int = 0) -> Tensor:
    """A gradient for the output [*leading, N], in x's type."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (*case.x.shape[:-1], case.weight.shape[0])
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.x.dtype)


def truth(case: Case, grad: Tensor, frozen: tuple[str, ...] = ("weight", "bias"), keep: Tensor | None = None):
    """Output and gradients of the formula in float64; ``keep``: the dropout factor of every entry of x."""
    exact = leaves(case, torch.float64, frozen)
    adapter_input = None if keep is None else exact.x * keep.double()
    return results(formula(*exact, adapter_input=adapter_input), exact, grad)


def onto_linear(x, weight, bias, lora_A, lora_E, lora_B, scaling, **options) -> Tensor:
    """``adalora_delta_`` on top of a plain linear layer, with the signature of ``adalora_linear``."""
    base = torch.nn.functional.linear(x, weight, bias)
    return adalora_delta_(base, x, lora_A, lora_E, lora_B, scaling, **options)
