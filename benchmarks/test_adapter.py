"""One adapted layer, forward and forward with backward, against its peers in the same run.

    pytest benchmarks/test_adapter.py     (a CPU: one shape, float32; a GPU: every shape, type and rank)

On a GPU the time that counts is ``extra_info["seconds"]``: replays of a CUDA graph with inputs that the cache
does not hold; pytest-benchmark's own clock sees the host alone. Every peer passes the gate, the formula in
float64, before it is timed.
"""

import functools
import gc
import statistics

import pytest
import torch
from torch import Tensor

from adalora_fast.ops.adapter.costs import Problem, factor_launches, launches
from adalora_fast.ops.timing import graph_seconds, input_sets
from benchmarks import peers, roofline

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROWS = 4096 if CUDA else 256
SHAPES = [(768, 768), (768, 3072), (3072, 768), (3072, 3072), (4096, 4096)] if CUDA else [(768, 768)]
TYPES = [torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float32]
RANKS = [8, 16, 64] if CUDA else [16]
DROPOUTS = [0.0, 0.1] if CUDA else [0.0]
GATE = {torch.float32: 2e-3 if CUDA else 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@pytest.fixture(scope="session")
def ceilings() -> roofline.Ceilings:
    """What this device can do at best, measured in this run."""
    return roofline.measure(DEVICE)


@pytest.fixture(autouse=True)
def clean():
    """One thread on a CPU, where ratios are steadier so; a GPU's memory is given back after each test."""
    before = torch.get_num_threads()
    if not CUDA:
        torch.set_num_threads(1)
    torch.compiler.reset()  # else PEFT's forward meets the compiler's limit of variants and runs eagerly
    yield
    torch.set_num_threads(before)
    gc.collect()
    torch.cuda.empty_cache()


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def gate(name: str, layer: peers.Layer, x: Tensor, dy: Tensor) -> None:
    """Fail unless the peer computes the formula."""
    module = peers.PEERS[name](layer)
    inputs = [x, *peers.parameters_of(name, layer, module)]
    y = module(x)
    found = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    for what, actual, truth in zip(("y", "dx", "dA", "dE", "dB"), found, peers.truth(layer, x, dy)):
        error = relative_error(actual, truth)
        assert error <= GATE[x.dtype], f"{name}: relative error of {what} is {error:.2g}"


def floor(inner: int, outer: int, rank: int, size: int, backward: bool) -> tuple[float, float]:
    """Bytes that the frozen layer and a fused adapter must move, and operations that they must do."""
    padded = max(16, 1 << (rank - 1).bit_length())
    sizes = {"rows": ROWS, "rank": padded, "size": size, "product_size": size}
    forward = Problem(backward=False, inner=inner, outer=outer, **sizes)
    back = Problem(backward=True, inner=outer, outer=inner, **sizes)
    made = launches(forward, "inline", outer)
    if backward:
        made += launches(back, "inline", inner) + factor_launches(back, 1)
    return sum(one.bytes for one in made), sum(one.flops for one in made)


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_adapter(benchmark, ceilings, shape, dtype, rank, dropout_p, backward, name):
    if dropout_p and name in peers.NO_DROPOUT:
        pytest.skip(f"{name} has no dropout")
    if name == "peft compiled" and not CUDA:
        pytest.skip("compiling for a CPU takes a C++ compiler and minutes; measured where CUDA is")
    inner, outer = shape
    size = dtype.itemsize
    sets = input_sets(size * (ROWS * (inner + outer) + inner * outer)) if CUDA else 1
    torch.manual_seed(0)
    if name != "frozen":
        x = torch.randn(ROWS, inner, device=DEVICE).to(dtype).requires_grad_()
        dy = torch.randn(ROWS, outer, device=DEVICE).to(dtype)
        gate(name, peers.Layer.draw(inner, outer, rank, dtype, DEVICE), x, dy)

    layers = [peers.Layer.draw(inner, outer, rank, dtype, DEVICE, dropout_p) for _ in range(sets)]
    modules = [peers.PEERS[name](layer) for layer in layers]
    xs = [torch.randn(ROWS, inner, device=DEVICE).to(dtype).requires_grad_(backward) for _ in range(sets)]
    dys = [torch.randn(ROWS, outer, device=DEVICE).to(dtype) for _ in range(sets)]

    def work(i: int) -> object:
        if not backward:
            with torch.no_grad():
                return modules[i](xs[i])
        inputs = [xs[i], *peers.parameters_of(name, layers[i], modules[i])]
        return torch.autograd.grad(modules[i](xs[i]), inputs, dys[i])

    moved, work_done = floor(inner, outer, rank, size, backward)
    benchmark.extra_info.update(
        peer=name, device=str(DEVICE), rows=ROWS, inner=inner, outer=outer, rank=rank, dropout=dropout_p,
        dtype=str(dtype).removeprefix("torch."), what="step" if backward else "forward", floor_bytes=moved,
    )  # fmt: skip
    if not CUDA:
        benchmark(work, 0)
        return
    seconds = graph_seconds([functools.partial(work, i) for i in range(sets)])
    median = statistics.median(seconds)
    cuts = statistics.quantiles(seconds, n=5)
    benchmark.extra_info.update(
        seconds=median, p20=cuts[0], p80=cuts[3], gb_per_s=moved / median / 1e9,
        bandwidth=ceilings.bandwidth, achieved_over_floor=ceilings.floor(moved, work_done, dtype) / median,
    )  # fmt: skip
    benchmark.pedantic(lambda: (work(0), torch.cuda.synchronize()), rounds=5, iterations=1)
