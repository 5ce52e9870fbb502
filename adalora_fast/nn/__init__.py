"""Modules: the adapted linear layer and the orthogonality loss of a model made of them."""

from .linear import AdaLoraLinear, Factors
from .orthogonality import adapted_layers, nothing_adapted, orthogonality_loss, orthogonality_of

__all__ = [
    "AdaLoraLinear",
    "Factors",
    "adapted_layers",
    "nothing_adapted",
    "orthogonality_loss",
    "orthogonality_of",
]
