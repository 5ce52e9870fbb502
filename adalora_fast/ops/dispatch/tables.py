"""Tables of integers on the device, made without waiting for it, for kernels over a whole model.

Such a kernel finds its tensors through a table of their addresses. A table is kept by its values, so that an
address that changed (a new gradient, a model that was moved, another optimizer) asks for another table and
one that did not for the same: nothing can be out of date, and in a steady state nothing is copied. A copy
goes from pinned memory and does not wait.

While a CUDA graph is captured nothing can be copied: the table must be there already, from a step that ran
before with the same tensors. The graph reads it at every replay, so it is kept from then on.
"""

import warnings
from functools import cache, lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as `entries.load_entries` reads them


Place = tuple[torch.device, int]  # a device and one of its streams: a table is ready for that stream alone


GRAPH = -1  # stands for the stream of a capture, so that what was cached for its warm-up is looked up anew

_made: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()
_in_graphs: dict[tuple, Tensor] = {}


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def place_on(device: torch.device) -> Place:
    """The device and its current stream."""
    if is_capturing(device):
        return device, GRAPH
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def table(values: tuple[int, ...], dtype: torch.dtype, place: Place) -> Tensor:
    """``values`` as a one-dimensional tensor, ready for what the place's stream runs next.

    Raises:
        RuntimeError: a CUDA graph is being captured and the table was not made before.
    """
    device, stream = place
    key = (values, dtype, device)
    if stream == GRAPH:
        if key not in _made:
            raise RuntimeError(
                "the CUDA graph would need a table of addresses that no step before the capture has made; "
                "run the same step a few times before it, with gradients that keep their places "
                "(zero_grad(set_to_none=False))"
            )
        return _in_graphs.setdefault(key, _made[key])
    on_host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    _made[key] = made = on_host.to(device, non_blocking=True)
    return made


def is_aligned(addresses: tuple[int, ...]) -> bool:
    """Whether 16 bytes can be read at once from every address."""
    return not any(address % 16 for address in addresses)


@cache
def say_once(op: str, reason: str) -> None:
    """Warn that ``op`` runs in plain PyTorch although its kernels were chosen."""
    warnings.warn(
        f"{op} runs in plain PyTorch, not in its Triton kernels: {reason}", UserWarning, stacklevel=2
    )
