"""What the tests of the adapter's kernels share: where they run, tiles, inputs, and what a call launches."""

import contextlib
import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from adalora_fast import AdaLoraLinear
from adalora_fast.ops.adapter import plans
from adalora_fast.ops.adapter.plans import OuterPlan, Plan, Tile
from adalora_fast.ops.dispatch import backend, launch
from tests.helpers.kernels import HAS_GPU
from tests.helpers.kernels import ON_DEVICE as ON_DEVICE  # the adapter's tests take it from here
from tests.helpers.naive import NAMES, Case, leaves, make_case, results

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device; there is none")]
NO_BFLOAT16 = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter computes bfloat16 products wrongly"),
]
BFLOAT16 = pytest.param(torch.bfloat16, marks=NO_BFLOAT16)
HALF = (torch.float16, BFLOAT16)
DTYPES = (torch.float32, *HALF)

WAYS = ("inline", "epilogue", "library")
WAYS_AND_DTYPES = [  # float32 leaves the base to the library
    pytest.param("library", torch.float32, id="library float32"),
    *(pytest.param(way, torch.float16, id=f"{way} float16") for way in WAYS),
    *(pytest.param(way, torch.bfloat16, id=f"{way} bfloat16", marks=NO_BFLOAT16) for way in WAYS),
]
SMALL = Tile(16, 32, 16, 4, 1)  # several tiles in every direction of a small problem
MEDIUM, LARGE = Tile(32, 64, 32, 4, 1), Tile(128, 64, 32, 4, 1)  # fewer programs: each takes its time
FACTORS = ("lora_A", "lora_E", "lora_B")
TRAINED = ("x", *FACTORS)


def plan_of(way: str, tile: Tile = SMALL) -> Plan:
    """All kernels of a way with one tile."""
    return Plan(way=way, matmul=tile, project=tile, update=tile)


@contextlib.contextmanager
def planned(way: str, tile: Tile = SMALL, parts: int = 3) -> Iterator[None]:
    """Within the context every launch has ``tile``, by ``way`` where it can compute the problem."""
    outer = OuterPlan(tile=tile, parts=parts)
    with plans.forced(plan_of(way, tile)), patch.object(plans, "choose_outer", lambda *arguments: outer):
        yield


def tile_for(rows: int) -> Tile:
    return Tile(64, 64, 32, 4, 1) if rows < 200 else LARGE


def on_device(case: Case) -> Case:
    return Case(*(v.to(DEVICE) if isinstance(v, Tensor) else v for v in case))


def random_case(*arguments, **options) -> Case:
    """``make_case`` on the device of the kernels."""
    return on_device(make_case(*arguments, **options))


def exact_case(
    rows: int = 63,
    inner: int = 40,
    out: int = 63,
    r: int = 8,
    *,
    dtype: torch.dtype = torch.float16,
    factor_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """Small integers: every product, sum and rounding is exact, so that results are equal to the last bit
    whatever the order of the sums.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, to: torch.dtype) -> Tensor:
        return torch.randint(-1, 2, size, generator=generator).to(to).to(DEVICE)

    E = draw(r, 1, to=factor_dtype)
    E += E * (torch.arange(r, device=DEVICE)[:, None] % 2)  # one and two, of both signs, and zero
    return Case(
        x=draw(rows, inner, to=dtype),
        weight=draw(out, inner, to=dtype),
        bias=draw(out, to=dtype) if bias else None,
        lora_A=draw(r, inner, to=factor_dtype),
        lora_E=E,
        lora_B=draw(out, r, to=factor_dtype),
        scaling=0.5,
    )


def exact_grad(case: Case, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (*case.x.shape[:-1], case.weight.shape[0])
    return torch.randint(-1, 2, shape, generator=generator).to(case.x.dtype).to(DEVICE)


def grad_like(y: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device)


def run(
    function, case: Case, grad: Tensor, needed: tuple[str, ...] = TRAINED, **options
) -> dict[str, Tensor]:
    """y and the gradients of ``needed`` of one forward and backward of a public function."""
    ours = leaves(case, frozen=tuple(set(NAMES) - set(needed)))
    return results(function(*ours, **options), ours, grad)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same names with the same values; ``want`` may be of a wider type."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        expected = want[name].to(value.dtype)
        assert value.shape == expected.shape, f"{name} is {tuple(value.shape)}, not {tuple(expected.shape)}"
        different = (value != expected).sum().item()
        assert torch.equal(value, expected), f"{name}: {different} of {value.numel()} values differ"


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """Within the context launches are named in the list and not run."""
    names: list[str] = []
    with launch.observed(lambda kernel, *rest: names.append(kernel.__name__)):
        yield names


def clear_choices() -> None:
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


@contextlib.contextmanager
def triton_backend() -> Iterator[None]:
    """Within the context the adapter runs in its Triton kernels."""
    with patch.dict(os.environ, {backend.VARIABLE: "triton"}):
        clear_choices()
        try:
            yield
        finally:
            clear_choices()


def small_case(**options):
    return exact_case(20, 24, 17, 3, **options)


def make_layer(dropout: float = 0.0, **options) -> AdaLoraLinear:
    torch.manual_seed(0)
    layer = AdaLoraLinear(24, 24, 3, dropout=dropout, device=DEVICE, **options)
    torch.nn.init.normal_(layer.lora_E)
    return layer
