"""RankAllocator in hand-written loops: the right triplets at the right steps, and nothing else touched."""

import copy
import warnings

import pytest
import torch
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator
from tests.helpers.scoring import triplet_scores
from tests.helpers.small_model import (
    RANKS,
    SCHEDULE,
    backward,
    kept,
    lambdas,
    layers_of,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
    snapshot,
    task_loss,
    train,
)

SCORES = ("sensitivity", "movement", "fisher", "gsnr", "magnitude")


def best(scores, budget):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget]
    return [i in order for i in range(len(scores))]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_whole_run_against_a_calculation_from_the_history(score, gamma):
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, score=score)
    histories = [[] for _ in parameters_of(model)]
    expected = [True] * sum(RANKS)
    for t in range(SCHEDULE["total_step"]):
        backward(model, t, gamma)
        optimizer.step()
        if (
            t < allocator.schedule.final_step
        ):  # the final mask rests on the steps before it, as in the public code
            for history, parameter in zip(histories, parameters_of(model), strict=True):
                history.append((parameter.detach().clone(), parameter.grad.clone()))
        before = lambdas(model)
        allocator.step()
        optimizer.zero_grad()
        budget = allocator.schedule.budget(t)
        assert allocator.budget == budget and allocator.t == t + 1
        if allocator.schedule.masks_at(t):
            scores = triplet_scores(histories, score, allocator.smoothing, allocator.beta1, allocator.beta2)
            expected = best(scores.tolist(), budget)
            assert sum(expected) == budget
        assert kept(allocator) == expected, f"step {t}"
        masks_now = allocator.schedule.masks_at(t) or t > allocator.schedule.final_step
        want = torch.where(torch.tensor(expected), before, 0.0) if masks_now else before
        assert torch.equal(lambdas(model), want), f"step {t}"
    assert allocator.is_final and sum(allocator.ranks().values()) == SCHEDULE["target_total_rank"]
    assert list(allocator.ranks()) == ["0", "2", "4"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("target", [1, 6, 11])
def test_exact_budget_at_every_mask(score, target):
    model = make_model(dtype=torch.float32)
    optimizer = make_optimizer(model)
    allocator = make_allocator(model, score=score, target_total_rank=target, deltaT=1, tinit=0, tfinal=0)
    for t in range(12):
        train(model, optimizer, allocator, [t])
        if allocator.schedule.masks_at(t):
            assert sum(allocator.ranks().values()) == allocator.schedule.budget(t)
            assert (lambdas(model) != 0).sum() == allocator.schedule.budget(t)


def test_nothing_but_lambda_is_touched():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    for t in range(12):
        backward(model, t)
        optimizer.step()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        random = torch.get_rng_state()
        allocator.step()
        assert torch.equal(random, torch.get_rng_state())
        for name, p in model.named_parameters():
            assert name.endswith("lora_E") or torch.equal(p, before[name])
            assert p.grad is None or torch.equal(p.grad, grads[name]), (
                "the allocator may not change a gradient"
            )
        optimizer.zero_grad()


def test_final_pattern_is_frozen_and_applied_again():
    model = make_model()
    optimizer, allocator = make_optimizer(model, weight_decay=0.0), make_allocator(model)
    train(model, optimizer, allocator, range(allocator.schedule.final_step + 1))
    pattern, zero = kept(allocator), lambdas(model) == 0
    assert allocator.is_final and zero.tolist() == [not keep for keep in pattern]
    updates = allocator.state_dict()["tensors"]["updates"]
    for t in range(allocator.schedule.final_step + 1, 20):
        backward(model, t)
        optimizer.step()
        assert (lambdas(model)[zero] != 0).any(), "the optimizer's momentum brings pruned triplets back"
        allocator.step()
        optimizer.zero_grad()
        assert kept(allocator) == pattern and (lambdas(model)[zero] == 0).all()
    assert torch.equal(allocator.state_dict()["tensors"]["updates"], updates)


def test_pruned_triplets_may_come_back_before_the_end():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, deltaT=3, tinit=1)
    train(model, optimizer, allocator, range(4))
    pruned = lambdas(model) == 0
    assert pruned.any()
    train(model, optimizer, allocator, [4])
    assert not allocator.schedule.masks_at(4) and (lambdas(model)[pruned] != 0).all()


