"""The orthogonality regulariser of all matrices in plain PyTorch, batched by shape.

With G = P'P'ᵀ - I [r, r] for every factor P' = Q = lora_A [r, in] or P' = Pᵀ = lora_Bᵀ [r, out], and n
matrices::

    fro      R = 1/(2n) Σ ‖G‖_F      dR/dP' = 2 G P' / ‖G‖_F / (2n)     (0 where ‖G‖_F = 0)
    squared  R = Σ ‖G‖²_F            dR/dP' = 4 G P'

``fro`` is what PEFT computes, ``squared`` AdaLoRA's eq. 4 (arXiv 2303.10512). The gradient is a product of
what the value needs anyway, so both come from one pass and no graph over the matrices is kept.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def groups_by_shape(shapes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Positions of equal shapes, in order of first appearance."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(position)
    return tuple(tuple(group) for group in groups.values())


def shapes_of(factors: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """The factors' shapes as plain integers (a traced size is not hashable)."""
    return tuple(tuple(int(size) for size in factor.shape) for factor in factors)


def _inverse(norm: Tensor) -> Tensor:
    """1 / ‖G‖, and 0 at the minimum, where the norm has no gradient."""
    return norm.reciprocal().nan_to_num_(nan=0.0, posinf=0.0)


def loss(
    lora_A: list[Tensor], lora_B: list[Tensor], penalty: str, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """(R, its gradient stacked by shape: lora_A's groups, then lora_B's; empty without ``with_grad``)."""
    accumulate = torch.promote_types(lora_A[0].dtype, torch.float32)
    count = len(lora_A) + len(lora_B)
    identities: dict[int, Tensor] = {}  # by rank
    norms, gradients = [], []
    for factors, transposed in ((lora_A, False), (lora_B, True)):
        for group in groups_by_shape(shapes_of(factors)):
            stacked = torch.stack([factors[i] for i in group]).to(accumulate)  # [n, r, in] or [n, out, r]
            rows = stacked.mT if transposed else stacked  # [n, r, ·]
            rank = rows.shape[1]
            if rank not in identities:
                identities[rank] = torch.eye(rank, dtype=accumulate, device=rows.device)
            G = torch.baddbmm(identities[rank], rows, rows.mT, beta=-1)  # [n, r, r]
            norm = torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True)  # [n, 1, 1]
            norms.append(norm)
            slope = _inverse(norm).mul_(2 / count) if penalty == "fro" else 4.0
            if with_grad:
                gradient = stacked @ (G * slope) if transposed else (G * slope) @ stacked  # G is symmetric
                gradients.append(gradient.to(factors[group[0]].dtype))
    every = torch.cat(norms)
    return every.sum() / count if penalty == "fro" else every.square().sum(), gradients
