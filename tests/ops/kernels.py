"""Shared by tests of the bookkeeping kernels: poisoned memory, counted launches."""

import contextlib

import pytest
import torch

from adalora_fast.ops import launch

# The interpreter of Triton runs kernels on CPU tensors; where there is a GPU, kernels are compiled for it.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    launch.refusal("cuda") is not None and not launch.is_interpreted(),
    reason="neither a GPU nor Triton's interpreter (TRITON_INTERPRET=1) is here",
)


@contextlib.contextmanager
def poisoned():
    """Within the context new memory is filled with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def counted():
    """The names of the kernels that are launched within the context, which run all the same."""
    names = []

    def observer(kernel, grid, arguments, meta):
        names.append(getattr(kernel, "fn", kernel).__name__)
        kernel[grid](*arguments, **meta)

    with launch.observed(observer):
        yield names
