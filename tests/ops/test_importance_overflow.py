"""Gradients that are not finite, products that overflow: no statistic may move, and later steps are clean."""

from itertools import product

import pytest
import torch

from adalora_fast.ops import importance_scores, importance_update_
from adalora_fast.ops.importance import ScoreRule
from tests.helpers.backends import each_backend
from tests.helpers.scoring import SCORES, SMOOTHINGS, make_buffers, make_parameters

backend_in_use = each_backend("importance", "reference", "cpu")
BAD = [float("inf"), float("-inf"), float("nan")]


def gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]


def bits(tensor):
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("score", SCORES)
def test_one_bad_entry_anywhere_changes_nothing(score, smoothing):
    parameters = make_parameters(dtype=torch.float32)
    statistics, updates = make_buffers(parameters, score, smoothing, torch.float32)
    clean_statistics, clean_updates = make_buffers(parameters, score, smoothing, torch.float32)
    rule = ScoreRule(score, smoothing)
    places = [i for i, p in enumerate(parameters) if p.numel() and (score != "magnitude" or i % 3 == 1)]
    for step in range(max(2 * len(places), 3 * len(BAD))):
        grads = gradients(parameters, step)
        importance_update_(parameters, grads, statistics, updates, rule)
        importance_update_(parameters, grads, clean_statistics, clean_updates, rule)
        before = bits(statistics).clone(), updates.clone()
        grads[places[step % len(places)]].view(-1)[-1] = BAD[step % len(BAD)]
        importance_update_(parameters, grads, statistics, updates, rule)
        assert torch.equal(bits(statistics), before[0]), "an overflow changed a statistic"
        assert torch.equal(updates, before[1]), "an overflow was counted as an update"
    assert torch.equal(bits(statistics), bits(clean_statistics)), "the steps after an overflow are not clean"


def test_the_first_step_overflows():
    for score, smoothing in product(SCORES, SMOOTHINGS):
        parameters = make_parameters(dtype=torch.float32)
        statistics, updates = make_buffers(parameters, score, smoothing, torch.float32)
        grads = [torch.full_like(p, float("inf")) for p in parameters]
        importance_update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing))
        assert (statistics == 0).all() and (updates == 0).all(), (score, smoothing)
        assert (importance_scores(parameters, statistics, ScoreRule(score, smoothing)) == 0).all(), (
            score,
            smoothing,
        )


@pytest.mark.parametrize(
    ("score", "weight", "gradient"),
    [
        ("sensitivity", 1e20, 1e20),
        ("movement", 1e20, -1e20),
        ("fisher", 1.0, 1e20),
        ("gsnr", 1.0, 1e20),
        ("sensitivity", float("nan"), 1.0),
        ("movement", float("inf"), 1.0),
    ],
)
def test_a_finite_gradient_whose_signal_is_not(score, weight, gradient):
    parameters = make_parameters(dtype=torch.float32)
    statistics, updates = make_buffers(parameters, score, "ema", torch.float32)
    importance_update_(parameters, gradients(parameters, 0), statistics, updates, ScoreRule(score, "ema"))
    before = bits(statistics).clone(), updates.clone()
    grads = gradients(parameters, 1)
    parameters[5].view(-1)[1], grads[5].view(-1)[1] = weight, gradient
    importance_update_(parameters, grads, statistics, updates, ScoreRule(score, "ema"))
    assert torch.equal(bits(statistics), before[0]) and torch.equal(updates, before[1])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("score", SCORES)
def test_statistics_stay_finite_at_the_edge_of_the_type(score, smoothing):
    """Gradients whose squares are just finite, with changing signs: nothing may overflow for good."""
    parameters = [torch.ones_like(p) for p in make_parameters(dtype=torch.float32)]
    statistics, updates = make_buffers(parameters, score, smoothing, torch.float32)
    for step in range(6):
        grads = [torch.full_like(p, 1.8e19 * (-1) ** step) for p in parameters]
        importance_update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing))
    assert not statistics.isnan().any()
    for step in range(3):
        importance_update_(
            parameters, gradients(parameters, step), statistics, updates, ScoreRule(score, smoothing)
        )
    if smoothing != "sum":
        assert statistics.isfinite().all(), "one large gradient poisoned the statistics for good"


@pytest.mark.parametrize("score", SCORES)
def test_a_missing_gradient_beside_an_infinite_one(score):
    parameters = make_parameters(dtype=torch.float32)
    statistics, updates = make_buffers(parameters, score, "ema", torch.float32)
    importance_update_(parameters, gradients(parameters, 0), statistics, updates, ScoreRule(score, "ema"))
    before = bits(statistics).clone(), updates.clone()
    grads = gradients(parameters, 1)
    grads[0], grads[4] = None, torch.full_like(grads[4], float("inf"))
    importance_update_(parameters, grads, statistics, updates, ScoreRule(score, "ema"))
    assert torch.equal(bits(statistics), before[0]) and torch.equal(updates, before[1])


@pytest.mark.parametrize("score", SCORES)
def test_a_missing_gradient_leaves_its_statistics_bitwise(score):
    for smoothing in SMOOTHINGS:
        leaves_its_statistics(score, smoothing)


def leaves_its_statistics(score, smoothing):
    parameters = make_parameters(dtype=torch.float32)
    statistics, updates = make_buffers(parameters, score, smoothing, torch.float32)
    grads = gradients(parameters, 0)
    grads[1].zero_()  # zeros of both signs among the statistics
    importance_update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing))
    before = importance_scores(parameters, statistics, ScoreRule(score, smoothing))
    grads = gradients(parameters, 1)
    grads[:3] = [None] * 3  # all of the first matrix
    for parameter in parameters:
        parameter.mul_(2)
    importance_update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing))
    after = importance_scores(parameters, statistics, ScoreRule(score, smoothing))
    assert torch.equal(before[:3], after[:3]) and not torch.equal(before[3:], after[3:])
    assert updates[:3].tolist() == [1, 1, 1] and (updates[3:9] == 2).all()


def test_half_gradients_are_squared_in_the_statistics_type():
    parameters = make_parameters(dtype=torch.float16)
    statistics, updates = make_buffers(parameters, "fisher", "none", torch.float32)
    grads = [torch.full_like(p, 3e4) for p in parameters]  # its square is beyond float16
    importance_update_(parameters, grads, statistics, updates, ScoreRule("fisher", "none"))
    square = torch.tensor(3e4, dtype=torch.float16).float() ** 2
    assert (statistics == square).all()
