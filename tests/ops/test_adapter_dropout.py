"""Dropout of the adapter's input: PyTorch's own mask, the same in both directions, never on the base path."""

import pytest
import torch
import torch.nn.functional as F

from adalora_fast.ops import adalora_linear
from tests.helpers.naive import draw_grad, formula, leaves, make_case, onto_linear, results, truth
from tests.helpers.tolerances import assert_accurate

FUNCTIONS = [adalora_linear, onto_linear]


def keep_factors(x, p, seed):
    """What dropout multiplies every entry of x with, under this seed: 0 or 1 / (1 - p)."""
    torch.manual_seed(seed)
    return F.dropout(torch.ones_like(x), p, True)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)], ids=str)
def test_mask_is_that_of_torch_dropout_in_both_directions(function, p, shape):
    case = make_case(shape, 6, 3)
    grad = draw_grad(case)
    exact = truth(case, grad, keep=keep_factors(case.x, p, seed=11))
    ours = leaves(case)
    torch.manual_seed(11)
    got = results(function(*ours, dropout_p=p, training=True), ours, grad)
    for name in exact:
        assert_accurate(got[name], exact[name], torch.float64, what=name)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_generator_advances_as_with_torch_dropout(function, dtype):
    case = make_case((7, 5), 6, 3, dtype=dtype)
    torch.manual_seed(5)
    function(*case, dropout_p=0.3, training=True)
    after_ours = torch.rand(4)
    torch.manual_seed(5)
    F.dropout(case.x, 0.3, True)
    assert torch.equal(after_ours, torch.rand(4))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.5}, {"training": True}, {"dropout_p": 0.5, "training": False}]
)
def test_no_dropout_where_it_is_off(function, options):
    case = make_case()
    torch.manual_seed(5)
    y = function(*case, **options)
    drawn = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4)), "random numbers were drawn"
    assert torch.equal(y, function(*case))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_everything_dropped_leaves_the_base_exactly(function):
    case = make_case()
    ours = leaves(case)
    y = function(*ours, dropout_p=1.0, training=True)
    assert torch.equal(y, F.linear(case.x, case.weight, case.bias))
    grad = torch.ones_like(y)
    y.backward(grad)
    assert torch.equal(ours.x.grad, grad @ case.weight)
    assert all((factor.grad == 0).all() for factor in ours.factors)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_statistics(function):
    case = make_case((200, 8), 5, 4, bias=False)
    expected, base = formula(*case), F.linear(case.x, case.weight)
    torch.manual_seed(0)
    draws = torch.stack([function(*case, dropout_p=0.25, training=True) for _ in range(400)])
    spread = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * spread + 1e-12).all(), (
        "the mean must be the output without dropout"
    )
    delta = case.lora_A.t() @ (case.lora_E * case.lora_B.t()) * case.scaling  # [K, N]
    variance = case.x.square() @ delta.square() * 0.25 / 0.75
    assert (draws.var(0).sum() / variance.sum() - 1).abs() < 0.05
    assert not torch.allclose(draws.mean(0), base)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_under_a_fixed_seed(function):
    case = leaves(make_case((4, 5), 6, 3))
    tensors = (case.x, *case.factors)

    def seeded(x, lora_A, lora_E, lora_B):
        torch.manual_seed(7)
        return function(x, case.weight, case.bias, lora_A, lora_E, lora_B, 0.75, dropout_p=0.4, training=True)

    assert torch.autograd.gradcheck(seeded, tensors)


def test_two_calls_draw_two_masks():
    case = make_case((50, 40), 6, 3)
    first, second = (adalora_linear(*case, dropout_p=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ()], ids=str)
def test_dropout_with_a_trained_base(frozen):
    case = make_case()
    grad = draw_grad(case)
    exact = truth(case, grad, frozen, keep=keep_factors(case.x, 0.5, seed=2))
    ours = leaves(case, frozen=frozen)
    torch.manual_seed(2)
    got = results(adalora_linear(*ours, dropout_p=0.5, training=True), ours, grad)
    for name in exact:
        assert_accurate(got[name], exact[name], torch.float64, what=name)


@pytest.mark.parametrize("needed", ["x", "lora_A", "lora_E", "lora_B"])
def test_dropout_with_one_needed_gradient(needed):
    case = make_case()
    grad = draw_grad(case)
    exact = truth(case, grad, keep=keep_factors(case.x, 0.5, seed=2))
    ours = leaves(case, frozen=tuple({"x", "weight", "bias", "lora_A", "lora_E", "lora_B"} - {needed}))
    torch.manual_seed(2)
    got = results(adalora_linear(*ours, dropout_p=0.5, training=True), ours, grad)
    assert set(got) == {"y", needed}
    assert_accurate(got[needed], exact[needed], torch.float64)
