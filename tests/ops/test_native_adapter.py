"""The C++ end of the adapter's backward against the reference: dA and dE of V in one pass."""

import pytest
import torch

from adalora_fast.ops.adapter import reference
from adalora_fast.ops.dispatch import backend, native
from tests.helpers.tolerances import RelativeRule

if reason := native.cpu_refusal("cpu"):
    pytest.skip(reason, allow_module_level=True)
from adalora_fast.ops.adapter.native import right_factor_gradients

SIZES = [(1, 1), (1, 7), (3, 8), (8, 63), (12, 1000), (16, 768), (33, 129)]


def draw(rank, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (rank, width), (rank, width), (rank, 1)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def test_it_is_what_runs_on_a_cpu():
    assert backend.choose("adapter", "cpu").backend == "cpu"
    assert backend.kernel("adapter", "cpu").backward.keywords == {"finish": right_factor_gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype):
    rule = RelativeRule(dtype)
    for seed in range(4):
        V, A, E = draw(*size, dtype, seed)
        exact = reference.right_factor_gradients(V.double(), A.double(), E.double(), True, True)
        plain = reference.right_factor_gradients(V.clone(), A, E, True, True)
        ours = right_factor_gradients(V.clone(), A, E, True, True)
        for name, made, by_torch, truth in zip(("dA", "dE"), ours, plain, exact):
            rule.add(name, made, by_torch, truth)
        assert torch.equal(ours[0], plain[0])  # one product each
    rule.check()


@pytest.mark.parametrize("rank", [0, 3])
def test_no_rank_or_no_width(rank):
    V, A, E = draw(rank, 0, torch.float32)
    dA, dE = right_factor_gradients(V, A, E, True, True)
    assert dA.shape == (rank, 0) and dE.shape == (rank, 1) and not dE.any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value):
    V, A, E = draw(3, 9, torch.float32)
    V[1, 4] = value
    dA, dE = right_factor_gradients(V, A, E, True, True)
    assert dA.isfinite().sum() == 26 and not dA[1, 4].isfinite()
    assert dE.isfinite().tolist() == [[True], [False], [True]]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_it_does_not_do_the_reference_does(needs, dtype):
    V, A, E = draw(3, 9, dtype)
    expected = reference.right_factor_gradients(V.clone(), A, E, *needs)
    for made, plain in zip(right_factor_gradients(V.clone(), A, E, *needs), expected):
        assert (made is None and plain is None) or torch.equal(made, plain)


def test_factors_in_other_layouts():
    V, A, E = draw(4, 6, torch.float32)
    expected = reference.right_factor_gradients(V.clone(), A, E, True, True)
    strided = A.t().contiguous().t(), torch.stack([E, E], 1)[:, 0]
    for a, e in ((strided[0], E), (A, strided[1]), strided):
        for made, plain in zip(right_factor_gradients(V.clone(), a, e, True, True), expected):
            torch.testing.assert_close(made, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda V, A, E: (V, A[:, 1:].contiguous(), E), "must be"),
        (lambda V, A, E: (V, A.double(), E), "of one type"),
        (lambda V, A, E: (V.t(), A.t(), E), "contiguous|must be"),
        (lambda V, A, E: (V.half(), A.half(), E.half()), "float32 or float64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = change(*draw(3, 3, torch.float32))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.adalora_fast_C.adapter_right_factor_gradients_(*arguments)
