"""What the adapter op refuses: shapes, devices and types that do not fit, by name.

While ``torch.jit.trace`` records, sizes are part of the trace and comparing them makes it warn: the operators
that are recorded refuse what does not fit.
"""

import torch
from torch import Tensor

PRECISIONS = ("default", "highest")


def check_base(weight: Tensor, bias: Tensor | None, lora_A: Tensor) -> None:
    """The frozen layer's shapes."""
    if torch.jit.is_tracing():
        return
    if weight.dim() != 2 or weight.shape[1] != lora_A.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and lora_A {tuple(lora_A.shape)} must be (out, in), (r, in)"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"bias {tuple(bias.shape)} and weight {tuple(weight.shape)} must be (out,) and (out, in)"
        )


def check_result(result: Tensor, x: Tensor) -> None:
    """The base layer's output belongs to its input (the sizes of nested tensors are not asked for)."""
    if torch.jit.is_tracing():
        return
    if result.dim() == 0:
        raise ValueError("result is a scalar; it must be the base layer's output [..., out]")
    if not x.is_nested and x.shape[:-1] != result.shape[:-1]:
        raise ValueError(
            f"x {tuple(x.shape)} and result {tuple(result.shape)} must agree in all but the last size"
        )


def check(
    x: Tensor,
    base: tuple[tuple[str, Tensor], ...],
    out_features: int,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    precision: str,
) -> None:
    """Refuse what does not fit. ``base``: the base's tensors by name, which share x's device."""
    if torch.jit.is_tracing():
        return
    rank = lora_A.shape[0]
    if lora_A.dim() != 2 or lora_E.shape != (rank, 1) or lora_B.shape != (out_features, rank):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)}, lora_E {tuple(lora_E.shape)}, lora_B {tuple(lora_B.shape)} do "
            f"not fit; they must be (r, in), (r, 1) and ({out_features}, r)"
        )
    in_features = lora_A.shape[1]
    if x.dim() == 0 or x.size(-1) != in_features:
        has = "no dimension" if x.dim() == 0 else f"{x.size(-1)} features"
        raise ValueError(f"x has {has}, lora_A takes {in_features}; x must be [..., {in_features}]")
    device = x.device
    for name, tensor in (*base, ("x", x), ("lora_A", lora_A), ("lora_E", lora_E), ("lora_B", lora_B)):
        if tensor.device != device:
            raise ValueError(f"x is on {device} and {name} on {tensor.device}; move one of them with .to()")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; the adapter takes floating point, cast it first")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {PRECISIONS}")
