"""The allocation op: which triplets of a whole model are kept under a budget, and zeroing the others' λ."""

import torch
from torch import Tensor

from adalora_fast.ops.dispatch import backend, launch
from adalora_fast.ops.dispatch.library import NO_CUDA_GRAPH, define
from adalora_fast.ops.dispatch.native import cpu_refusal, cuda_refusal

from . import native, reference

backend.register("allocation", "reference", reference)
backend.register("allocation", "cpu", native, cpu_refusal)
backend.register("allocation", "cuda", native, cuda_refusal)
backend.register("allocation", "triton", launch.LazyModule(f"{__name__}.triton"), launch.refusal)


@define(
    "allocation_select(Tensor scores, Tensor budget) -> Tensor",
    fake=lambda scores, budget: scores.new_empty(scores.shape, dtype=torch.bool),
    tags=NO_CUDA_GRAPH,
)
def _select(scores, budget):
    return backend.kernel("allocation", scores.device.type).select(scores, budget)


@define(
    "allocation_apply_mask_(Tensor mask, Tensor(a!)[] lora_E) -> ()",
    fake=lambda mask, lora_E: None,
    tags=NO_CUDA_GRAPH,
)
def _apply_mask(mask, lora_E):
    backend.kernel("allocation", mask.device.type).apply_mask_(mask, lora_E)


@define(
    "allocation_allocate_(Tensor scores, Tensor budget, Tensor(a!)[] lora_E) -> Tensor",
    fake=lambda scores, budget, lora_E: scores.new_empty(scores.shape, dtype=torch.bool),
    tags=NO_CUDA_GRAPH,
)
def _allocate(scores, budget, lora_E):
    functions = backend.kernel("allocation", scores.device.type)
    if hasattr(functions, "allocate_"):  # an implementation may do both at once
        return functions.allocate_(scores, budget, lora_E)
    mask = functions.select(scores, budget)
    functions.apply_mask_(mask, lora_E)
    return mask


def select_triplets(scores: Tensor, budget: Tensor) -> Tensor:
    """Keep exactly ``budget`` triplets: the highest scores, ties to the lower position (lower matrix, then
    triplet).

    Args:
        scores: [T] floating point; NaN counts as the lowest.
        budget: integer scalar tensor on the same device; 0 keeps none, T or more keeps all.

    Returns:
        [T] bool mask of the kept triplets. Source: the selection of arXiv 2303.10512, eq. 6, made exact on
        ties.
    """
    return torch.ops.adalora_fast.allocation_select(scores, budget)


def apply_mask_(mask: Tensor, lora_E: list[Tensor]) -> None:
    """λ ← λ where ``mask`` else 0 (arXiv 2303.10512, eq. 5), in place.

    Args:
        mask: [T] bool, matrix by matrix.
        lora_E: Λ of every matrix [r, 1]; their ranks sum to T.

    Raises:
        ValueError: the mask has another length.
    """
    _check_length("mask", mask, lora_E)
    torch.ops.adalora_fast.allocation_apply_mask_(mask, lora_E)


def allocate_(scores: Tensor, budget: Tensor, lora_E: list[Tensor]) -> Tensor:
    """:func:`select_triplets`, then :func:`apply_mask_`, as one op.

    Args:
        scores, budget: as in :func:`select_triplets`.
        lora_E: Λ of every matrix [r, 1]; their ranks sum to T.

    Returns:
        [T] bool mask of the kept triplets.

    Raises:
        ValueError: there are more or fewer scores than triplets.
    """
    _check_length("score vector", scores, lora_E)
    return torch.ops.adalora_fast.allocation_allocate_(scores, budget, lora_E)


def _check_length(what: str, given: Tensor, lora_E: list[Tensor]) -> None:
    total = sum(values.shape[0] for values in lora_E)
    if given.shape != (total,):
        raise ValueError(f"the {what} is {tuple(given.shape)}, the matrices have {total} triplets")
