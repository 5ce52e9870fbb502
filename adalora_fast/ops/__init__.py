"""The four ops of AdaLoRA as ``torch.library`` operators: adapter, importance, orthogonality, allocation."""

from adalora_fast.ops.adapter import adalora_delta_, adalora_linear
from adalora_fast.ops.allocation import allocate_, apply_mask_, select_triplets
from adalora_fast.ops.importance import importance_scores, importance_update_
from adalora_fast.ops.orthogonality import orthogonality

__all__ = [
    "adalora_delta_",
    "adalora_linear",
    "allocate_",
    "apply_mask_",
    "importance_scores",
    "importance_update_",
    "orthogonality",
    "select_triplets",
]
