"""The one place through which every Triton kernel is launched, and the reasons why none can be.

That every launch passes here lets tools see them without a GPU: ``benchmarks/aot.py`` compiles what would be
launched, tests count launches.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import torch

from . import backend

MINIMUM_CAPABILITY = (8, 0)  # bf16 matrix instructions

Observer = Callable[[object, tuple, tuple, dict], None]
_observer: Observer | None = None


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def launch(kernel, grid: tuple[int, ...], *arguments, **meta) -> None:
    """Run ``kernel`` over ``grid`` where its tensors are; ``meta`` holds its constexprs, num_warps and
    num_stages.
    """
    if _observer is not None:
        _observer(kernel, grid, arguments, meta)
    elif _several_gpus():  # Triton launches on the current device
        with torch.cuda.device(next(a.device for a in arguments if isinstance(a, torch.Tensor))):
            kernel[grid](*arguments, **meta)
    else:
        kernel[grid](*arguments, **meta)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the context every launch calls ``observer(kernel, grid, arguments, meta)`` and nothing runs."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


class LazyModule:
    """A module that is imported when one of its functions is first asked for: kernels need Triton, and
    importing the package does not.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


@cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before they are imported)."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _cuda_refusal() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    capability = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, a GPU here has {capability[0]}.{capability[1]}"
    return None


def refusal(device_type: str) -> str | None:
    """Why Triton kernels cannot run on a device type, or None.

    On a CPU they run in the interpreter alone, and only where ``ADALORA_FAST_BACKEND=triton`` asks for it: it
    is there to check kernels and thousands of times slower than PyTorch.
    """
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device_type == "cuda":
        return _cuda_refusal()
    if device_type != "cpu":
        return f"Triton kernels run on cuda, not on {device_type}"
    if not is_interpreted():
        return "Triton runs on a CPU in its interpreter only (TRITON_INTERPRET=1)"
    if backend.wanted() != "triton":
        return f"the interpreter is not for work, only for tests; {backend.VARIABLE}=triton asks for it"
    return None
