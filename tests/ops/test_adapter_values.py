"""The adapter op against the float64 truth: forward and every gradient, in every type, on awkward shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.ops import adalora_linear
from tests.helpers.naive import draw_grad, formula, leaves, make_case, onto_linear, results, truth
from tests.helpers.tolerances import RelativeRule, assert_accurate, relative_error

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
FROZEN = ("weight", "bias")
RANKS = (0, 1, 3, 8, 12, 16, 33)


def check(
    shape=(9, 5), out=6, r=3, *, precision="default", frozen=FROZEN, dtype=torch.float64, **options
) -> None:
    """Both public functions against the truth, by the relative rule."""
    rule = RelativeRule(dtype)
    for seed in range(40 if 0 < r < 4 else 6):  # dE of a small rank is few numbers
        case = make_case(shape, out, r, dtype=dtype, seed=seed, **options)
        product_dtype = case.lora_A.dtype if precision == "highest" else dtype
        grad = draw_grad(case, seed)
        exact = truth(case, grad, frozen)
        naive = leaves(case, frozen=frozen)
        plain = results(formula(*naive, product_dtype=product_dtype), naive, grad)
        for function in (adalora_linear, onto_linear):
            ours = leaves(case, frozen=frozen)
            got = results(function(*ours, precision=precision), ours, grad)
            for name in exact:
                rule.add(f"{function.__name__} {name}", got[name], plain[name], exact[name])
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", [1, 63, 1000])
def test_shapes(rows, rank, dtype):
    check((rows, 37), 29, rank, dtype=dtype, bias=rank % 2 == 0)


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 8, 33])
def test_float32_adapter_on_half_base(dtype, rank, precision):
    options = {"dtype": dtype, "factor_dtype": torch.float32, "precision": precision}
    check((63, 37), 29, rank, bias=False, **options)
    check((2, 5, 64), 48, rank, **options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_highest_keeps_what_rounding_the_factors_loses(dtype):
    case = make_case((63, 256), 64, 8, dtype=dtype, factor_dtype=torch.float32, bias=False)
    case = case._replace(weight=torch.zeros_like(case.weight))
    grad = draw_grad(case)
    exact = truth(case, grad)
    errors = {}
    for precision in ("default", "highest"):
        ours = leaves(case)
        got = results(adalora_linear(*ours, precision=precision), ours, grad)
        errors[precision] = relative_error(got["lora_E"], exact["lora_E"])
    assert errors["highest"] < 1e-5 < 1e-4 < errors["default"]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_dimensions(shape, bias):
    case = make_case(shape, 6, 3, bias=bias)
    ours = leaves(case)
    y = adalora_linear(*ours)
    assert y.shape == (*shape[:-1], 6)
    grad = draw_grad(case)
    got, exact = results(y, ours, grad), truth(case, grad)
    for name in exact:
        assert got[name].shape == exact[name].shape
        assert_accurate(got[name], exact[name], torch.float64, what=name)


def _transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else t.transpose(0, 1).contiguous().transpose(0, 1)


def _strided(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def _expanded(t):
    return t[:1].expand(t.shape)


@pytest.mark.parametrize("layout", [_transposed, _strided, _expanded])
@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_E", "lora_B", "grad"])
@pytest.mark.parametrize("shape", [(9, 5), (2, 4, 5)], ids=str)
def test_any_strides(layout, which, shape):
    if which == "grad" or not (which != "x" and shape == (2, 4, 5)):
        case = make_case(shape, 6, 3)
        grad = draw_grad(case)
        if which == "grad":
            grad = layout(grad)
        else:
            case = case._replace(**{which: layout(getattr(case, which))})
            assert not getattr(case, which).is_contiguous() or which == "lora_E" or layout is _expanded
        exact = truth(case, grad)
        tracked = {n: getattr(case, n).detach().requires_grad_() for n in ("x", "lora_A", "lora_E", "lora_B")}
        ours = case._replace(**tracked)
        for name, value in results(adalora_linear(*ours), ours, grad).items():
            assert_accurate(value, exact[name], torch.float64, factor=2, what=name)


def test_conv1d_weight_is_taken_as_a_view():
    case = make_case((4, 5), 6, 3)
    conv = case.weight.t().contiguous()  # GPT-2 stores [in, out]
    got = adalora_linear(*case._replace(weight=conv.t()))
    assert_accurate(got, formula(*case), torch.float64)


@pytest.mark.parametrize("frozen", [("bias",), ("weight",), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_base_parameters_that_require_gradients_get_them(frozen, dtype):
    check(dtype=dtype, frozen=frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uninitialised_memory_never_shows(dtype):
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        for rank in (0, 1, 8):
            check((63, 37), 29, rank, dtype=dtype)
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-8, 3])
def test_scaling(scaling):
    check(scaling=scaling)


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    k=st.integers(1, 17),
    n=st.integers(1, 17),
    rank=st.integers(0, 20),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes(leading, k, n, rank, bias, dtype, seed):
    case = make_case((*leading, k), n, rank, dtype=dtype, bias=bias, seed=seed)
    ours = leaves(case)
    y = adalora_linear(*ours)
    grad = draw_grad(case)
    got, exact = results(y, ours, grad), truth(case, grad)
    for name in exact:
        bound = 1e4 * torch.finfo(dtype).eps  # far below what any wrong term would make
        assert got[name].shape == exact[name].shape
        assert ((got[name].double() - exact[name]).abs() <= bound).all(), name
