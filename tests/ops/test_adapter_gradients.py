"""The adapter's backward: which gradients, from which graphs, and what it refuses."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from adalora_fast.ops import adalora_delta_, adalora_linear
from tests.helpers.naive import NAMES, draw_grad, formula, leaves, make_case, onto_linear, results, truth
from tests.helpers.tolerances import assert_accurate

TRAINED = ("x", "lora_A", "lora_E", "lora_B")


FUNCTIONS = [adalora_linear, onto_linear]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("count", range(1, 5))
def test_every_combination_of_needed_gradients(function, count):
    case = make_case((7, 5), 6, 3)
    grad = draw_grad(case)
    exact = truth(case, grad)
    for needed in itertools.combinations(TRAINED, count):
        ours = leaves(case, frozen=tuple(set(NAMES) - set(needed)))
        got = results(function(*ours), ours, grad)
        assert set(got) == {"y", *needed}
        for name in got:
            assert_accurate(got[name], exact[name], torch.float64, what=f"{name} of {needed}")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_requires_gradients(function):
    case = make_case()
    assert not function(*case).requires_grad


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pruned_triplets(function):
    case = make_case((7, 5), 6, 4)
    pruned, kept = [1, 3], [0, 2]
    case.lora_E[pruned] = 0.0
    grad = draw_grad(case)
    ours = leaves(case)
    got, exact = results(function(*ours), ours, grad), truth(case, grad)
    assert (got["lora_A"][pruned] == 0).all() and (got["lora_B"][:, pruned] == 0).all()
    assert (got["lora_A"][kept] != 0).any() and (got["lora_B"][:, kept] != 0).any()
    assert (got["lora_E"][pruned] != 0).all(), "a pruned triplet may come back"
    for name in exact:
        assert_accurate(got[name], exact[name], torch.float64, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pruned_triplets_do_not_change_the_output(dtype):
    case = make_case((63, 37), 29, 8, dtype=dtype, factor_dtype=torch.float32)
    base = adalora_linear(*case._replace(lora_E=torch.zeros_like(case.lora_E)))
    assert torch.equal(base, torch.nn.functional.linear(case.x, case.weight, case.bias))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_layer_used_twice_in_one_forward(function):
    case = make_case((7, 5), 5, 3)
    ours, exact = leaves(case), leaves(case)
    grad = draw_grad(case)

    def twice(f, c):
        return f(torch.tanh(f(*c)), *c[1:]) + 2 * f(c.x * c.x, *c[1:])

    got, want = results(twice(function, ours), ours, grad), results(twice(formula, exact), exact, grad)
    for name in want:
        assert_accurate(got[name], want[name], torch.float64, factor=10, what=name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_accumulate(function):
    case = make_case((6, 5), 6, 3)
    grad = draw_grad(case)
    exact = truth(case, grad)
    ours = leaves(case)
    for part in (slice(0, 2), slice(2, 6)):
        function(ours.x[part], *ours[1:]).backward(grad[part])
    for name in TRAINED:
        assert_accurate(getattr(ours, name).grad, exact[name], torch.float64, what=name)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5), (0, 5)], ids=str)
def test_the_output_may_be_changed_in_place_as_that_of_a_linear_layer(function, shape):
    case = make_case(shape, 6, 3)
    changed, untouched = leaves(case), leaves(case)
    y = function(*changed)
    assert not y._is_view()
    y /= 3
    grad = torch.randn_like(y)
    torch.nn.functional.relu(y, inplace=True).backward(grad)
    torch.nn.functional.relu(function(*untouched) / 3).backward(grad)
    for name in TRAINED:
        assert torch.equal(getattr(changed, name).grad, getattr(untouched, name).grad), name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_twice_through_a_kept_graph(function):
    ours = leaves(make_case())
    y = function(*ours)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, [getattr(ours, n) for n in TRAINED], grad, retain_graph=True)
    second = torch.autograd.grad(y, [getattr(ours, n) for n in TRAINED], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), (
        "backward wrote into what it saved"
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "training": True}], ids=["plain", "dropout"])
def test_inputs_are_left_alone(function, options):
    ours = leaves(make_case())
    before = [t.detach().clone() for t in ours[:6]]
    y = function(*ours, **options)
    grad = torch.randn_like(y)
    kept = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, ours[:6], strict=True))


@pytest.mark.parametrize("name", ["lora_A", "lora_E", "lora_B", "x"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_factor_changed_before_backward_is_noticed(function, name):
    ours = leaves(make_case())
    y = function(*ours)
    with torch.no_grad():
        getattr(ours, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(function, reentrant):
    case = make_case()
    grad = draw_grad(case)
    plain, checkpointed = leaves(case), leaves(case)
    options = {"dropout_p": 0.3, "training": True}
    torch.manual_seed(3)
    want = results(function(*plain, **options), plain, grad)
    torch.manual_seed(3)
    y = checkpoint(
        lambda x: function(x, *checkpointed[1:], **options), checkpointed.x, use_reentrant=reentrant
    )
    got = results(y, checkpointed, grad)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_gradcheck(function, rank):
    case = leaves(make_case((4, 5), 6, rank))
    tensors = [getattr(case, name) for name in TRAINED if getattr(case, name).numel()]
    names = [name for name in TRAINED if getattr(case, name).numel()]

    def f(*values):
        return function(*case._replace(**dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_gradcheck_of_a_trained_base(name):
    case = leaves(make_case((4, 5), 6, 3), frozen=())
    assert torch.autograd.gradcheck(lambda *v: adalora_linear(*v, case.scaling), case[:6])


def test_gradcheck_of_delta_through_its_result():
    case = leaves(make_case((4, 5), 6, 3))
    result = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *v: adalora_delta_(*v, case.scaling), (result, case.x, case.lora_A, case.lora_E, case.lora_B)
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_double_backward_is_refused_in_one_line(function):
    ours = leaves(make_case())
    with pytest.raises(RuntimeError, match="no second derivative; call backward without") as error:
        torch.autograd.grad(function(*ours).square().sum(), ours.lora_A, create_graph=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_linear", "adapter_delta"])
def test_double_backward_of_the_registered_op_is_refused(name):
    ours = leaves(make_case())
    op = getattr(torch.ops.adalora_fast, name)
    if name == "adapter_linear":
        y = op(ours.x, None, ours.weight, ours.bias, *ours.factors, 0.5, False)[0]
    else:
        y = op(torch.randn(7, 6, dtype=torch.float64), ours.x, *ours.factors, 0.5, False)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        (dA,) = torch.autograd.grad(y.square().sum(), ours.lora_A, create_graph=True)
        dA.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_node_per_adapter(function):
    ours = leaves(make_case())
    y = function(*ours)  # PyTorch 2.11 forgets the nodes of a value that is gone
    reached = [f for f, _ in y.grad_fn.next_functions if f is not None]
    assert sum("AccumulateGrad" in f.name() for f in reached) >= 3, "factors hang directly on the node"


def test_an_unused_output_gradient_costs_nothing():
    ours = leaves(make_case())
    adalora_linear(*ours)
    y = adalora_linear(*ours)
    (y * 0 + ours.x.sum()).sum().backward()
    assert (ours.lora_A.grad == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_saved_tensor_hooks_see_what_is_kept(function):
    packed = []
    ours = leaves(make_case())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = function(*ours)
    assert packed, "activation offloading needs the hooks"
    y.sum().backward()
    want = truth(make_case(), torch.ones(7, 6))
    assert_accurate(ours.lora_A.grad, want["lora_A"], torch.float64)
