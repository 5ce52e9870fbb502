"""The four ops of AdaLoRA as ``torch.library`` operators: adapter, importance, orthogonality, allocation."""

from .adapter import adalora_delta_, adalora_linear
from .allocation import allocate_, apply_mask_, select_triplets
from .importance import ScoreRule, importance_scores, importance_update_
from .orthogonality import orthogonality

__all__ = [
    "ScoreRule",
    "adalora_delta_",
    "adalora_linear",
    "allocate_",
    "apply_mask_",
    "importance_scores",
    "importance_update_",
    "orthogonality",
    "select_triplets",
]
