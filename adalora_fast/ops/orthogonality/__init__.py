"""The orthogonality op: value and closed-form gradient of every factor as one autograd node."""

import torch
from torch import Tensor

from adalora_fast.ops.dispatch import backend, launch
from adalora_fast.ops.dispatch.library import (
    NO_CUDA_GRAPH,
    define,
    define_gradient,
    no_second_order,
    without_autocast,
)
from adalora_fast.ops.dispatch.transforms import is_transformed

from . import reference
from .acts import enlist as enlist
from .acts import noted as noted
from .reference import groups_by_shape, shapes_of

PENALTIES = ("fro", "squared")

backend.register("orthogonality", "reference", reference)
backend.register("orthogonality", "triton", launch.LazyModule(f"{__name__}.triton"), launch.refusal)


def _fake(lora_A, lora_B, penalty, with_grad):
    total = lora_A[0].new_empty((), dtype=torch.promote_types(lora_A[0].dtype, torch.float32))
    gradients = [
        factors[group[0]].new_empty(len(group), *factors[group[0]].shape)
        for factors in (lora_A, lora_B)
        for group in groups_by_shape(shapes_of(factors))
    ]
    return total, gradients if with_grad else []


@define(
    "orthogonality(Tensor[] lora_A, Tensor[] lora_B, str penalty, bool with_grad) -> (Tensor, Tensor[])",
    fake=_fake,
    tags=NO_CUDA_GRAPH,
)
def _orthogonality(lora_A, lora_B, penalty, with_grad):
    with without_autocast(lora_A[0].device.type):
        functions = backend.kernel("orthogonality", lora_A[0].device.type)
        return functions.loss(lora_A, lora_B, penalty, with_grad)


def _save(ctx, inputs, output):
    lora_A, lora_B, _, with_grad = inputs
    _, gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.with_grad = with_grad
    ctx.groups = [groups_by_shape(shapes_of(factors)) for factors in (lora_A, lora_B)]
    ctx.save_for_backward(*gradients)


def per_factor(stacks: list[Tensor], groups: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """One tensor per factor, in the factors' order, from the stacks of ``groups``."""
    single: dict[int, Tensor] = {}
    for stack, group in zip(stacks, groups, strict=True):
        single.update(zip(group, stack.unbind(), strict=True))
    return [single[i] for i in range(len(single))]


def _gradient(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise no_second_order("orthogonality")
    if not ctx.with_grad:
        raise RuntimeError(
            "this orthogonality loss was made with with_grad=False and cannot be differentiated"
        )
    stacks = list(ctx.saved_tensors)
    if all(stack.dtype == grad.dtype for stack in stacks):
        stacks = list(torch._foreach_mul(stacks, grad))  # one launch on a GPU
    else:
        stacks = [grad * stack for stack in stacks]
    groups_A, groups_B = ctx.groups
    return (
        per_factor(stacks[: len(groups_A)], groups_A),
        per_factor(stacks[len(groups_A) :], groups_B),
        None,
        None,
    )


define_gradient("orthogonality", _gradient, _save)


def orthogonality(
    lora_A: list[Tensor], lora_B: list[Tensor], penalty: str = "fro"
) -> tuple[Tensor, list[Tensor]]:
    """The regulariser R of n matrices and, while gradients are recorded, its gradient by every factor.

    ``fro``: R = 1/(2n) Σ (‖Q Qᵀ - I‖_F + ‖Pᵀ P - I‖_F), PEFT's form. ``squared``: R = Σ (‖Q Qᵀ - I‖²_F + ‖Pᵀ
    P - I‖²_F), AdaLoRA's eq. 4 (arXiv 2303.10512).

    Args:
        lora_A: Q of every matrix [r, in].
        lora_B: P of every matrix [out, r]; as many as ``lora_A``.
        penalty: ``"fro"`` or ``"squared"``.

    Returns:
        (R, stacks): R a scalar in at least float32, differentiable once; ``stacks`` the gradient of R by the
        factors, stacked by shape as :func:`gradients` reads them (empty while no gradient is recorded).

    Raises:
        ValueError: no matrices, lists of different lengths, an unknown penalty.
    """
    if not lora_A or len(lora_A) != len(lora_B):
        raise ValueError(
            f"need as many lora_A as lora_B and at least one, got {len(lora_A)} and {len(lora_B)}"
        )
    if penalty not in PENALTIES:
        raise ValueError(f"orth_penalty {penalty!r} is not one of {PENALTIES}")
    for A, B in zip(lora_A, lora_B, strict=True):
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} must be (r, in) and (out, r)"
            )
    if is_transformed(lora_A[0]):  # whose derivative PyTorch's own operators know
        return reference.loss(lora_A, lora_B, penalty, False)
    return torch.ops.adalora_fast.orthogonality(lora_A, lora_B, penalty, torch.is_grad_enabled())


def gradients(
    stacks: list[Tensor], lora_A: list[Tensor], lora_B: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """dR/dA and dR/dB of every matrix, as views of the ``stacks`` that :func:`orthogonality` returned."""
    groups_A, groups_B = groups_by_shape(shapes_of(lora_A)), groups_by_shape(shapes_of(lora_B))
    return per_factor(stacks[: len(groups_A)], groups_A), per_factor(stacks[len(groups_A) :], groups_B)
