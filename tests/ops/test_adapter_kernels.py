"""The adapter's kernels against the float64 truth: every way, type, shape and layout."""

import itertools

import pytest
import torch

from adalora_fast.ops import adalora_linear
from adalora_fast.ops.adapter import plans
from adalora_fast.ops.adapter import triton as kernels
from adalora_fast.ops.adapter.plans import OuterPlan, Tile
from adalora_fast.ops.dispatch import launch
from tests.helpers.kernel_calls import backward, forward
from tests.helpers.kernel_cases import (
    DEVICE,
    DTYPES,
    FACTORS,
    HALF,
    MEDIUM,
    ON_DEVICE,
    SMALL,
    WAYS,
    WAYS_AND_DTYPES,
    assert_same,
    exact_case,
    exact_grad,
    launched,
    plan_of,
    planned,
    random_case,
    run,
    tile_for,
    triton_backend,
)
from tests.helpers.kernels import counted, poisoned
from tests.helpers.naive import draw_grad, formula, leaves, onto_linear, results, truth
from tests.helpers.properties import given, settings, st
from tests.helpers.tolerances import RelativeRule

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
    (1000, 33, 24, 16),
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
    few = 3 if min(rows, out, r) == 1 and r < 100 else 1
    for seed in range(8 if r < 4 and dtype == torch.float32 else few):  # dE of rank 3 is three numbers
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
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape(way, data):
    size = st.integers(1, 50)
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


@pytest.mark.parametrize("way", WAYS)
def test_tiles_change_nothing(way):
    """Exact sums: other tiles, parts and rows that share a tile give the same bits."""
    case = exact_case(63, 48, 63, 8)
    grad = exact_grad(case)
    exact = truth(case, grad)
    for tile, parts in (
        (Tile(16, 16, 16, 4, 1), 1),
        (Tile(64, 16, 32, 4, 1), 4),
        (Tile(32, 64, 64, 4, 1), 9),
    ):
        with planned(way, tile, parts):
            assert_same(run(adalora_linear, case, grad), exact)


@pytest.mark.parametrize("way", WAYS)
def test_more_rows_of_tiles_than_share_a_group(way):
    """Tiles are numbered in groups of rows: none may be left out or written twice."""
    case = exact_case(16 * 11 - 3, 16, 33, 2)
    grad = exact_grad(case)
    with planned(way):
        assert_same(run(adalora_linear, case, grad), truth(case, grad))


@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES)
def test_the_same_bits_at_every_run(way, dtype):
    case = random_case((63, 40), 33, 8, dtype=dtype, factor_dtype=torch.float32)
    grad = draw_grad(case).to(DEVICE)
    with planned(way):
        first, second = run(adalora_linear, case, grad), run(adalora_linear, case, grad)
    assert_same(first, second)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_subset_of_gradients(way, shared):
    case = exact_case(20, 17, 19, 3)
    grad = exact_grad(case)
    with planned(way, MEDIUM):
        _, h, S = forward(case)
        full = backward(case, grad, h, S, (True, not shared, True, True, True), shared)
        for needs in itertools.product([False, True], repeat=5):
            if shared and needs[1]:
                continue
            for needed, value, want in zip(needs, backward(case, grad, h, S, needs, shared), full):
                assert torch.equal(value, want) if needed else value.numel() == 0, needs


LAUNCHES = {  # what is needed: the launches of (inline, epilogue, library)
    "nothing": (),
    "x": (["matmul"], ["project", "matmul"], ["project", "update"]),
    "lora_A": (["project", "outer", "reduce"],),
    "lora_E": (["project", "outer", "reduce"],),
    "lora_B": (["outer", "reduce"],),
    "x lora_B": (
        ["matmul", "outer", "reduce"],
        ["project", "matmul", "outer", "reduce"],
        ["project", "update", "outer", "reduce"],
    ),
    "lora_A lora_E lora_B": (["project", "outer", "reduce"],),
    "x lora_A lora_E lora_B": (
        ["matmul", "outer", "reduce"],
        ["project", "matmul", "outer", "reduce"],
        ["project", "update", "outer", "reduce"],
    ),
}


