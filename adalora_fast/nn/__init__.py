"""Modules: the adapted linear layer and the orthogonality loss of a model made of them."""

from adalora_fast.nn.linear import AdaLoraLinear, Factors
from adalora_fast.nn.orthogonality import (
    adapted_layers,
    nothing_adapted,
    orthogonality_loss,
    orthogonality_of,
)

__all__ = [
    "AdaLoraLinear",
    "Factors",
    "adapted_layers",
    "nothing_adapted",
    "orthogonality_loss",
    "orthogonality_of",
]
