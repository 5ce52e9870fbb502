"""The Triton orthogonality kernels against autograd of the plain formula in float64."""

import pytest
import torch

from adalora_fast.ops import orthogonality
from adalora_fast.ops.dispatch import backend, tables
from adalora_fast.ops.dispatch.launch import is_interpreted
from adalora_fast.ops.orthogonality import reference
from tests.helpers.kernels import DEVICE, ON_DEVICE, counted, needs_triton, poisoned
from tests.helpers.tolerances import RelativeRule, assert_accurate
from tests.ops.test_orthogonality import PENALTIES, make_factors, naive, with_gradients

pytestmark = [needs_triton, *ON_DEVICE, pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")]
kernels = pytest.importorskip("adalora_fast.ops.orthogonality.triton", reason="triton is not installed")

# (in, r, out): repeated shapes, a rank of zero, widths around a tile, a chunk and two
SHAPES = ((5, 3, 7), (5, 3, 7), (63, 8, 130), (6, 0, 3), (9, 1, 1), (200, 12, 65))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", {16: 64, 32: 64, 64: 64, 128: 64})
    monkeypatch.setattr(kernels, "NORMS", 4)
    kernels._segments.cache_clear()
    yield
    kernels._segments.cache_clear()


def make(shapes=SHAPES, dtype=torch.float32, seed=0, std=0.5):
    sides = make_factors(shapes, dtype, seed, std)
    return [[t.detach().to(DEVICE) for t in side] for side in sides]


def parts(functions, lora_A, lora_B, penalty):
    """(value, gradient of every factor) of ``functions``' loss, on the CPU."""
    value, stacks = functions.loss(lora_A, lora_B, penalty, True)
    groups = [reference.groups_by_shape(reference.shapes_of(side)) for side in (lora_A, lora_B)]
    grads = {}
    for side, count in ((0, len(groups[0])), (1, len(groups[1]))):
        for stack, group in zip(stacks[:count], groups[side], strict=True):
            grads.update({(side, i): part.cpu() for i, part in zip(group, stack.unbind(), strict=True)})
        stacks = stacks[count:]
    return value.cpu(), [grads[side, i] for side in (0, 1) for i in range(len(lora_A))]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_relative_rule(penalty, dtype):
    if dtype == torch.bfloat16 and is_interpreted():
        pytest.skip("the interpreter cuts bfloat16 off where hardware rounds; see the next test")
    rule = RelativeRule(dtype)
    for seed in range(2):
        lora_A, lora_B = make(((63, 8, 20), (9, 12, 65)), dtype, seed)
        with poisoned(), counted() as names:
            value, grads = parts(kernels, lora_A, lora_B, penalty)
        assert names == ["gram_kernel", "gradient_kernel"]
        _, plain = with_gradients(naive, *[[t.cpu() for t in s] for s in (lora_A, lora_B)], penalty)
        wide = [[t.cpu().double() for t in side] for side in (lora_A, lora_B)]
        exact_value, exact = with_gradients(naive, *wide, penalty)
        assert value.dtype == torch.float32, "the value is in float32"
        assert_accurate(value, exact_value, torch.float32)
        for got, other, expected in zip(grads, plain, exact, strict=True):
            rule.add(f"gradient {tuple(got.shape)}", got, other, expected)
    rule.check()


@pytest.mark.skipif(not is_interpreted(), reason="hardware rounds; the relative rule applies there")
def test_bfloat16_gradients_are_the_float32_ones_cut_off():
    narrow = make(((63, 8, 20), (9, 12, 65)), torch.bfloat16)
    value, grads = parts(kernels, *narrow, "fro")
    wide_value, wide = parts(kernels, *[[t.float() for t in side] for side in narrow], "fro")
    assert torch.equal(value, wide_value)
    for got, full in zip(grads, wide, strict=True):
        assert torch.equal(got.view(torch.int16), (full.view(torch.int32) >> 16).to(torch.int16))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shapes", [
    SHAPES, ((1, 1, 1),), ((70, 16, 64),), ((33, 33, 65), (40, 17, 20)), ((70, 100, 40), (7, 3, 9)),
], ids=str)  # fmt: skip
def test_value_and_gradient(shapes, penalty):
    lora_A, lora_B = make(shapes)
    with poisoned():
        value, grads = parts(kernels, lora_A, lora_B, penalty)
    wide = [[t.cpu().double() for t in side] for side in (lora_A, lora_B)]
    exact_value, exact = with_gradients(naive, *wide, penalty)
    assert_accurate(value, exact_value, torch.float32)
    for got, expected in zip(grads, exact, strict=True):
        assert_accurate(got, expected, torch.float32, factor=2)


