"""The orthogonality term: value and closed-form gradient against autograd of the plain formula in float64."""

import pytest
import torch

from adalora_fast.ops import orthogonality
from adalora_fast.ops.orthogonality import gradients
from tests.helpers.properties import example, given, settings, st
from tests.helpers.tolerances import RelativeRule, assert_accurate

PENALTIES = ("fro", "squared")
SHAPES = ((5, 3, 7), (5, 3, 7), (40, 8, 31), (6, 0, 3), (9, 1, 1), (5, 2, 5), (3, 6, 2))  # (in, r, out)


def make_factors(shapes=SHAPES, dtype=torch.float64, seed=0, std=0.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).to(dtype).requires_grad_()

    return [draw(r, k) for k, r, _ in shapes], [draw(n, r) for _, r, n in shapes]


def naive(lora_A, lora_B, penalty, dtype=None):
    """The formula of the documentation, one matrix after the other."""
    grams = [Q @ Q.T for Q in lora_A] + [P.T @ P for P in lora_B]
    grams = [g if dtype is None else g.to(dtype) for g in grams]
    norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype)) for g in grams if len(g)]
    if penalty == "squared":
        return sum(norm**2 for norm in norms)
    return sum(norms) / len(grams)


def with_gradients(function, lora_A, lora_B, penalty, scale=1.0):
    leaves = [[t.detach().clone().requires_grad_() for t in side] for side in (lora_A, lora_B)]
    value = function(*leaves, penalty)
    (value * scale).backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for side in leaves for t in side]
    return value.detach(), grads


def ours(lora_A, lora_B, penalty):
    return orthogonality(lora_A, lora_B, penalty)[0]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("scale", [1.0, 0.1, -3.0])
def test_value_and_gradient(penalty, scale):
    factors = make_factors()
    value, grads = with_gradients(ours, *factors, penalty, scale)
    want, exact = with_gradients(naive, *factors, penalty, scale)
    assert_accurate(value, want, torch.float64)
    for got, expected in zip(grads, exact, strict=True):
        assert_accurate(got, expected, torch.float64)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_relative_rule(penalty, dtype):
    rule = RelativeRule(dtype)
    for seed in range(12):
        factors = make_factors(SHAPES[2:3] * 3 + SHAPES[4:], dtype, seed)
        value, grads = with_gradients(ours, *factors, penalty)
        plain_value, plain = with_gradients(naive, *factors, penalty)
        wide = [[t.detach().double() for t in side] for side in factors]
        exact_value, exact = with_gradients(naive, *wide, penalty)
        assert value.dtype == torch.float32, "the value is in at least float32"
        assert_accurate(value, exact_value, torch.float32)
        assert abs(value - exact_value) <= abs(plain_value - exact_value) + 1e-5 * exact_value
        for got, other, expected in zip(grads, plain, exact, strict=True):
            rule.add(f"gradient {tuple(got.shape)}", got, other, expected)
    rule.check()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradcheck(penalty):
    lora_A, lora_B = make_factors(((4, 2, 5), (4, 2, 5), (3, 1, 3)))
    n = len(lora_A)
    assert torch.autograd.gradcheck(lambda *t: ours(list(t[:n]), list(t[n:]), penalty), (*lora_A, *lora_B))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_orthonormal_factors_have_no_gradient(penalty, dtype):
    Q = torch.eye(6, dtype=dtype)[:3].clone().requires_grad_()
    P = torch.eye(5, dtype=dtype)[:, :3].clone().requires_grad_()
    other = torch.randn(3, 6, dtype=dtype).requires_grad_()
    value, stacks = orthogonality([Q, other], [P, P.detach().clone()], penalty)
    value.backward()
    assert (Q.grad == 0).all() and (P.grad == 0).all()
    assert other.grad.isfinite().all() and (other.grad != 0).any()
    assert all(stack.isfinite().all() for stack in stacks)
    alone, _ = orthogonality([Q], [P], penalty)
    assert alone.item() == 0.0


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("std", [0.0, 1e-25, 1e10])
def test_extreme_factors(penalty, std):
    lora_A, lora_B = make_factors(((40, 8, 31),), torch.float64, std=std)
    value, grads = with_gradients(ours, lora_A, lora_B, penalty)
    want, exact = with_gradients(naive, lora_A, lora_B, penalty)
    assert_accurate(value, want, torch.float64)
    for got, expected in zip(grads, exact, strict=True):
        assert_accurate(got, expected, torch.float64)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_rank_zero(penalty):
    lora_A, lora_B = make_factors(((4, 0, 5),))
    value, _ = orthogonality(lora_A, lora_B, penalty)
    assert value.item() == 0.0
    value.backward()
    assert lora_A[0].grad is None or lora_A[0].grad.shape == (0, 4)


