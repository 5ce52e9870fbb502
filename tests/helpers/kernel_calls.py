"""The adapter's kernels without the op around them."""

from adalora_fast.ops.adapter import triton as kernels
from adalora_fast.ops.adapter.adapter import Adapter


def forward(case, seed=None, dropout_p=0.0, adapter_input=None):
    """(y, h, S)."""
    adapter = Adapter(*case.factors, case.scaling, False, seed, dropout_p)
    return kernels.linear(case.x, adapter_input, case.weight, case.bias, adapter)


def backward(case, grad, h, S, needs=(True, False, True, True, True), shared=True, seed=None, dropout_p=0.0):
    """(dx, dx', dA, dE, dB)."""
    adapter = Adapter(*case.factors, case.scaling, False, seed, dropout_p)
    return kernels.backward(grad, case.x, h, S, case.weight, adapter, shared, list(needs))
