"""The frozen layer alone, the adapter as plain PyTorch operations, and ours."""

import torch.nn.functional as F
from torch import Tensor

from adalora_fast.ops import adalora_linear
from benchmarks.peers.layer import Layer, Peer


def frozen(layer: Layer) -> Peer:
    """The base without any adapter: the floor of every other."""
    return Peer(lambda x: F.linear(x, layer.weight, layer.bias), form="frozen")


def plain(layer: Layer) -> Peer:
    """The formula in x's type, differentiated by autograd."""

    def run(x: Tensor) -> Tensor:
        A, E, B = (factor.to(x.dtype) for factor in layer.factors)
        inputs = F.dropout(x, layer.dropout_p) if layer.dropout_p else x
        return F.linear(x, layer.weight, layer.bias) + (inputs @ A.t() * E[:, 0]) @ B.t() * layer.scaling

    return Peer(run, layer.factors)


def ours(layer: Layer) -> Peer:
    def run(x: Tensor) -> Tensor:
        base = layer.weight, layer.bias
        return adalora_linear(x, *base, *layer.factors, layer.scaling, layer.dropout_p, training=True)

    return Peer(run, layer.factors)
