"""Adapter: what a layer adds to its base, as the op's implementations take it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """``c (dropout(x) Aᵀ ⊙ Eᵀ) Bᵀ``, in the order of the op's schema.

    Attributes:
        lora_A, lora_E, lora_B: Q [R, K], Λ [R, 1], P [N, R].
        scaling: c.
        highest: compute in the factors' type; otherwise they are rounded to the output's.
        seed: of the dropout that the kernels do (dropout.py); None: there is none, or the caller did it.
        dropout_p: drop probability of that dropout.
    """

    lora_A: Tensor
    lora_E: Tensor
    lora_B: Tensor
    scaling: float
    highest: bool = False
    seed: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    def product_dtype(self, output: torch.dtype) -> torch.dtype:
        """In which type the low-rank products are taken, for an output of this type."""
        return self.lora_A.dtype if self.highest else output
