"""The adapter's kernels against the float64 truth: every way, type and shape, any layout, only what is needed."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.ops import adalora_linear
from adalora_fast.ops.adapter import plans
from adalora_fast.ops.adapter import triton as kernels
from adalora_fast.ops.adapter.plans import OuterPlan, Tile
from tests.ops.kernel_cases import (
    DEVICE,
    DTYPES,
    FACTORS,
    HALF,
    ON_DEVICE,
    SMALL,
    TRAINED,
    WAYS,
    assert_same,
    counted,
    exact_case,
    exact_grad,
    launched,
    plan_of,
    planned,
    poisoned,
    random_case,
    run,
    tile_for,
    triton_backend,
)
from tests.ops.naive import draw_grad, formula, leaves, onto_linear, results, truth
from tests.tolerances import RelativeRule

pytestmark = ON_DEVICE

SHAPES = [  # M, K, N, r
    (1, 1, 1, 1),
    (1, 40, 63, 3),
    (1, 96, 40, 33),
    (63, 1, 40, 8),
    (63, 63, 1, 12),
    (63, 40, 63, 1),
    (63, 96, 33, 33),
    (63, 33, 96, 128),
    (1000, 40, 63, 3),
    (1000, 65, 40, 16),
]


@pytest.fixture(autouse=True)
def kernels_write_all_they_return():
    with triton_backend(), poisoned():
        yield


def check(
    rows: int, inner: int, out: int, r: int, *, dtype: torch.dtype, way: str, precision="default",
    factor_dtype=torch.float32, bias=True, function=adalora_linear,
) -> None:  # fmt: skip
    """Forward and all gradients by the relative rule, over several draws where a result has few numbers."""
    rule = RelativeRule(dtype)
    product_dtype = factor_dtype if precision == "highest" else dtype
    for seed in range(4 if min(rows, out, r) == 1 and r < 100 else 1):
        case = random_case(
            (rows, inner), out, r, dtype=dtype, factor_dtype=factor_dtype, bias=bias, seed=seed
        )
        grad = draw_grad(case, seed).to(DEVICE)
        exact = truth(case, grad)
        naive = leaves(case)
        plain = results(formula(*naive, product_dtype=product_dtype), naive, grad)
        with planned(way, tile_for(rows)):
            got = run(function, case, grad, precision=precision)
        for name in exact:
            rule.add(name, got[name], plain[name], exact[name])
    rule.check()


def test_memory_without_a_value_is_nan_here():
    x = torch.ones(3, device=DEVICE)
    for empty in (torch.empty(3, device=DEVICE), x.new_empty(3), torch.empty_like(x), x.half().new_empty(2)):
        assert empty.isnan().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_in_half_precision(shape, way, dtype):
    """Biases and the factors' types alternate over the shapes."""
    odd = SHAPES.index(shape) % 2
    check(*shape, dtype=dtype, way=way, bias=not odd, factor_dtype=dtype if odd else torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_in_float32(shape):
    check(*shape, dtype=torch.float32, way="library", bias=SHAPES.index(shape) % 2 == 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:8:3], ids=str)
def test_highest_with_a_half_base(shape, dtype):
    check(*shape, dtype=dtype, way="library", precision="highest")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor_dtype", [torch.float32, None], ids=["float32 factors", "same type"])
def test_bias_and_factor_types(factor_dtype, bias, way, dtype):
    check(63, 40, 63, 8, dtype=dtype, way=way, bias=bias, factor_dtype=factor_dtype or dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["default", "highest"])
def test_on_top_of_a_linear_layer(precision, dtype):
    check(63, 40, 63, 12, dtype=dtype, way="library", precision=precision, function=onto_linear)


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape(way, data):
    size = st.integers(1, 70)
    rows, inner, out, r = data.draw(size), data.draw(size), data.draw(size), data.draw(st.integers(1, 40))
    case = exact_case(rows, inner, out, r, bias=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))
    grad = exact_grad(case)
    tile = data.draw(st.sampled_from([SMALL, Tile(32, 16, 32, 4, 1), Tile(64, 128, 16, 4, 1)]))
    with planned(way, tile, parts=data.draw(st.integers(1, 5))):
        assert_same(run(adalora_linear, case, grad), truth(case, grad))


@pytest.mark.parametrize("way", WAYS)
def test_without_a_triplet(way):
    """The op leaves rank 0 to plain PyTorch; the kernels give the base all the same."""
    case = exact_case(r=0)
    grad = exact_grad(case)
    exact = truth(case, grad)
    assert_same(run(adalora_linear, case, grad), exact)
    with planned(way):
        y, h, S = forward(case)
        dx, _, dA, dE, dB = backward(case, grad, h, S)
    assert_same({"y": y, "x": dx}, {name: exact[name] for name in ("y", "x")})
    assert dA.shape == (0, 40) and dE.shape == (0, 1) and dB.shape == (63, 0)


def forward(case, seed=None, dropout_p=0.0, adapter_input=None):
    """The kernels' forward without the op around it: (y, h, S)."""
    return kernels.linear(
        case.x, adapter_input, case.weight, case.bias, *case.factors, case.scaling, False, seed, dropout_p
    )


def backward(case, grad, h, S, needs=(True, False, True, True, True), shared=True, seed=None, dropout_p=0.0):
    """The kernels' backward without the op around it: (dx, dx', dA, dE, dB)."""
    return kernels.backward(
        grad, case.x, h, S, case.weight, *case.factors, case.scaling, shared, seed, dropout_p, list(needs)
    )
