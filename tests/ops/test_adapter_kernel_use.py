"""The adapter in its Triton kernels as models use it: the public op, the layer, autograd, compilation."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adalora_fast.ops import adalora_delta_, adalora_linear, adapter
from adalora_fast.ops.adapter import dropout
from adalora_fast.ops.adapter import triton as kernels
from tests.helpers.kernel_cases import (
    BFLOAT16,
    DEVICE,
    DTYPES,
    FACTORS,
    NO_BFLOAT16,
    ON_DEVICE,
    TRAINED,
    WAYS,
    assert_same,
    exact_case,
    exact_grad,
    make_layer,
    planned,
    random_case,
    run,
    small_case,
    triton_backend,
)
from tests.helpers.kernels import counted
from tests.helpers.naive import draw_grad, formula, leaves, onto_linear, results, truth
from tests.helpers.tolerances import RelativeRule

pytestmark = ON_DEVICE
FUNCTIONS = [adalora_linear, onto_linear]
DROPOUT = {"dropout_p": 0.5, "training": True}


@pytest.fixture(autouse=True)
def kernels_run():
    adapter._within_limits.cache_clear()  # warnings are given once
    with triton_backend():
        yield
    adapter._within_limits.cache_clear()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_kernels_run(function):
    with counted() as names:
        run(function, small_case(), exact_grad(small_case()))
    assert {"outer", "reduce"} < set(names)


def test_the_layer_runs_them():
    with counted() as names:
        make_layer()(torch.randn(5, 24, device=DEVICE))
    assert names


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_output_may_be_changed_in_place(function):
    case = small_case()
    ours = leaves(case)
    y = function(*ours)
    y *= 2
    y.backward(exact_grad(case) / 2)
    exact = truth(case, exact_grad(case))
    for name in TRAINED:
        assert torch.equal(getattr(ours, name).grad.double(), exact[name]), name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_accumulate(function):
    case = small_case()
    grad = exact_grad(case)
    ours = leaves(case)
    for part in (slice(0, 3), slice(3, 20)):
        function(ours.x[part], *ours[1:]).backward(grad[part])
    exact = truth(case, grad)
    for name in TRAINED:
        assert torch.equal(getattr(ours, name).grad.double(), exact[name]), name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_layer_used_twice_in_one_forward(function):
    """In float32: the products' errors are not those of a chain of roundings."""
    rule = RelativeRule(torch.float32)
    for seed in range(2):
        case = random_case((20, 24), 24, 3, dtype=torch.float32, seed=seed)
        exact, naive, ours = leaves(case, torch.float64), leaves(case), leaves(case)
        grad = draw_grad(case, seed).to(DEVICE)

        def twice(f, c):
            return f(torch.tanh(f(*c)), *c[1:]) + 2 * f(c.x * c.x, *c[1:])

        want = results(twice(formula, exact), exact, grad)
        plain = results(twice(formula, naive), naive, grad)
        got = results(twice(function, ours), ours, grad)
        for name in want:
            rule.add(name, got[name], plain[name], want[name])
    rule.check()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(function, reentrant):
    case = small_case()
    grad = exact_grad(case)
    torch.manual_seed(3)
    want = run(function, case, grad, **DROPOUT)
    ours = leaves(case)
    torch.manual_seed(3)
    y = checkpoint(lambda x: function(x, *ours[1:], **DROPOUT), ours.x, use_reentrant=reentrant)
    torch.rand(5, device=DEVICE)  # what other layers draw in between
    assert_same(results(y, ours, grad), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_layer(reentrant):
    x = torch.randn(5, 24, device=DEVICE)
    found = []
    for apply in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        layer = make_layer(dropout=0.5).train()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(1)
        apply(layer, inputs).square().sum().backward()
        found.append({"x": inputs.grad, **{n: f.grad for n, f in layer.factors()._asdict().items()}})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_double_backward_is_refused_in_one_line(function):
    ours = leaves(small_case())
    with pytest.raises(RuntimeError, match="no second derivative; call backward without") as error:
        torch.autograd.grad(function(*ours).square().sum(), ours.lora_A, create_graph=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_twice_through_a_kept_graph(function):
    ours = leaves(small_case())
    y = function(*ours, **DROPOUT)
    inputs = [getattr(ours, name) for name in TRAINED]
    first = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "backward wrote into what it saved"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_are_left_alone(function):
    ours = leaves(small_case())
    before = [t.detach().clone() for t in ours[:6]]
    y = function(*ours, **DROPOUT)
    grad = torch.ones_like(y)
    y.backward(grad)
    assert (grad == 1).all() and all(torch.equal(a, b) for a, b in zip(before, ours[:6]))


@pytest.mark.parametrize("name", TRAINED)
def test_an_input_changed_before_backward_is_noticed(name):
    ours = leaves(small_case())
    y = adalora_linear(*ours)
    with torch.no_grad():
        getattr(ours, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("needed", [("x",), ("lora_A",), ("lora_E",), ("lora_B",), ("x", "lora_B")], ids=str)
def test_some_gradients_alone(function, needed):
    case = small_case()
    grad = exact_grad(case)
    exact = truth(case, grad)
    assert_same(run(function, case, grad, needed), {name: exact[name] for name in ("y", *needed)})


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_computes_as_a_linear_under_autocast(dtype, x_dtype):
    rule = RelativeRule(dtype)
    for seed in range(2):
        case = random_case((63, 37), 29, 8, dtype=torch.float32, seed=seed)
        case = case._replace(x=case.x.to(x_dtype))
        grad, naive, ours = draw_grad(case, seed).to(DEVICE, dtype), leaves(case), leaves(case)
        with torch.autocast(DEVICE.type, dtype=dtype):
            base = F.linear(naive.x, naive.weight, naive.bias)
            y = base + (((naive.x @ naive.lora_A.t()) * naive.lora_E.t()) @ naive.lora_B.t() * 0.75).to(dtype)
            with counted() as names:
                got = adalora_linear(*ours)
        assert names and got.dtype == y.dtype == dtype
        plain, got, exact = results(y, naive, grad), results(got, ours, grad), truth(case, grad)
        assert got["x"].dtype == x_dtype and got["lora_A"].dtype == torch.float32
        for name in exact:
            rule.add(name, got[name], plain[name], exact[name])
    rule.check()


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float16, "default"),
        (torch.float16, "highest"),
        pytest.param(torch.bfloat16, "default", marks=NO_BFLOAT16),
        pytest.param(torch.bfloat16, "highest", marks=NO_BFLOAT16),
    ],
)
def test_a_half_layer_with_its_float32_adapter(dtype, precision):
    layer = make_layer(dtype=dtype, precision=precision)
    assert layer.weight.dtype == dtype and layer.lora_A.dtype == torch.float32
    x = torch.randn(2, 5, 24, device=DEVICE, dtype=dtype, requires_grad=True)
    with counted() as names:
        y = layer(x)
        y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and layer.lora_A.grad.dtype == torch.float32
    assert names[-1] == "reduce"
    want = F.linear(x, layer.weight, layer.bias).double() + layer.scaling * (
        (x.double() @ layer.lora_A.t().double()) * layer.lora_E.t().double() @ layer.lora_B.t().double()
    )
    assert ((y - want).norm() / want.norm()).item() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ()], ids=str)