@pytest.mark.parametrize("needed", LAUNCHES)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_launched_that_nobody_needs(way, needed):
    case = random_case((64, 40), 32, 8, dtype=torch.float16)
    case = case._replace(
        **{name: value.to("meta") for name, value in case._asdict().items() if name != "scaling"}
    )
    grad, expected = torch.empty(64, 32, dtype=torch.float16, device="meta"), LAUNCHES[needed]
    with planned(way), launched() as names:
        _, h, S = forward(case)
        names.clear()
        backward(case, grad, h, S, [name in needed.split() for name in ("x", "input", *FACTORS)])
    assert names == (expected[WAYS.index(way) if len(expected) == 3 else 0] if expected else [])


def test_a_need_of_lora_B_alone_reads_the_output_gradient_alone():
    case = exact_case(64, 40, 32, 8)
    grids = {}

    def remember(kernel, grid, *rest):
        grids.setdefault(kernel.__name__, []).append(grid)

    with planned("library"):
        _, h, S = forward(case)
        with launch.observed(remember):
            for need_A in (False, True):
                backward(case, exact_grad(case), h, S, (False, False, need_A, False, True))
    alone, both = grids["outer"]
    assert (alone[0], both[0]) == (1, 3), "one column of tiles of dy, two of x"


def test_what_runs_is_what_was_forced():
    case = exact_case(33, 24, 17, 3)
    forward_launches = {
        "inline": ["matmul"],
        "epilogue": ["project", "matmul"],
        "library": ["project", "update"],
    }
    for way in WAYS:
        with planned(way), counted() as names:
            run(adalora_linear, case, exact_grad(case))
        assert names == [*forward_launches[way], *forward_launches[way], "outer", "reduce"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_as_they_are_chosen(dtype):
    """No tile is forced here."""
    case = exact_case(65, 40, 33, 8, dtype=dtype)
    grad = exact_grad(case)
    assert_same(run(adalora_linear, case, grad), truth(case, grad))


@pytest.mark.parametrize("fold", [True, False])
def test_forced_tiles_of_the_outer_product(fold):
    case = exact_case(50, 24, 17, 3)
    grad = exact_grad(case)
    with plans.forced(OuterPlan(tile=SMALL, parts=3 if fold else 1)):
        assert_same(run(adalora_linear, case, grad), truth(case, grad))


@pytest.mark.parametrize("way", WAYS)
def test_forced_tiles_of_a_way(way):
    case = exact_case(33, 24, 17, 3)
    grad = exact_grad(case)
    with plans.forced(plan_of(way)):
        assert_same(run(adalora_linear, case, grad), truth(case, grad))


def test_a_separate_input_of_the_adapter():
    case = exact_case(33, 24, 17, 3)
    other = exact_case(33, 24, 17, 3, seed=9).x
    with planned("epilogue"):
        y, h, _ = forward(case, adapter_input=other)
    S = case.lora_A * case.lora_E
    low = other.double() @ S.t().double()
    want = (
        case.x.double() @ case.weight.double().t() + case.bias.double() + 0.5 * low @ case.lora_B.double().t()
    )
    assert torch.equal(h[:, :3].double(), low) and (h[:, 3:] == 0).all()
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_precision_of_products_may_be_set_by_either_api(precision):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        assert kernels._precision(torch.float32) == precision
        assert kernels._precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_float32_products_follow_pytorchs_precision():
    before = torch.get_float32_matmul_precision()
    try:
        said = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            said[precision] = [kernels._precision(dtype) for dtype in (torch.float32, torch.float16)]
    finally:
        torch.set_float32_matmul_precision(before)
    assert said == {"highest": ["ieee", "ieee"], "high": ["tf32", "ieee"]}


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 33, 128])
def test_the_low_rank_product_is_kept_padded_with_zeros(rank):
    case = exact_case(20, 24, 17, rank)
    low = case.x.double() @ (case.lora_A * case.lora_E).t().double()
    for way in WAYS:
        with planned(way, MEDIUM):
            _, h, S = forward(case)
        shapes = kernels.saved_shapes(20, case.lora_A)
        assert (tuple(h.shape), tuple(S.shape)) == shapes and shapes[0][1] in (16, 32, 64, 128)
        assert torch.equal(h[:, :rank].double(), low) and (h[:, rank:] == 0).all()
