"""What this machine can do at best, measured in the same run as everything that is compared with it.

A floor is the larger of two times: the bytes that must move over the bandwidth of a large copy (bytes read
plus bytes written), and the operations that must be done over the rate of a large matrix product in its type.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from adalora_fast.ops.dispatch.timing import graph_seconds

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy, operations per second of a matrix product by type."""

    bandwidth: float
    flops: dict[str, float]

    def floor(self, moved: float, operations: float = 0.0, dtype: torch.dtype = torch.float32) -> float:
        """Seconds that work of this size takes at least."""
        return max(moved / self.bandwidth, operations / self.flops[name_of(dtype)])

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of both, one by one."""
        flops = {name: max(rate, other.flops[name]) for name, rate in self.flops.items()}
        return Ceilings(max(self.bandwidth, other.bandwidth), flops)

    def as_dict(self) -> dict:
        return asdict(self)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs of a GPU; the best of them on a CPU, which has other work as well."""
    if device.type == "cuda":
        return statistics.median(graph_seconds([run], repeats=10))
    run()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(device: torch.device) -> Ceilings:
    """The ceilings of a device, of its CPU at PyTorch's number of threads."""
    cuda = device.type == "cuda"
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    size = 8192 if cuda else 768
    flops = {}
    for dtype in TYPES:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), device)
        flops[name_of(dtype)] = 2 * size**3 / seconds
    return Ceilings(bandwidth, flops)
