"""Selection and masking in C++ against the reference, over sizes and types that sorting hides nothing in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.ops.allocation import native, reference
from tests.helpers.backends import each_backend

backend_in_use = each_backend("allocation", "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tied(count, values, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-values, values, (count,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 31, 1000, 1025, 65536])
@pytest.mark.parametrize("values", [1, 5, 10**6])
def test_as_the_reference(dtype, count, values):
    scores = tied(count, values, dtype)
    scores[:: max(count // 7, 2)] = float("nan")
    for budget in {0, 1, count // 3, count - 1, count, count + 1}:
        kept = native.select(scores, torch.tensor(budget))
        assert torch.equal(kept, reference.select(scores, torch.tensor(budget))), budget
        assert kept.sum() == min(budget, count)


layers_strategy = st.lists(
    st.lists(st.floats(width=32, allow_nan=False), min_size=0, max_size=5), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(layers=layers_strategy, budget=st.integers(0, 40))
def test_exactly_the_budget_and_none_better_left_out(layers, budget):
    scores = torch.tensor([score for layer in layers for score in layer])
    kept = native.select(scores, torch.tensor(budget))
    assert kept.sum() == min(budget, scores.numel())
    if 0 < kept.sum() < scores.numel():
        assert scores[kept].min() >= scores[~kept].max()


@settings(max_examples=100, deadline=None)
@given(ranks=st.lists(st.integers(0, 5), min_size=1, max_size=8), share=st.floats(0, 1), data=st.data())
def test_permuting_layers_permutes_the_result(ranks, share, data):
    order = data.draw(st.permutations(range(len(ranks))))
    seed = data.draw(st.integers(0, 2**31))
    scores = torch.randperm(sum(ranks), generator=torch.Generator().manual_seed(seed)).float() - 3
    budget = torch.tensor(int(share * sum(ranks)))
    permuted = torch.cat([scores.split(ranks)[k] for k in order])
    kept = native.select(scores, budget).split(ranks)
    assert torch.equal(native.select(permuted, budget), torch.cat([kept[k] for k in order]))


@pytest.mark.parametrize("layers", [1, 72, 500])
def test_masking_layers_of_any_type_and_layout(layers):
    generator = torch.Generator().manual_seed(layers)

    def lambdas():
        return [
            torch.full((r, 2), float("nan"), dtype=DTYPES[k % 4])[:, :1]  # strided; what is beside stays
            if k % 5 == 0
            else torch.full((r, 1), 3.0, dtype=DTYPES[k % 4])
            for k, r in enumerate(ranks)
        ]

    ranks = [(4, 0, 1, 16)[k % 4] for k in range(layers)]
    mask = torch.rand(sum(ranks), generator=generator) > 0.5
    ours, plain = lambdas(), lambdas()
    native.apply_mask_(mask, ours)
    reference.apply_mask_(mask, plain)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.nan_to_num(5), b.nan_to_num(5))
        assert a._base is None or a._base[:, 1].isnan().all()


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (torch.tensor(1.0), "budget must be int64 or int32"),
        (torch.tensor([1, 2]), "budget must be a scalar"),
    ],
)
def test_a_budget_that_is_none(budget, said):
    with pytest.raises(RuntimeError, match=said):
        native.select(torch.zeros(3), budget)


def test_a_mask_of_the_wrong_length_writes_nothing():
    values = torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="the mask has 2 entries for 3 triplets"):
        native.apply_mask_(torch.zeros(2, dtype=torch.bool), [values])
    assert (values == 1).all()


def test_the_ranks_that_are_left():
    scores, values = torch.tensor([5.0, 1.0, 4.0, 2.0, 9.0]), [torch.ones(r, 1) for r in (2, 0, 2, 1)]
    mask, ranks = torch.ops.adalora_fast_C.allocation_allocate_(scores, torch.tensor(3), values)
    assert mask.tolist() == [True, False, True, False, True] and ranks.tolist() == [1, 0, 1, 1]