def test_early_end_is_finished_with_a_warning():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    train(model, optimizer, allocator, range(5))
    with pytest.warns(
        UserWarning, match=r"after 5 of 12 steps, before the final allocation \(step 9\).* to 5 triplets"
    ):
        allocator.finalize()
    assert sum(allocator.ranks().values()) == 5 == (lambdas(model) != 0).sum() == allocator.budget
    pattern = kept(allocator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.finalize()
        train(model, optimizer, allocator, range(5, 8))
    assert kept(allocator) == pattern and (lambdas(model) != 0).sum() == 5


def test_finishing_a_finished_run_says_nothing():
    model = make_model()
    allocator = make_allocator(model)
    train(model, make_optimizer(model), allocator, range(12))
    before = snapshot(model, allocator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.finalize()
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert allocator.is_over


def test_ending_before_the_first_step():
    model = make_model()
    allocator = make_allocator(model)
    with pytest.warns(UserWarning) as warned:
        allocator.finalize()
    assert any("rests on 0 updates" in str(w.message) for w in warned)
    sizes = lambdas(make_model()).abs()
    assert kept(allocator) == (sizes >= sizes.sort().values[-5]).tolist(), "the largest |λ| are kept"


@pytest.mark.parametrize("jump", [10, 11, 50])
def test_missed_final_step(jump):
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    train(model, optimizer, allocator, range(5))
    backward(model, 5)
    optimizer.step()
    with pytest.warns(
        UserWarning, match=f"step 9, the final allocation, was missed; it is made now, at step {jump}"
    ):
        allocator.step(jump)
    assert allocator.is_final and sum(allocator.ranks().values()) == 5 and allocator.t == jump + 1


def test_the_last_step_is_final_without_a_final_phase():
    model = make_model()
    allocator = make_allocator(model, tfinal=0, deltaT=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, make_optimizer(model), allocator, range(12))
        allocator.finalize()
    assert sum(allocator.ranks().values()) == 5


@pytest.mark.parametrize("score", ["sensitivity", "fisher", "gsnr"])
def test_equal_scores_keep_the_first(score):
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, score=score)
    for t in range(12):
        for parameter in parameters_of(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        allocator.step()
        if allocator.schedule.masks_at(t):
            budget = allocator.schedule.budget(t)
            assert kept(allocator) == [True] * budget + [False] * (12 - budget)


def test_two_runs_are_equal():
    results = []
    for _ in range(2):
        model = make_model(dtype=torch.float32)
        allocator = make_allocator(model, score="movement")
        train(model, make_optimizer(model), allocator, range(12))
        results.append([kept(allocator), *(p.detach() for p in model.parameters())])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_no_gradient_at_all_is_an_error_and_changes_nothing():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    train(model, optimizer, allocator, range(2))
    before = snapshot(model, allocator)
    with pytest.raises(
        ValueError, match=r"no adapter parameter has a gradient; call allocator.step\(\) after"
    ):
        allocator.step()
    after = snapshot(model, allocator)
    assert before[1] == after[1] and all(torch.equal(before[2][n], after[2][n]) for n in before[2])


def test_a_layer_that_was_not_used():
    model = make_model()
    model.append(AdaLoraLinear(3, 3, 2, dtype=torch.float64))  # never called
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    for t in range(12):
        inner = model[:5]
        task_loss(inner, t).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert allocator.state_dict()["tensors"]["updates"].tolist() == [9] * 9 + [0] * 3
    assert allocator.ranks()["5"] == 0 and sum(allocator.ranks().values()) == 5


@pytest.mark.parametrize("score", SCORES)
def test_an_overflow_counts_as_a_step_and_leaves_the_statistics(score):
    model, other = make_model(), make_model()
    runs = [(m, make_optimizer(m), make_allocator(m, score=score, total_step=30)) for m in (model, other)]
    train(*runs[0], [0, 1])
    train(*runs[1], [0, 1])
    backward(model, 2)
    for parameter in parameters_of(model):
        parameter.grad.view(-1)[0] = float("inf")
    allocator = runs[0][2]
    allocator.step()  # the optimizer skipped
    runs[0][1].zero_grad()
    assert allocator.t == 3
    first, second = allocator.state_dict()["tensors"], runs[1][2].state_dict()["tensors"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masks_wait_for_enough_updates():
    """gsnr needs two gradients; with all but one step overflowing, a mask in between keeps everything."""
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, score="gsnr", tinit=0, deltaT=1)
    for t in range(4):
        backward(model, t)
        if t != 1:
            layers_of(model)[0].lora_E.grad.fill_(float("nan"))
        else:
            optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        assert all(kept(allocator)) and (lambdas(model) != 0).all(), f"step {t}"
    train(model, optimizer, allocator, [4])
    assert sum(kept(allocator)) == allocator.schedule.budget(4) < 12


def test_rank_zero_layers_take_part():
    model = make_model((4, 0, 5))
    allocator = make_allocator(model)
    train(model, make_optimizer(model), allocator, range(12))
    assert allocator.ranks()["2"] == 0 and sum(allocator.ranks().values()) == 5


def test_reset_starts_again():
    model = make_model()
    allocator = make_allocator(model)
    fresh = snapshot(model, allocator)[1:]
    train(model, make_optimizer(model), allocator, range(12))
    allocator.reset()
    again = snapshot(model, allocator)[1:]
    assert fresh[0] == again[0] and all(torch.equal(fresh[1][n], again[1][n]) for n in fresh[1])
    train(model, make_optimizer(model), allocator, range(12))
    assert sum(allocator.ranks().values()) == 5


def test_set_total_step_keeps_the_rest():
    model = make_model()
    allocator = make_allocator(model)
    allocator.set_total_step(40)
    assert (allocator.schedule.total_step, allocator.schedule.tinit, allocator.schedule.final_step) == (
        40,
        2,
        37,
    )
    with pytest.raises(
        ValueError, match=r"tinit \(2\) \+ tfinal \(3\) must be smaller than total_step \(5\)"
    ):
        allocator.set_total_step(5)
    assert allocator.schedule.total_step == 40


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"score": "entropy"}, ValueError, "score 'entropy' is not one of"),
        ({"smoothing": "median"}, ValueError, "smoothing 'median' is not one of"),
        ({"beta1": 0.0}, ValueError, "beta1 must be between 0 and 1, got 0.0"),
        ({"beta1": 1.0}, ValueError, "beta1 must be between 0 and 1, got 1.0"),
        ({"beta2": -0.5}, ValueError, "beta2 must be between 0 and 1, got -0.5"),
        ({"beta2": float("nan")}, ValueError, "beta2 must be between 0 and 1, got nan"),
        ({"score_gradient": "both"}, ValueError, "score_gradient 'both' is not one of"),
        (
            {"target_total_rank": 12},
            ValueError,
            r"12 triplets over 3 layers\) must be smaller than the initial one \(12",
        ),
        ({"target_total_rank": 13}, ValueError, "choose target_r < init_r"),
        ({"target_total_rank": None, "target_r": 4}, ValueError, r"\(12 triplets over 3 layers\)"),
        ({"target_total_rank": 0}, ValueError, "at least 1 triplet, got 0"),
        ({"target_total_rank": None, "target_r": -1}, ValueError, "at least 1 triplet, got -3"),
        ({"target_total_rank": 2.5}, TypeError, "must be an integer, got 2.5"),
        ({"target_total_rank": None, "target_r": 0.5}, TypeError, "must be an integer, got 1.5"),
        ({"total_step": 5}, ValueError, r"must be smaller than total_step \(5\)"),
        ({"total_step": 0}, ValueError, "total_step must be at least 1"),
        ({"total_step": None}, TypeError, "total_step must be an integer, got None"),
        ({"tinit": -1}, ValueError, "must not be negative"),
        ({"tfinal": 0.3}, TypeError, "tfinal must be an integer, got 0.3"),
        ({"deltaT": 0}, ValueError, "deltaT must be at least 1, got 0"),
        ({"layers": {}}, ValueError, "has no adapted layer"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, said):
    model = make_model()
    with pytest.raises(error, match=said) as raised:
        make_allocator(model, **changes)
    assert "\n" not in str(raised.value)
    assert not hasattr(model, "rankallocator"), "a refused allocator leaves no trace"


