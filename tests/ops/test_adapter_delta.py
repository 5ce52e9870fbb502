"""``adalora_delta_``: when it may write into the base layer's output, and when it must not."""

import pytest
import torch

from adalora_fast.ops import adalora_delta_
from tests.helpers.naive import formula, make_case
from tests.helpers.tolerances import assert_accurate


def expected(case, result):
    """result + the adapter's part, in float64."""
    zero = torch.zeros_like(case.weight)
    part = formula(
        *(t.double() for t in (case.x, zero)), None, *(f.double() for f in case.factors), case.scaling
    )
    return result.double() + part


@pytest.fixture
def case():
    return make_case((2, 7, 5), 6, 3, bias=False)


@pytest.fixture
def result():
    return torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_fresh_result_is_overwritten_without_gradients(case, result):
    want = expected(case, result)
    with torch.no_grad():
        result = result.clone()
        version = result._version
        out = adalora_delta_(result, case.x, *case.factors, case.scaling)
        assert out is result
        assert result._version > version, "an in-place write must be visible to autograd"
    assert_accurate(out, want, torch.float64)


def test_a_fresh_result_in_inference_mode(case, result):
    """Such tensors do not know whether they are views, so writing into them is not required."""
    with torch.inference_mode():
        out = adalora_delta_(result.clone(), case.x, *case.factors, case.scaling)
    assert_accurate(out, expected(case, result), torch.float64)


def test_a_recorded_result_is_left_alone(case, result):
    before = result.clone()
    out = adalora_delta_(result, case.x, *case.factors, case.scaling)
    assert out.data_ptr() != result.data_ptr() and torch.equal(result, before)
    assert_accurate(out, expected(case, result), torch.float64)


def _slice(whole):
    return whole[:2]


def _reshaped(whole):
    return whole[:2].view(2, 7, 6)


def _detached(whole):
    return whole.detach()[:2]


def _chunk(whole):
    return whole.chunk(2)[0]


@pytest.mark.parametrize("view", [_slice, _reshaped, _detached, _chunk])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_view_is_left_alone(case, view, context):
    with context():
        whole = torch.randn(4, 7, 6, dtype=torch.float64)
        before, part = whole.clone(), view(whole)
        assert part.is_contiguous()
        out = adalora_delta_(part, case.x, *case.factors, case.scaling)
        assert torch.equal(whole, before), "the tensor behind the view was written"
        assert_accurate(out, expected(case, before[:2]), torch.float64)


@pytest.mark.parametrize("view", [lambda t: t.view(7, 6), lambda t: t[:], lambda t: t.chunk(1)[0]])
def test_a_view_of_a_whole_tensor_is_left_alone(view):
    case = make_case((7, 5), 6, 3)
    whole = torch.randn(7, 6, dtype=torch.float64)
    before = whole.clone()
    with torch.no_grad():
        out = adalora_delta_(view(whole), case.x, *case.factors, case.scaling)
    assert torch.equal(whole, before), "the tensor behind the view was written"
    assert_accurate(out, expected(case, before), torch.float64)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_strided_result_is_left_alone(case, result, context):
    with context():
        strided = result.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        before = strided.clone()
        out = adalora_delta_(strided, case.x, *case.factors, case.scaling)
        assert torch.equal(strided, before)
        assert_accurate(out, expected(case, before), torch.float64)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_base_that_returns_its_input_keeps_it(context):
    case = make_case((7, 5), 5, 3)
    with context():
        x = case.x.clone()
        out = adalora_delta_(x, x, *case.factors, case.scaling)
        assert torch.equal(x, case.x), "an identity base hands out the caller's own tensor"
        assert_accurate(out, expected(case, case.x), torch.float64)


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("x_dtype", "result_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_input_and_result_of_different_types(x_dtype, result_dtype, recorded, precision):
    case = make_case((63, 40), 24, 8, factor_dtype=torch.float32)
    result = torch.randn(63, 24, dtype=torch.float64).to(result_dtype)
    x = case.x.to(x_dtype)
    want = expected(case._replace(x=x), result)
    with torch.set_grad_enabled(recorded):
        out = adalora_delta_(result, x, *case.factors, case.scaling, precision=precision)
    assert out.dtype == result_dtype
    coarse = max((torch.float32, x_dtype, result_dtype), key=lambda d: torch.finfo(d).eps)
    assert_accurate(out, want, coarse, factor=3)


def test_gradient_of_x_comes_in_its_own_type():
    case = make_case((7, 5), 6, 3, dtype=torch.float32)
    x = case.x.requires_grad_()
    result = torch.randn(7, 6, dtype=torch.bfloat16, requires_grad=True)
    adalora_delta_(result, x, *case.factors, case.scaling).sum().backward()
    assert x.grad.dtype == torch.float32 and result.grad.dtype == torch.bfloat16
    assert (result.grad == 1).all()


def test_highest_does_not_round_the_input_to_the_result():
    """A float32 input on a bfloat16 result: "highest" computes the adapter in the factors' type."""
    case = make_case((63, 256), 24, 8, dtype=torch.float32, bias=False)
    result = torch.zeros(63, 24, dtype=torch.bfloat16)
    factors = [f.detach().requires_grad_() for f in case.factors]
    adalora_delta_(result, case.x, *factors, case.scaling, precision="highest").sum().backward()
    A, _, B = (f.detach().double() for f in factors)
    dE = case.scaling * ((case.x.double() @ A.t()) * B.sum(0)).sum(0)[:, None]
    assert_accurate(factors[1].grad, dE, torch.float32, factor=10)


def test_an_in_place_result_of_a_leaf_under_no_grad_changes_only_what_is_returned(case, result):
    leaf = result.requires_grad_()
    with torch.no_grad():
        out = adalora_delta_(leaf * 1, case.x, *case.factors, case.scaling)
    assert not out.requires_grad
    assert_accurate(out, expected(case, leaf.detach()), torch.float64)