def test_through_the_op(monkeypatch):
    """The op picks the kernels, and one backward reaches every factor."""
    monkeypatch.setenv(backend.VARIABLE, "triton")
    for cached in (backend.choose, backend.kernel):
        cached.cache_clear()
    try:
        lora_A, lora_B = ([t.requires_grad_() for t in side] for side in make(((5, 3, 7), (5, 3, 7))))
        with counted() as names:
            value, _ = orthogonality(lora_A, lora_B)
            (value * -3.0).backward()
        assert names == ["gram_kernel", "gradient_kernel"]
    finally:
        monkeypatch.undo()
        for cached in (backend.choose, backend.kernel):
            cached.cache_clear()
    wide = [[t.detach().cpu().double() for t in side] for side in (lora_A, lora_B)]
    _, exact = with_gradients(naive, *wide, "fro", -3.0)
    for factor, expected in zip((*lora_A, *lora_B), exact, strict=True):
        assert_accurate(factor.grad.cpu(), expected, torch.float32)


def test_mixed_types_and_strided_factors():
    lora_A, lora_B = make(((9, 3, 7), (9, 3, 7), (9, 4, 6)))
    lora_A[1], lora_B[2] = lora_A[1].bfloat16(), lora_B[2].half()
    lora_A[2] = lora_A[2].t().contiguous().t()
    lora_B[0] = torch.stack([lora_B[0], torch.full_like(lora_B[0], float("nan"))], dim=-1)[..., 0]
    for penalty in PENALTIES:
        value, grads = parts(kernels, lora_A, lora_B, penalty)
        want, others = parts(reference, lora_A, lora_B, penalty)
        assert_accurate(value, want.double(), torch.float32)
        for got, other in zip(grads, others, strict=True):
            assert got.dtype == other.dtype
            assert_accurate(got, other.double(), got.dtype, factor=4)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_orthonormal_factors_have_no_gradient(penalty):
    lora_A, lora_B = [torch.eye(6)[:3].to(DEVICE)], [torch.eye(5)[:, :3].contiguous().to(DEVICE)]
    value, grads = parts(kernels, lora_A, lora_B, penalty)
    assert value == 0 and all((grad == 0).all() for grad in grads)


def test_without_gradients_none_is_computed():
    lora_A, lora_B = make()
    for penalty in PENALTIES:
        with poisoned(), counted() as names:
            value, stacks = kernels.loss(lora_A, lora_B, penalty, False)
        assert stacks == [] and names == ["gram_kernel", "gradient_kernel"]
        wide = [[t.cpu().double() for t in side] for side in (lora_A, lora_B)]
        assert_accurate(value.cpu(), naive(*wide, penalty), torch.float32)


def test_ranks_of_zero_only():
    lora_A, lora_B = make(((4, 0, 5),))
    value, stacks = kernels.loss(lora_A, lora_B, "fro", True)
    assert value == 0 and [stack.shape for stack in stacks] == [(1, 0, 4), (1, 5, 0)]


def test_many_layers_are_still_two_launches():
    lora_A, lora_B = make(((3, 2, 2),) * 30)
    with poisoned(), counted() as names:
        value, grads = parts(kernels, lora_A, lora_B, "fro")
    assert names == ["gram_kernel", "gradient_kernel"]
    want, others = parts(reference, lora_A, lora_B, "fro")
    assert_accurate(value, want.double(), torch.float32)
    for got, other in zip(grads, others, strict=True):
        assert_accurate(got, other.double(), torch.float32, factor=2)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.double(), r"a factor is torch\.float64"),
    (lambda t: torch.cat([t] * 26, dim=t.shape.index(5)), "a layer has rank 130, they take up to 128"),
], ids=["float64", "rank"])  # fmt: skip
def test_what_the_kernels_refuse_goes_to_the_reference_and_says_so(change, said):
    tables.say_once.cache_clear()
    lora_A, lora_B = ([change(t) for t in side] for side in make(((9, 5, 7),)))
    with pytest.warns(UserWarning, match=said), counted() as names:
        value, _ = kernels.loss(lora_A, lora_B, "fro", True)
    assert not names and torch.equal(value, reference.loss(lora_A, lora_B, "fro", True)[0])