@pytest.mark.parametrize("t", [-1, 1.0, "3"])
def test_bad_step(t):
    model = make_model()
    allocator = make_allocator(model)
    backward(model, 0)
    with pytest.raises(ValueError, match=f"the step must be an integer of at least 0, got {t!r}"):
        allocator.step(t)


def test_a_model_without_adapted_layers():
    with pytest.raises(
        ValueError, match=r"Linear has no adapted layer; make some with AdaLoraLinear\.from_linear"
    ):
        RankAllocator(nn.Linear(3, 3), total_step=10)
    with pytest.raises(ValueError, match="must be smaller than the initial one"):
        RankAllocator(make_model((0, 0, 0)), total_step=10)


def test_target_r_is_the_mean_rank():
    model = make_model()
    allocator = RankAllocator(model, total_step=10, target_r=2)
    assert allocator.schedule.target == 6 and model.rankallocator is allocator
    train(model, make_optimizer(model), allocator, range(10))
    assert sum(allocator.ranks().values()) == 6


def test_a_deep_copy_goes_its_own_way():
    model = make_model()
    train(model, make_optimizer(model), make_allocator(model), range(5))
    twin = copy.deepcopy(model)
    before = snapshot(model, model.rankallocator)
    train(twin, make_optimizer(twin), twin.rankallocator, range(5, 12))
    after = snapshot(model, model.rankallocator)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1] == after[1]
    assert sum(twin.rankallocator.ranks().values()) == 5 == (lambdas(twin) != 0).sum()
    assert sum(model.rankallocator.ranks().values()) == before[1]["budget"]


def test_scores_that_are_no_numbers_lose_and_are_reported_once():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, deltaT=1)
    train(model, optimizer, allocator, range(3))
    allocator._statistics.values[:, 0] = float(
        "nan"
    )  # an entry of one triplet, as damaged memory would leave it
    train(model, optimizer, allocator, range(3, SCHEDULE["total_step"]))
    said = "1 of 12 triplets have no number as their sensitivity score, the first in 0; they are pruned"
    with pytest.warns(UserWarning, match=said):
        ranks = allocator.ranks()
    assert sum(ranks.values()) == SCHEDULE["target_total_rank"] and not kept(allocator)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocator.ranks() == ranks
