"""The adapter op in its Triton kernels as the compiler and ``opcheck`` see it, and its launches."""

import pytest
import torch

from adalora_fast.ops import adalora_linear, adapter
from adalora_fast.ops.adapter import triton as kernels
from adalora_fast.ops.adapter.adapter import Adapter
from tests.helpers.kernel_cases import (
    DEVICE,
    ON_DEVICE,
    WAYS,
    assert_same,
    exact_case,
    exact_grad,
    launched,
    make_layer,
    planned,
    random_case,
    run,
    small_case,
    triton_backend,
)
from tests.helpers.naive import leaves, onto_linear, truth

pytestmark = ON_DEVICE
OPS = torch.ops.adalora_fast
DROPOUT = {"dropout_p": 0.5, "training": True}


@pytest.fixture(autouse=True)
def kernels_run():
    adapter._within_limits.cache_clear()  # warnings are given once
    with triton_backend():
        yield
    adapter._within_limits.cache_clear()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_layer_equals_the_eager_one(fresh_compiler, training, dropout):
    found = []
    x = torch.randn(5, 24, device=DEVICE)
    for wrap in (lambda f: f, compiled):
        layer = make_layer(dropout=dropout).train(training)
        function, inputs = wrap(layer), x.clone().requires_grad_()
        torch.manual_seed(1)
        y = function(inputs)
        y.square().sum().backward()
        gradients = {name: factor.grad for name, factor in layer.factors()._asdict().items()}
        found.append({"y": y.detach(), "x": inputs.grad, **gradients})
    assert_same(found[1], found[0])


def test_a_compiled_layer_does_not_keep_its_seed(fresh_compiler):
    function = compiled(make_layer(dropout=0.5).train())
    x = torch.randn(5, 24, device=DEVICE)
    torch.manual_seed(1)
    first, second = function(x), function(x)
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(function(x), first) and torch.equal(function(x), second)


def test_compiled_over_changing_sizes(fresh_compiler):
    function = torch.compile(adalora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 9, 1, 16):
        case = exact_case(rows, 24, 17, 3)
        grad = exact_grad(case)
        assert_same(run(function, case, grad), truth(case, grad))


def test_compiled_over_changing_ranks_with_dropout(fresh_compiler):
    """Pruned checkpoints have layers of many ranks, and one function is compiled for all of them."""
    function = compiled(adalora_linear)
    for rank in (2, 3, 5, 17):
        case = exact_case(9, 24, 17, rank)
        grad = exact_grad(case)
        torch.manual_seed(2)
        eager = run(adalora_linear, case, grad, **DROPOUT)
        torch.manual_seed(2)
        assert_same(run(function, case, grad, **DROPOUT), eager)


def test_compiled_delta(fresh_compiler):
    case = small_case()
    grad = exact_grad(case)
    assert_same(run(compiled(onto_linear), case, grad), truth(case, grad))


def check_op(op, *arguments) -> None:
    torch.library.opcheck(op, arguments, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (24,)], ids=str)
def test_opcheck_of_linear(shape, recorded):
    case = random_case(shape, 17, 3, dtype=torch.float32)
    case = leaves(case) if recorded else case
    check_op(OPS.adapter_linear, case.x, None, *case[1:6], 0.5, False)


@pytest.mark.parametrize("highest", [True, False])
def test_opcheck_of_linear_with_dropout_and_a_half_base(highest):
    case = leaves(random_case((7, 24), 17, 3, dtype=torch.float16, factor_dtype=torch.float32))
    seed = torch.tensor([5], device=DEVICE)
    check_op(OPS.adapter_linear, case.x, None, *case[1:6], 0.5, highest, seed, 0.5)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck_of_delta(dropout_p, recorded):
    case = random_case((2, 5, 24), 17, 3, dtype=torch.float32)
    case = leaves(case) if recorded else case
    result = torch.randn(2, 5, 17, device=DEVICE, requires_grad=recorded)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    check_op(OPS.adapter_delta, result, case.x, *case.factors, 0.5, False, seed, dropout_p)


@pytest.mark.parametrize("highest", [True, False])
def test_opcheck_of_delta_in_place(highest):
    case = random_case((7, 24), 17, 3, dtype=torch.float16, factor_dtype=torch.float32)
    result = torch.randn(7, 17, device=DEVICE).half()
    check_op(OPS.adapter_delta_, result, case.x, *case.factors, 0.5, highest)


@pytest.mark.parametrize("needs", [(True,) * 5, (True, False, False, True, False), (False,) * 5], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_opcheck_of_backward(shared, needs):
    case = random_case((14, 24), 17, 3, dtype=torch.float32)
    needs = (needs[0], needs[1] and not shared, *needs[2:])
    h, S = (torch.zeros(shape, device=DEVICE) for shape in kernels.saved_shapes(14, case.lora_A))
    grad, seed = torch.randn(14, 17, device=DEVICE), torch.tensor([5], device=DEVICE)
    for drop in ((), (seed, 0.5)):
        check_op(
            OPS.adapter_backward, grad, case.x, h, S, case.weight, *case.factors, 0.5, shared, *needs, *drop
        )


@pytest.mark.parametrize("highest", [True, False])
def test_fakes_agree_on_what_is_saved(highest):
    """h is padded, in the products' type; S is not kept."""
    case = exact_case(5, 24, 17, 3)
    arguments = (case.x, None, *case[1:6], 0.5, highest)
    real = OPS.adapter_linear(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OPS.adapter_linear(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    assert real[1].shape == (5, 16) and real[1].dtype == (torch.float32 if highest else torch.float16)


FORWARD = {"inline": ["matmul"], "epilogue": ["project", "matmul"], "library": ["project", "update"]}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("way", WAYS)
def test_launches_of_a_layer(way, p):
    """On meta tensors nothing runs; a dropped input cannot be projected inside the matmul."""
    case = random_case((64, 48), 32, 8, dtype=torch.float16)
    case = case._replace(**{n: t.to("meta") for n, t in case._asdict().items() if torch.is_tensor(t)})
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    with planned(way), launched() as names:
        adapter = Adapter(*case.factors, 0.5, False, seed, p)
        y, h, S = kernels.linear(case.x, None, case.weight, case.bias, adapter)
        forward = list(names)
        kernels.backward(
            torch.empty_like(y), case.x, h, S, case.weight, adapter, True, [True, False, True, True, True]
        )  # fmt: skip
    assert names[len(forward) :] == [*FORWARD[way], "outer", "reduce"]
    if way == "inline" and p:
        assert forward in (FORWARD["epilogue"], FORWARD["library"])
    else:
        assert forward == FORWARD[way]


@pytest.mark.parametrize("in_place", [True, False])
def test_launches_of_a_delta(in_place):
    factors = [factor.to("meta") for factor in random_case((64, 48), 32, 8, dtype=torch.float16).factors]
    x, result = (torch.empty(64, n, dtype=torch.float16, device="meta") for n in (48, 32))
    with launched() as names:
        (kernels.delta_ if in_place else kernels.delta)(result, x, Adapter(*factors, 0.5))
    assert names == FORWARD["library"]
