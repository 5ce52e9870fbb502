"""Selection keeps exactly the budget, by a rule without ties; masking touches λ of the others only."""

import pytest
import torch

from adalora_fast.ops import allocate_, apply_mask_, select_triplets
from tests.helpers.backends import each_backend
from tests.helpers.properties import given, settings, st

backend_in_use = each_backend("allocation", "reference", "cpu")
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3.4e38]


def select(scores, budget, dtype=torch.float32):
    scores = torch.as_tensor(scores, dtype=dtype)
    mask = select_triplets(scores, torch.tensor(budget))
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    return mask.tolist()


def oracle(scores, budget):
    """The rule in words: highest score first, then the lower position; NaN counts as -inf."""
    comparable = [float("-inf") if score != score else score for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (-comparable[i], i))
    return [i in order[: max(budget, 0)] for i in range(len(scores))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_budget(dtype):
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for budget in range(52):
        kept = select(scores, budget, dtype)
        assert sum(kept) == min(budget, 50)
        assert kept == oracle(scores.tolist(), budget)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("count", [1, 7, 33, 1000])
def test_all_equal_keeps_the_first(value, count):
    for budget in (0, 1, count // 2, count - 1, count):
        assert select([value] * count, budget) == [True] * budget + [False] * (count - budget)


def test_zeros_of_both_signs_are_equal():
    assert select([-0.0, 0.0, -0.0, 0.0], 2) == [True, True, False, False]
    assert select([0.0, -0.0, 0.0, -0.0, 1.0], 3) == [True, True, False, False, True]


def test_not_a_number_is_the_lowest():
    nan, inf = float("nan"), float("inf")
    assert select([nan, 1.0, nan, 0.0, inf], 3) == [False, True, False, True, True]
    assert select([nan, -inf], 1) == [True, False], "both are the lowest: a tie"
    assert select([nan, -1e38, nan], 1) == [False, True, False]


def test_infinities():
    inf = float("inf")
    assert select([1.0, inf, -inf, inf], 2) == [False, True, False, True]
    assert select([inf, 1.0, -inf, inf], 3) == [True, True, False, True]


def test_many_ties_over_many_triplets():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (3000,), generator=generator).float()
    for budget in (1, 749, 750, 1500, 2999):
        assert select(scores, budget) == oracle(scores.tolist(), budget)


@settings(max_examples=300, deadline=None)
@given(
    scores=st.lists(
        st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-3, 3).map(float)), max_size=40
    ),
    budget=st.integers(0, 45),
)
def test_against_sorting(scores, budget):
    assert select(scores, budget) == oracle(scores, budget)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_any_integer_budget(dtype):
    mask = select_triplets(torch.tensor([3.0, 1.0, 2.0]), torch.tensor(2, dtype=dtype))
    assert mask.tolist() == [True, False, True]


def test_scores_are_left_alone_and_need_no_gradient():
    scores = torch.tensor([1.0, float("nan"), 2.0])
    before = scores.clone()
    select(scores, 1)
    assert torch.equal(scores.nan_to_num(7), before.nan_to_num(7))


def test_a_score_vector_that_is_a_view():
    wide = torch.arange(20.0)
    assert select_triplets(wide[::2], torch.tensor(3)).tolist() == [False] * 7 + [True] * 3


RANKS = (3, 0, 1, 4)


def lambdas(dtype=torch.float32):
    return [torch.randn(r, 1, generator=torch.Generator().manual_seed(r)).to(dtype) for r in RANKS]


@settings(max_examples=50, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=sum(RANKS), max_size=sum(RANKS)))
def test_mask_is_applied_exactly(mask):
    values = lambdas()
    before = torch.cat(values).flatten().tolist()
    apply_mask_(torch.tensor(mask), values)
    after = torch.cat(values).flatten().tolist()
    assert after == [value if keep else 0.0 for keep, value in zip(mask, before, strict=True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0], ids=str)
def test_a_masked_value_becomes_zero_whatever_it_was(value):
    values = [torch.full((2, 1), value), torch.ones(1, 1)]
    apply_mask_(torch.tensor([False, True, True]), values)
    assert values[0][0, 0].item() == 0.0 and not torch.signbit(values[0][0, 0])
    assert torch.equal(values[0][1:], torch.full((1, 1), value)) or value != value
    assert values[1].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kept_values_are_unchanged_in_every_type(dtype):
    values = lambdas(dtype)
    before = [v.clone() for v in values]
    apply_mask_(torch.ones(sum(RANKS), dtype=torch.bool), values)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_mixed_types_keep_their_values():
    values = [torch.tensor([[1 + 2**-40]], dtype=torch.float64), torch.tensor([[1.5]], dtype=torch.bfloat16)]
    before = [v.clone() for v in values]
    apply_mask_(torch.tensor([True, True]), values)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(values, before, strict=True))


def test_the_mask_is_visible_to_autograd():
    E = torch.ones(2, 1, requires_grad=True)
    loss = (E * E).sum()
    with torch.no_grad():
        apply_mask_(torch.tensor([True, False]), [E])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("length", [0, 1, 4, 6, 9])
def test_a_mask_of_the_wrong_length_is_refused(length):
    values = [torch.ones(2, 1), torch.ones(3, 1)]
    with pytest.raises((ValueError, RuntimeError)):
        apply_mask_(torch.zeros(length, dtype=torch.bool), values)
    assert all((v == 1).all() for v in values)


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.sampled_from(SPECIAL), min_size=sum(RANKS), max_size=sum(RANKS)),
    budget=st.integers(-1, 9),
)
def test_allocating_is_selecting_and_masking(scores, budget):
    ours, plain = lambdas(torch.bfloat16), lambdas(torch.bfloat16)
    scores, budget = torch.tensor(scores), torch.tensor(budget)
    mask = select_triplets(scores, budget)
    apply_mask_(mask, plain)
    assert torch.equal(allocate_(scores, budget, ours), mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_allocating_with_scores_of_another_model_writes_nothing():
    values = lambdas()
    with pytest.raises(ValueError, match=r"the score vector is \(7,\), the matrices have 8 triplets"):
        allocate_(torch.zeros(7), torch.tensor(2), values)
    assert all(torch.equal(a, b) for a, b in zip(values, lambdas(), strict=True))
