"""The adapter op: a frozen linear plus ``scaling * B diag(E) A``, as one autograd node.

Legend: M tokens (all leading dimensions of x together), K in, N out, R rank.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adalora_fast.ops.dispatch import backend, launch
from adalora_fast.ops.dispatch.library import (
    autocast_is_on,
    define,
    define_gradient,
    no_second_order,
    refuse_second_order,
    without_autocast,
)
from adalora_fast.ops.dispatch.native import cpu_refusal
from adalora_fast.ops.dispatch.transforms import is_transformed

from . import native, plain, reference
from .adapter import Adapter
from .checks import PRECISIONS, check, check_base, check_result
from .dropout import draw_seed

__all__ = ["PRECISIONS", "adalora_delta_", "adalora_linear"]

backend.register("adapter", "reference", reference)
backend.register("adapter", "cpu", native, cpu_refusal)
backend.register("adapter", "triton", launch.LazyModule("adalora_fast.ops.adapter.triton"), launch.refusal)


@cache
def _within_limits(functions: object, rank: int, dtype: torch.dtype) -> object:
    """``functions``, or the reference for an adapter that they do not compute, which is said once."""
    if rank == 0:  # without a triplet there is the base alone
        return reference
    reason = functions.limit(rank, dtype)
    if reason is None:
        return functions
    warnings.warn(f"an adapter runs in plain PyTorch instead of its Triton kernels: {reason}", stacklevel=2)
    return reference


def _functions(x: Tensor, lora_A: Tensor, dtype: torch.dtype) -> object:
    """What computes an adapter with low-rank products of type ``dtype`` and an output like ``x``."""
    # A rank is fixed where it is traced: it decides the layout of what is kept for the backward.
    widest = torch.float64 if x.dtype == torch.float64 else dtype
    return _within_limits(backend.kernel("adapter", x.device.type), int(lora_A.shape[0]), widest)


@torch.compiler.assume_constant_result
def _drops_inside(device_type: str) -> bool:
    """Whether dropout is the kernels' business; PyTorch's own draws the random numbers that PEFT draws."""
    return backend.kernel("adapter", device_type).DROPS_INSIDE


def _fake_saved(x: Tensor, y: Tensor, lora_A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h, S = _functions(y, lora_A, dtype).saved_shapes(x.numel() // x.shape[-1], lora_A)
    return x.new_empty(h, dtype=dtype), lora_A.new_empty(S, dtype=dtype)


def _fake_linear(x, adapter_input, weight, bias, *flat):
    y, adapter = x.new_empty(*x.shape[:-1], weight.shape[0]), Adapter(*flat)
    return y, *_fake_saved(x, x, adapter.lora_A, adapter.product_dtype(x.dtype))


@define(
    "adapter_linear(Tensor x, Tensor? adapter_input, Tensor weight, Tensor? bias, Tensor lora_A, Tensor "
    "lora_E, Tensor lora_B, float scaling, bool highest, Tensor? seed=None, float dropout_p=0.0) -> "
    "(Tensor, Tensor, Tensor)",
    fake=_fake_linear,
)
def _linear(x, adapter_input, weight, bias, *flat):
    adapter = Adapter(*flat)
    with without_autocast(x.device.type):
        functions = _functions(x, adapter.lora_A, adapter.product_dtype(x.dtype))
        return functions.linear(x, adapter_input, weight, bias, adapter)


def _fake_delta(result, x, *flat):
    adapter = Adapter(*flat)
    saved = _fake_saved(x, result, adapter.lora_A, adapter.product_dtype(result.dtype))
    return result.new_empty(result.shape), *saved


@define(
    "adapter_delta(Tensor result, Tensor x, Tensor lora_A, Tensor lora_E, Tensor lora_B, float scaling, "
    "bool highest, Tensor? seed=None, float dropout_p=0.0) -> (Tensor, Tensor, Tensor)",
    fake=_fake_delta,
)
def _delta(result, x, *flat):
    adapter = Adapter(*flat)
    with without_autocast(x.device.type):
        functions = _functions(result, adapter.lora_A, adapter.product_dtype(result.dtype))
        return functions.delta(result, x, adapter)


@define(
    "adapter_delta_(Tensor(a!) result, Tensor x, Tensor lora_A, Tensor lora_E, Tensor lora_B, float scaling, "
    "bool highest, Tensor? seed=None, float dropout_p=0.0) -> ()",
    fake=lambda *arguments: None,
)
def _delta_in_place(result, x, *flat):
    adapter = Adapter(*flat)
    with without_autocast(x.device.type):
        functions = _functions(result, adapter.lora_A, adapter.product_dtype(result.dtype))
        functions.delta_(result, x, adapter)


def _fake_backward(
    grad, adapter_input, h, S, weight, lora_A, lora_E, lora_B, scaling, shared_input, need_x, need_input,
    need_A, need_E, need_B, seed=None, dropout_p=0.0,
):  # fmt: skip
    def like(needed: bool, source: Tensor) -> Tensor:
        return source.new_empty(source.shape) if needed else grad.new_empty(0)

    return (
        like(need_x, adapter_input),
        like(need_input, adapter_input),
        like(need_A, lora_A),
        like(need_E, lora_E),
        like(need_B, lora_B),
    )


@define(
    "adapter_backward(Tensor grad, Tensor adapter_input, Tensor h, Tensor S, Tensor? weight, Tensor "
    "lora_A, Tensor lora_E, Tensor lora_B, float scaling, bool shared_input, bool need_x, bool need_input, "
    "bool need_A, bool need_E, bool need_B, Tensor? seed=None, float dropout_p=0.0) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(
    grad, adapter_input, h, S, weight, lora_A, lora_E, lora_B, scaling, shared_input, need_x, need_input,
    need_A, need_E, need_B, seed=None, dropout_p=0.0,
):  # fmt: skip
    # h tells in which type the products were taken.
    adapter = Adapter(lora_A, lora_E, lora_B, scaling, h.dtype == lora_A.dtype, seed, dropout_p)
    needs = [need_x, need_input, need_A, need_E, need_B]
    with without_autocast(grad.device.type):
        functions = _functions(grad, lora_A, h.dtype)
        return functions.backward(grad, adapter_input, h, S, weight, adapter, shared_input, needs)


def _save_linear(ctx, inputs, output) -> None:
    x, adapter_input, weight, _, lora_A, lora_E, lora_B, scaling, _, seed, dropout_p = inputs
    _, h, S = output
    ctx.shared_input = adapter_input is None
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    source = x if ctx.shared_input else adapter_input
    ctx.save_for_backward(source, h, S, weight, lora_A, lora_E, lora_B, seed)


def _needed(ctx, *grads):
    """The gradients of the inputs that want one, None for the others."""
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad))


def _linear_gradient(ctx, grad, run):
    if grad is None:
        return (None,) * 11
    adapter_input, h, S, weight, lora_A, lora_E, lora_B, seed = ctx.saved_tensors
    need_x, need_input, _, _, need_A, need_E, need_B, *_ = ctx.needs_input_grad
    dx, d_input, dA, dE, dB = run(
        grad, adapter_input, h, S, weight, lora_A, lora_E, lora_B, ctx.scaling, ctx.shared_input,
        need_x, need_input, need_A, need_E, need_B, seed, ctx.dropout_p,
    )  # fmt: skip
    return _needed(ctx, dx, d_input, None, None, dA, dE, dB, *(None,) * 4)


def _save_delta(ctx, inputs, output) -> None:
    _, x, lora_A, lora_E, lora_B, scaling, _, seed, dropout_p = inputs
    _, h, S = output
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    ctx.save_for_backward(x, h, S, lora_A, lora_E, lora_B, seed)


def _delta_gradient(ctx, grad, run):
    if grad is None:
        return (None,) * 9
    x, h, S, lora_A, lora_E, lora_B, seed = ctx.saved_tensors
    _, need_x, need_A, need_E, need_B, *_ = ctx.needs_input_grad
    _, dx, dA, dE, dB = run(
        grad, x, h, S, None, lora_A, lora_E, lora_B, ctx.scaling, False, False, need_x, need_A, need_E,
        need_B, seed, ctx.dropout_p,
    )  # fmt: skip
    return _needed(ctx, grad, dx, dA, dE, dB, *(None,) * 4)


def _differentiable(name: str, forward, save, gradient):
    """Register the gradient of op ``name`` and return the function that runs it.

    A traced call is the op. An eager call goes around the dispatcher, whose part of a small layer's time is
    large (docs/performance.md): a model makes dozens of calls per step.
    """

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs, output)

    def backward(ctx, grad, *_):
        return gradient(ctx, grad, torch.ops.adalora_fast.adapter_backward)

    define_gradient(name, backward, setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output[0]

        @staticmethod
        def backward(ctx, grad):
            if torch.is_grad_enabled():
                raise no_second_order(name)
            return gradient(ctx, grad, _backward)

    op = getattr(torch.ops.adalora_fast, name)

    def run(*inputs) -> Tensor:
        return op(*inputs)[0] if torch.compiler.is_compiling() else Eager.apply(*inputs)

    return run


_run_linear = _differentiable("adapter_linear", _linear, _save_linear, _linear_gradient)
_run_delta = _differentiable("adapter_delta", _delta, _save_delta, _delta_gradient)
refuse_second_order("adapter_backward")


def adalora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
    precision: str = "default",
) -> Tensor:
    """``y = x Wᵀ + b + scaling · (dropout(x) Aᵀ ⊙ Eᵀ) Bᵀ``, AdaLoRA's eq. 1 (arXiv 2303.10512) with PEFT's
    scale.

    W and b are normally frozen; where one of them requires a gradient, it gets it (the base then runs as its
    own node).

    Args:
        x: input [..., K], floating point; under autocast it is cast as ``F.linear`` would cast it.
        weight: [N, K], any strides (``conv1d.weight.t()`` for GPT-2's Conv1D), x's type.
        bias: [N] or None.
        lora_A, lora_E, lora_B: Q [R, K], Λ [R, 1], P [N, R]; R = 0 is allowed; usually float32.
        scaling: α / (ranknum + 1e-5).
        dropout_p: drop probability of the adapter's input, applied where ``training``. On a GPU it is rounded
            to a multiple of 1/65536, and a seed drawn from the device's generator decides what is dropped.
        training: whether dropout is on.
        precision: ``"default"`` rounds the factors to x's type and accumulates in float32 (float64 for
            float64); ``"highest"`` computes the adapter in the factors' type, as PEFT does.

    Returns:
        [..., N] in x's type (autocast's type under autocast).

    Raises:
        ValueError, TypeError: shapes, devices or types that do not fit, naming them.
    """
    check_base(weight, bias, lora_A)
    base = (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias))
    check(x, base, weight.shape[0], lora_A, lora_E, lora_B, dropout_p, precision)
    device_type = x.device.type
    if autocast_is_on(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        types = f"x is {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"{types}; give them one type or use autocast")
    adapter = Adapter(lora_A, lora_E, lora_B, scaling, precision == "highest")
    if is_transformed(x):
        inputs = F.dropout(x, dropout_p, training)
        return plain.delta(F.linear(x, weight, bias), inputs, adapter)
    dropped, seed = _dropout(x, dropout_p) if training and dropout_p > 0.0 else (None, None)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        inputs = x if dropped is None else dropped
        result = F.linear(x, weight, bias)
        return _run_delta(result, inputs, *adapter._replace(seed=seed, dropout_p=dropout_p))
    return _run_linear(x, dropped, weight, bias, *adapter._replace(seed=seed, dropout_p=dropout_p))


def _dropout(x: Tensor, dropout_p: float) -> tuple[Tensor | None, Tensor | None]:
    """(x after dropout, None), or (None, a seed for the kernels)."""
    if _drops_inside(x.device.type):
        return None, draw_seed(x.device)
    return F.dropout(x, dropout_p, True), None


def adalora_delta_(
    result: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
    precision: str = "default",
) -> Tensor:
    """``result + scaling · (dropout(x) Aᵀ ⊙ Eᵀ) Bᵀ``: the adapter on top of any base layer's output.

    Use the returned tensor: ``result`` itself is overwritten only where that is safe (no gradient is
    recorded, and it is a contiguous tensor that is not a view), because some bases return tensors that must
    not be written.

    Args:
        result: the base layer's output [..., N].
        x: the base layer's input [..., K]; its type may differ from ``result``'s.
        lora_A, lora_E, lora_B, scaling, dropout_p, training, precision: as in :func:`adalora_linear`.

    Returns:
        [..., N] in ``result``'s type.

    Raises:
        ValueError, TypeError: shapes, devices or types that do not fit, naming them.
    """
    check_result(result, x)
    check(x, (("result", result),), result.size(-1), lora_A, lora_E, lora_B, dropout_p, precision)
    adapter = Adapter(lora_A, lora_E, lora_B, scaling, precision == "highest")
    if is_transformed(x):
        return plain.delta(result, F.dropout(x, dropout_p, training), adapter)
    dropped, seed = _dropout(x, dropout_p) if training and dropout_p > 0.0 else (None, None)
    inputs = x if dropped is None else dropped
    arguments = (result, inputs, *adapter._replace(seed=seed, dropout_p=dropout_p))
    if _may_write(result, x):
        torch.ops.adalora_fast.adapter_delta_(*arguments)
        return result
    return _run_delta(*arguments)


def _may_write(result: Tensor, x: Tensor) -> bool:
    """Whether ``result`` can be overwritten unnoticed: no gradient is recorded, and nothing else reads its
    memory.

    Tensors made in inference mode do not tell whether they are views; that they own all of their memory
    stands in.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or result._is_view():
        return False
    storage = result.untyped_storage()
    owner = result.is_contiguous() and storage.nbytes() == result.nbytes
    return owner and storage.data_ptr() != x.untyped_storage().data_ptr()