def rounding(P, gradient):
    """How far two float64 computations of `gradient`, a multiple of P (PᵀP − I), may be apart.

    A sum of n products is off by at most n eps / 2 times what it adds up (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1); P PᵀP and P cancel where PᵀP is nearly the identity on P's rows.
    """
    m, r = P.shape
    product = P @ (P.T @ P - torch.eye(r, dtype=P.dtype))
    multiple = (gradient.norm() / product.norm()).nan_to_num()
    added_up = P.norm() * (P.norm() ** 2 + r**0.5)
    return (m + r + 2) * torch.finfo(P.dtype).eps * multiple * added_up


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=6
    ),
    penalty=st.sampled_from(PENALTIES),
)
@example(shapes=[(1, 3, 4), (4, 1, 6), (5, 5, 1)], penalty="fro")  # the last P is of length 0.9998
@example(shapes=[(1, 2, 2), (1, 5, 1), (1, 5, 1), (2, 2, 1), (5, 5, 1)], penalty="squared")
def test_drawn_models(shapes, penalty):
    if not any(r for _, r, _ in shapes):
        return
    factors = make_factors(tuple(shapes))
    value, grads = with_gradients(ours, *factors, penalty)
    want, exact = with_gradients(naive, *factors, penalty)
    assert_accurate(value, want, torch.float64, factor=10)
    sides = [Q.detach().T for Q in factors[0]] + [P.detach() for P in factors[1]]
    for P, got, expected in zip(sides, grads, exact, strict=True):
        if P.numel():
            assert (got - expected).norm() <= rounding(P, expected)


def test_one_autograd_node():
    lora_A, lora_B = make_factors()
    value, _ = orthogonality(lora_A, lora_B)  # PyTorch 2.11 forgets the nodes of a value that is gone
    following = [function for function, _ in value.grad_fn.next_functions if function is not None]
    assert len(following) == len(lora_A) + len(lora_B)
    assert all("AccumulateGrad" in function.name() for function in following)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_frozen_factors_and_shared_ones(penalty):
    lora_A, lora_B = make_factors(((5, 3, 7), (5, 3, 7)))
    lora_A[0].requires_grad_(False)
    lora_B[1] = lora_B[0]  # one parameter, counted twice
    orthogonality(lora_A, lora_B, penalty)[0].backward()
    copies = [[t.detach().clone().requires_grad_() for t in side] for side in (lora_A, lora_B)]
    naive(*copies, penalty).backward()
    assert lora_A[0].grad is None
    assert_accurate(lora_A[1].grad, copies[0][1].grad, torch.float64)
    assert_accurate(lora_B[0].grad, copies[1][0].grad + copies[1][1].grad, torch.float64)


def test_mixed_types_keep_float64():
    lora_A, lora_B = make_factors(((5, 3, 7), (6, 2, 4)), torch.float32)
    lora_A[1] = lora_A[1].detach().double().requires_grad_()
    value, _ = orthogonality(lora_A, lora_B)
    value.backward()
    assert lora_A[0].grad.dtype == torch.float32 and lora_A[1].grad.dtype == torch.float64


@pytest.mark.parametrize("penalty", PENALTIES)
def test_stacks_are_the_gradient(penalty):
    lora_A, lora_B = make_factors()
    value, stacks = orthogonality(lora_A, lora_B, penalty)
    parts = gradients(stacks, lora_A, lora_B)
    value.backward()
    for part, factor in zip((*parts[0], *parts[1]), (*lora_A, *lora_B), strict=True):
        assert torch.equal(part, factor.grad)


def test_without_gradients_none_is_computed():
    with torch.no_grad():
        value, stacks = orthogonality(*make_factors())
    assert stacks == [] and not value.requires_grad


def test_backward_twice_through_a_kept_graph():
    lora_A, lora_B = make_factors()
    value, _ = orthogonality(lora_A, lora_B)
    first = torch.autograd.grad(value, lora_A, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(value, lora_A), strict=True))


def test_second_order_is_refused_in_one_line():
    lora_A, lora_B = make_factors()
    value, _ = orthogonality(lora_A, lora_B)
    with pytest.raises(RuntimeError, match="no second derivative; call backward without") as error:
        torch.autograd.grad(value, lora_A, create_graph=True)
    assert "\n" not in str(error.value)


def test_autocast_does_not_reach_inside():
    lora_A, lora_B = make_factors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = orthogonality(lora_A, lora_B)
    assert value.dtype == torch.float32 and torch.equal(value, orthogonality(lora_A, lora_B)[0])


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "penalty", "said"),
    [
        ([], [], "fro", "at least one, got 0 and 0"),
        ([torch.randn(2, 5)], [], "fro", "got 1 and 0"),
        ([torch.randn(2, 5)], [torch.randn(6, 2)], "l1", "orth_penalty 'l1' is not one of"),
        ([torch.randn(2, 5)], [torch.randn(6, 3)], "fro", r"lora_A \(2, 5\) and lora_B \(6, 3\)"),
        ([torch.randn(5)], [torch.randn(6, 1)], "fro", r"lora_A \(5,\)"),
    ],
    ids=["empty", "lengths", "penalty", "ranks", "dimensions"],
)
def test_bad_arguments(lora_A, lora_B, penalty, said):
    with pytest.raises(ValueError, match=said) as error:
        orthogonality(lora_A, lora_B, penalty)
    assert "\n" not in str(error.value)
