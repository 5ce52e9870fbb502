"""The Triton selection and masking kernels against the rule in words, bit for bit."""

import pytest
import torch

from adalora_fast.ops.allocation import reference
from adalora_fast.ops.dispatch import tables
from tests.helpers.kernels import DEVICE, ON_DEVICE, counted, needs_triton, poisoned
from tests.helpers.properties import HealthCheck, assume, given, settings, st
from tests.ops.test_allocation import SPECIAL, oracle

pytestmark = [needs_triton, *ON_DEVICE]
kernels = pytest.importorskip("adalora_fast.ops.allocation.triton", reason="triton is not installed")
INF, NAN = float("inf"), float("nan")


def select(scores, budget, dtype=torch.float32):
    scores = torch.as_tensor(scores, dtype=dtype, device=DEVICE)
    with poisoned(), counted() as names:
        mask = kernels.select(scores, torch.tensor(budget, device=DEVICE))
    assert names == ["select_kernel"] * bool(scores.numel())
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    return mask.tolist()


@pytest.fixture
def streamed(monkeypatch):
    """Scores that do not fit into one block are read again for every bit."""
    monkeypatch.setattr(kernels, "RESIDENT", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_budget(dtype):
    scores = torch.randn(33, generator=torch.Generator().manual_seed(0)).to(dtype)
    for budget in (-3, 0, 1, 16, 32, 33, 10**6):
        kept = select(scores, budget, dtype)
        assert sum(kept) == min(max(budget, 0), 33) and kept == oracle(scores.tolist(), budget)


@pytest.mark.parametrize("value", [0.0, -2.5, INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("count", [1, 65])
def test_all_equal_keeps_the_first(value, count):
    for budget in (0, 1, count // 2, count):
        assert select([value] * count, budget) == [True] * budget + [False] * (count - budget)


def test_zeros_of_both_signs_are_equal_and_not_a_number_is_the_lowest():
    assert select([-0.0, 0.0, -0.0, 0.0], 2) == [True, True, False, False]
    assert select([NAN, 1.0, NAN, 0.0, INF], 3) == [False, True, False, True, True]
    assert select([NAN, -INF], 1) == [True, False] and select([NAN, -1e38, -INF], 1) == [False, True, False]
    assert select([1.0, INF, -INF, INF], 2) == [False, True, False, True]


@pytest.mark.parametrize("budget", [1, 70, 100])
def test_streamed(streamed, budget):
    generator = torch.Generator().manual_seed(3)
    ties = torch.randint(0, 4, (100,), generator=generator).float()
    assert select(ties, budget) == oracle(ties.tolist(), budget)
    distinct = torch.randn(100, generator=generator)
    assert select(distinct, budget) == oracle(distinct.tolist(), budget)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scores=st.lists(
        st.one_of(st.sampled_from([*SPECIAL, NAN]), st.floats(width=32), st.integers(-3, 3).map(float)),
        max_size=40,
    ),
    budget=st.integers(-1, 45),
)
def test_against_sorting(scores, budget):
    kept = select(scores, budget)
    assert (
        kept
        == oracle(scores, budget)
        == reference.select(torch.tensor(scores), torch.tensor(budget)).tolist()
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_exactly_the_budget_the_best_of_them_and_no_matter_in_which_order(ranks, share, seed, data):
    assume(sum(ranks) > 0)
    budget = round(share * sum(ranks))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(sum(ranks), generator=generator).float()  # distinct
    kept = torch.tensor(select(scores, budget))
    assert kept.sum() == budget
    if 0 < budget < len(kept):
        assert scores[kept].min() >= scores[~kept].max()
    order = data.draw(st.permutations(range(len(ranks))))
    layers, masks = scores.split(ranks), kept.split(ranks)
    permuted = select(torch.cat([layers[i] for i in order]), budget)
    assert permuted == torch.cat([masks[i] for i in order]).tolist()


def test_views_other_integers_and_no_triplets():
    assert select(torch.arange(20.0)[::2], 3) == [False] * 7 + [True] * 3
    scores = torch.tensor([3.0, 1.0, 2.0], device=DEVICE)
    mask = kernels.select(scores, torch.tensor(2, dtype=torch.int32, device=DEVICE))
    assert mask.tolist() == [True, False, True] and scores.tolist() == [3.0, 1.0, 2.0]
    assert select([], 1) == []


@pytest.mark.parametrize("scores", [torch.randn(5).double(), torch.randn(70)], ids=["float64", "many"])
def test_what_the_kernels_refuse_goes_to_the_reference_and_says_so(monkeypatch, scores):
    tables.say_once.cache_clear()
    monkeypatch.setattr(kernels, "LARGEST", 64)
    with pytest.warns(UserWarning, match="allocation runs in plain PyTorch"), counted() as names:
        mask = kernels.select(scores, torch.tensor(3))
    assert not names and torch.equal(mask, reference.select(scores, torch.tensor(3)))


RANKS = (3, 0, 1, 70, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_lambda_is_zeroed_exactly(dtype):
    values = [torch.randn(r, 1).to(DEVICE, dtype) for r in RANKS]
    values[2].fill_(NAN)
    mask = torch.rand(sum(RANKS), generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
    mask[3] = False
    wanted = [value.clone() for value in values]
    reference.apply_mask_(mask, wanted)
    with counted() as names:
        kernels.apply_mask_(mask, values)
        kernels.apply_mask_(mask, values)  # re-applying changes nothing
    assert names == ["zero_kernel"] * 2
    assert all(torch.equal(a, b) for a, b in zip(values, wanted, strict=True))
    assert not torch.signbit(values[2]).any()


def test_mixed_types_and_strided_lambda():
    wide = torch.full((6, 2), 7.0, device=DEVICE)
    values = [
        wide[::2, :1],
        torch.ones(2, 1, device=DEVICE).bfloat16(),
        torch.ones(2, 1, device=DEVICE).double(),
    ]
    kernels.apply_mask_(torch.tensor([False, True, False, True, False, False, True], device=DEVICE), values)
    assert [v.flatten().tolist() for v in values] == [[0, 7, 0], [1, 0], [0, 1]]
    assert wide.sum() == 7 * 10, "an entry between two of them was written"


def test_the_mask_is_visible_to_autograd():
    E = torch.ones(2, 1, requires_grad=True, device=DEVICE)
    loss = (E * E).sum()
    with torch.no_grad():
        kernels.apply_mask_(torch.tensor([True, False], device=DEVICE), [E])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