def test_a_trained_base(frozen):
    case = small_case()
    grad = exact_grad(case)
    ours = leaves(case, frozen=frozen)
    assert_same(results(adalora_linear(*ours), ours, grad), truth(case, grad, frozen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_writes_into_a_fresh_result_alone(dtype):
    case = small_case(dtype=dtype, bias=False)
    base = F.linear(case.x, case.weight)
    want = formula(*(t.double() for t in case[:2]), None, *(f.double() for f in case.factors), case.scaling)
    want = want.to(dtype)
    with torch.no_grad():
        fresh = base.clone()
        version = fresh._version
        assert adalora_delta_(fresh, case.x, *case.factors, case.scaling) is fresh
        assert fresh._version > version and torch.equal(fresh, want)
        whole = torch.cat([base, base])
        for view in (whole[:20], whole.chunk(2)[1], base.view(20, 17), base.t().contiguous().t()):
            before = view.clone()
            out = adalora_delta_(view, case.x, *case.factors, case.scaling)
            assert torch.equal(view, before) and torch.equal(out, want)
    recorded = base.clone()
    factors = [factor.clone().requires_grad_() for factor in case.factors]
    out = adalora_delta_(recorded, case.x, *factors, case.scaling)
    assert torch.equal(recorded, base) and torch.equal(out.detach(), want)


def test_delta_of_a_base_that_returns_its_input():
    case = exact_case(20, 17, 17, 3)
    with torch.no_grad():
        x = case.x.clone()
        out = adalora_delta_(x, x, *case.factors, case.scaling)
    assert torch.equal(x, case.x) and not torch.equal(out, x)


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(
    ("x_dtype", "result_dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str
)
def test_delta_of_two_types(x_dtype, result_dtype, dropout_p, precision):
    case = small_case(dtype=x_dtype)
    grad = exact_grad(case).to(result_dtype)
    found = {}
    for recorded in (True, False):
        base = F.linear(case.x, case.weight, case.bias).to(result_dtype)
        ours = leaves(case) if recorded else case
        torch.manual_seed(2)
        with torch.set_grad_enabled(recorded):
            y = adalora_delta_(
                base, ours.x, *ours.factors, case.scaling, dropout_p, dropout_p > 0, precision=precision
            )
        assert y.dtype == result_dtype
        if recorded:
            found = results(y, ours, grad)
        else:
            assert torch.equal(y, found["y"])
    assert found["x"].dtype == x_dtype
    torch.manual_seed(2)
    seed = dropout.draw_seed(DEVICE)
    keep = dropout.survivors(seed, 20, 24, 0.5) * 2 if dropout_p else torch.ones(20, 24, device=DEVICE)
    exact = truth(case, grad, keep=keep)
    exact["x"] -= grad.double() @ case.weight.double()  # the base is another node
    assert_same(found, exact)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_rank_over_the_limit_runs_in_plain_pytorch_and_says_so_once(function):
    case = exact_case(4, 8, 8, kernels.MAX_RANK + 1)
    grad = exact_grad(case)
    with pytest.warns(UserWarning, match=r"plain PyTorch.*rank 129 is over 128") as said, counted() as names:
        for _ in range(3):
            assert_same(run(function, case, grad), truth(case, grad))
    assert names == [] and len(said) == 1 and "\n" not in str(said[0].message)


def test_the_highest_rank_runs_in_the_kernels():
    case = exact_case(4, 8, 8, kernels.MAX_RANK)
    with warnings.catch_warnings(), counted() as names:
        warnings.simplefilter("error", UserWarning)  # which is how a refusal is said
        adalora_linear(*case)
    assert names


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_runs_in_plain_pytorch_and_says_so_once(function):
    case = exact_case(4, 8, 8, 2, dtype=torch.float64, factor_dtype=torch.float64)
    grad = exact_grad(case)
    with pytest.warns(UserWarning, match=r"plain PyTorch.*not in torch.float64") as said, counted() as names:
        for _ in range(2):
            assert_same(run(function, case, grad), truth(case, grad))
    assert names == [] and len(said) == 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_float64_base_keeps_its_digits_under_a_float32_adapter(function):
    case = exact_case(4, 8, 8, 2, dtype=torch.float64)
    case = case._replace(weight=case.weight + 2.0**-40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = function(*case, precision="highest")
    assert torch.equal(y, formula(*leaves(case, torch.float64)))


@pytest.mark.parametrize("way", ["inline", "epilogue", "library"])
def test_halves_of_two_kinds_leave_the_base_to_the_library(way):
    case = exact_case(33, 16, 16, 4, dtype=torch.float16, factor_dtype=torch.float32)
    with planned(way), counted() as names:
        adalora_linear(*case, precision="highest")
    assert names == ["project", "update"]


def test_plain_pytorch_in_the_kernels_stead_drops_what_they_would():
    case = exact_case(4, 8, 8, 2, dtype=torch.float64, factor_dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        y = adalora_linear(*case, **DROPOUT)
    torch.manual_seed(1)
    kept = dropout.survivors(dropout.draw_seed(case.x.device), 4, 8, 0.5)
    assert torch.equal(y, formula(*case, adapter_input=case.x * kept * 2.0))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_rank_zero_is_the_base(function, options):
    case = exact_case(20, 24, 17, 0)
    grad = exact_grad(case)
    with warnings.catch_warnings(), counted() as names:
        warnings.simplefilter("error")
        assert_same(run(function, case, grad, **options), truth(case, grad))
    assert names == []


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch(way, dtype, options, shape):
    case = small_case(dtype=dtype)
    case = case._replace(x=case.x.new_empty(shape))
    for function in FUNCTIONS:
        with planned(way):
            got = run(function, case, exact_grad(case), **options)
        assert got["y"].shape == (*shape[:-1], 17) and got["x"].shape == shape
        for name in FACTORS:
            assert got[name].shape == getattr(case, name).shape and (got[name] == 0).all()


BAD = {
    "x features": ({"x": torch.ones(4, 7)}, ValueError, "7"),
    "x scalar": ({"x": torch.tensor(1.0)}, ValueError, "x"),
    "weight columns": ({"weight": torch.ones(17, 23)}, ValueError, "weight"),
    "bias length": ({"bias": torch.ones(5)}, ValueError, "bias"),
    "lora_E 1-D": ({"lora_E": torch.ones(3)}, ValueError, "lora_E"),
    "lora_B rank": ({"lora_B": torch.ones(17, 2)}, ValueError, "lora_B"),
    "x device": ({"x": torch.ones(4, 24, device="meta")}, ValueError, "meta"),
    "weight device": ({"weight": torch.ones(17, 24, device="meta")}, ValueError, "meta"),
    "lora_B device": ({"lora_B": torch.ones(17, 3, device="meta")}, ValueError, "meta"),
    "x integer": ({"x": torch.ones(4, 24, dtype=torch.int64)}, TypeError, "int64"),
    "weight integer": ({"weight": torch.ones(17, 24, dtype=torch.int8)}, TypeError, "int8"),
    "lora_A integer": ({"lora_A": torch.ones(3, 24, dtype=torch.int32)}, TypeError, "int32"),
    "weight type": ({"weight": torch.ones(17, 24).double()}, TypeError, "float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_launched(name):
    changes, error, said = BAD[name]
    changes = {n: t if t.device.type == "meta" else t.to(DEVICE) for n, t in changes.items()}
    case = small_case(dtype=torch.float32)._replace(**changes)
    with counted() as names, pytest.raises(error, match=said) as raised:
        adalora_linear(*case)
    assert names == [] and "\n" not in str(raised.value)
