"""What the adapter refuses, in one line that says what to do, and what autocast makes of its inputs."""

import pytest
import torch
import torch.nn.functional as F

from adalora_fast.ops import adalora_delta_, adalora_linear
from tests.helpers.naive import draw_grad, formula, leaves, make_case, onto_linear, results, truth
from tests.helpers.tolerances import RelativeRule

FUNCTIONS = [adalora_linear, onto_linear]


def wrong(**changes):
    return make_case((4, 5), 6, 3, dtype=torch.float32)._replace(**changes)


META = torch.device("meta")
BAD_LINEAR = {
    "x features": (wrong(x=torch.randn(4, 7)), "7"),
    "x scalar": (wrong(x=torch.tensor(1.0)), "x"),
    "weight columns": (wrong(weight=torch.randn(6, 4)), "weight"),
    "weight 1-D": (wrong(weight=torch.randn(5)), "weight"),
    "weight transposed": (wrong(weight=torch.randn(5, 6)), "weight|lora_B"),
    "bias length": (wrong(bias=torch.randn(5)), "bias"),
    "bias of one": (wrong(bias=torch.randn(1)), "bias"),
    "bias 2-D": (wrong(bias=torch.randn(6, 1)), "bias"),
    "lora_A 1-D": (wrong(lora_A=torch.randn(5)), "lora_A"),
    "lora_A transposed": (wrong(lora_A=torch.randn(5, 3)), "lora_A"),
    "lora_E 1-D": (wrong(lora_E=torch.randn(3)), "lora_E"),
    "lora_E row": (wrong(lora_E=torch.randn(1, 3)), "lora_E"),
    "lora_B rank": (wrong(lora_B=torch.randn(6, 2)), "lora_B"),
    "lora_B rows": (wrong(lora_B=torch.randn(5, 3)), "lora_B"),
    "x device": (wrong(x=torch.randn(4, 5, device=META)), "meta"),
    "weight device": (wrong(weight=torch.randn(6, 5, device=META)), "meta"),
    "bias device": (wrong(bias=torch.randn(6, device=META)), "meta"),
    "lora_A device": (wrong(lora_A=torch.randn(3, 5, device=META)), "meta"),
    "lora_E device": (wrong(lora_E=torch.randn(3, 1, device=META)), "meta"),
    "lora_B device": (wrong(lora_B=torch.randn(6, 3, device=META)), "meta"),
    "x integer": (wrong(x=torch.ones(4, 5, dtype=torch.int64)), "int64"),
    "weight integer": (wrong(weight=torch.ones(6, 5, dtype=torch.int8)), "int8"),
    "weight type": (wrong(weight=torch.randn(6, 5).bfloat16()), "bfloat16"),
    "bias type": (wrong(bias=torch.randn(6).double()), "float64"),
    "lora_A integer": (wrong(lora_A=torch.ones(3, 5, dtype=torch.int32)), "int32"),
    "lora_A complex": (wrong(lora_A=torch.randn(3, 5, dtype=torch.complex64)), "complex64"),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_linear_refuses(name):
    case, said = BAD_LINEAR[name]
    with pytest.raises((ValueError, TypeError), match=said) as error:
        adalora_linear(*case)
    assert "\n" not in str(error.value)


def delta_arguments(**changes):
    case = make_case((4, 5), 6, 3, dtype=torch.float32)
    named = {
        "result": torch.randn(4, 6),
        "x": case.x,
        **dict(zip(("lora_A", "lora_E", "lora_B"), case.factors)),
    }
    return {**named, **changes, "scaling": 1.0}


BAD_DELTA = {
    "x features": ({"x": torch.randn(4, 7)}, "7"),
    "result features": ({"result": torch.randn(4, 7)}, "7"),
    "rows": ({"x": torch.randn(3, 5)}, "result"),
    "dimensions": ({"x": torch.randn(2, 2, 5)}, "result"),
    "result device": ({"result": torch.randn(4, 6, device=META)}, "meta"),
    "x device": ({"x": torch.randn(4, 5, device=META)}, "meta"),
    "lora_B device": ({"lora_B": torch.randn(6, 3, device=META)}, "meta"),
    "result integer": ({"result": torch.ones(4, 6, dtype=torch.int64)}, "int64"),
    "x integer": ({"x": torch.ones(4, 5, dtype=torch.int64)}, "int64"),
    "lora_E 1-D": ({"lora_E": torch.randn(3)}, "lora_E"),
}


@pytest.mark.parametrize("name", BAD_DELTA)
@pytest.mark.parametrize("recorded", [True, False])
def test_delta_refuses(name, recorded):
    changes, said = BAD_DELTA[name]
    with torch.set_grad_enabled(recorded), pytest.raises((ValueError, TypeError), match=said) as error:
        adalora_delta_(**delta_arguments(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_probability_out_of_range(function, p, training):
    with pytest.raises(ValueError, match=rf"dropout_p must be in \[0, 1\], got {p}"):
        function(*make_case(), dropout_p=p, training=training)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("precision", ["high", "", None])
def test_unknown_precision(function, precision):
    with pytest.raises(ValueError, match=r"precision .* is not one of \('default', 'highest'\)"):
        function(*make_case(), precision=precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_as_a_linear_under_autocast(dtype, x_dtype):
    rule = RelativeRule(dtype)
    for seed in range(8):
        case = make_case((63, 37), 29, 8, dtype=torch.float32, seed=seed)
        case = case._replace(x=case.x.to(x_dtype))
        grad, naive, ours = draw_grad(case, seed).to(dtype), leaves(case), leaves(case)
        with torch.autocast("cpu", dtype=dtype):
            base = F.linear(naive.x, naive.weight, naive.bias)
            y = base + (((naive.x @ naive.lora_A.t()) * naive.lora_E.t()) @ naive.lora_B.t() * 0.75).to(dtype)
            got = adalora_linear(*ours)
        assert got.dtype == y.dtype == dtype
        plain, got, exact = results(y, naive, grad), results(got, ours, grad), truth(case, grad)
        assert got["x"].dtype == x_dtype and got["lora_A"].dtype == torch.float32
        for name in exact:
            rule.add(name, got[name], plain[name], exact[name])
    rule.check()


def test_autocast_leaves_float64_alone():
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adalora_linear(*case), adalora_linear(*case._replace(x=case.x.clone())))
        assert adalora_linear(*case).dtype == F.linear(case.x, case.weight).dtype == torch.float64


@pytest.mark.parametrize("function", FUNCTIONS)
def test_highest_is_not_undone_by_autocast(function):
    """The products stay in float32 inside: the factors' gradients carry more than bfloat16's eight bits."""
    ours = leaves(make_case((63, 37), 29, 8, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        function(*ours, precision="highest").float().sum().backward()
    assert not torch.equal(ours.lora_A.grad, ours.lora_A.grad.bfloat16().float())


def test_backward_outside_autocast_and_inside_agree():
    first, second = leaves(make_case(dtype=torch.float32)), leaves(make_case(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adalora_linear(*first)
        adalora_linear(*second).backward(torch.ones(7, 6, dtype=torch.bfloat16))
    y.backward(torch.ones(7, 6, dtype=torch.bfloat16))
    assert torch.equal(first.lora_A.grad, second.lora_A.grad) and torch.equal(first.x.grad, second.x.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_activations_do_not_overflow_more_than_plain_pytorch(dtype):
    case = make_case((64, 32), 16, 4, dtype=dtype, factor_dtype=torch.float32)
    case = case._replace(x=case.x * 50, weight=case.weight * 0.02)
    grad = draw_grad(case) * 10
    naive, ours = leaves(case), leaves(case)
    plain = results(formula(*naive, product_dtype=dtype), naive, grad)
    got = results(adalora_linear(*ours), ours, grad)
    for name in plain:
        assert not plain[name].isfinite().all() or got[name].isfinite().all(), name
