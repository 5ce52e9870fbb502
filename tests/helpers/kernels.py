"""Shared by tests of all kernels: poisoned memory, counted launches."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from adalora_fast.ops.dispatch import launch

# The interpreter of Triton runs kernels on CPU tensors; where there is a GPU, kernels are compiled for it.
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ON_DEVICE = [pytest.mark.gpu] if HAS_GPU else []  # every kernel test is a GPU test where there is one
needs_triton = pytest.mark.skipif(
    launch.refusal("cuda") is not None and not launch.is_interpreted(),
    reason="neither a GPU nor Triton's interpreter (TRITON_INTERPRET=1) is here",
)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the context memory that is allocated without a value holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@contextlib.contextmanager
def counted():
    """The names of the kernels that are launched within the context, which run all the same."""
    names = []

    def observer(kernel, grid, arguments, meta):
        names.append(getattr(kernel, "fn", kernel).__name__)
        kernel[grid](*arguments, **meta)

    with launch.observed(observer):
        yield names
