"""Every score with every smoothing against a float64 calculation from the whole history, over many steps."""

from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adalora_fast.ops import importance_scores, importance_update_
from adalora_fast.ops.importance import ScoreRule
from tests.helpers.backends import each_backend
from tests.helpers.scoring import (
    SCORES,
    SHAPES,
    SMOOTHINGS,
    make_buffers,
    make_parameters,
    triplet_scores,
)
from tests.helpers.tolerances import assert_accurate

backend_in_use = each_backend("importance", "reference", "cpu")
BETAS = (0.85, 0.7)
ALL = tuple(product(SCORES, SMOOTHINGS))


def run(
    score,
    smoothing,
    steps,
    dtype,
    *,
    shapes=SHAPES,
    statistics_dtype=None,
    missing=(),
    betas=BETAS,
    spread=1.0,
    at=None,
):
    """[(scores of the op, scores from the history)] after the steps in ``at`` (None: the last one).

    ``missing``: {(step, parameter)} without a gradient.
    """
    found, at = [], at or (steps,)
    parameters = make_parameters(shapes, dtype)
    histories = [[] for _ in parameters]
    statistics, updates = make_buffers(parameters, score, smoothing, statistics_dtype or dtype)
    generator = torch.Generator().manual_seed(9)
    for step in range(steps):
        grads = []
        for number, (parameter, history) in enumerate(zip(parameters, histories, strict=True)):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.1 * noise).to(dtype))
            grad = None if (step, number) in missing else (spread * noise.flip(0) + 0.3).to(dtype)
            grads.append(grad)
            history.append((parameter.clone(), grad))
        importance_update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing, *betas))
        if step + 1 in at:
            got = importance_scores(parameters, statistics, ScoreRule(score, smoothing))
            assert got.dtype == statistics.dtype
            found.append((got, triplet_scores(histories, score, smoothing, *betas)))
    for number, history in enumerate(histories):
        assert updates[number] == sum(g is not None for _, g in history)
    return found


@pytest.mark.parametrize(("score", "smoothing"), ALL)
def test_against_the_history(score, smoothing):
    at = (1, 2, 3, 25)
    for steps, (got, want) in zip(at, run(score, smoothing, 25, torch.float64, at=at), strict=True):
        factor = 1e3 if score == "gsnr" else 10
        assert_accurate(got, want, torch.float64, factor=factor, what=f"after {steps} steps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_statistics_of_narrower_parameters(dtype):
    for score, smoothing in ALL:
        ((got, want),) = run(score, smoothing, 12, dtype, statistics_dtype=torch.float32)
        assert_accurate(got, want, torch.float32, factor=10, what=f"{score}, {smoothing}")


@pytest.mark.parametrize("score", ["sensitivity", "gsnr"])
def test_other_decays(score):
    for beta1 in (0.01, 0.5, 0.99, 0.999):
        ((got, want),) = run(score, "ema_uncertainty", 10, torch.float64, betas=(beta1, 0.2))
        assert_accurate(got, want, torch.float64, factor=1e4, what=f"beta1 {beta1}")


def test_missing_gradients_leave_a_parameter_behind():
    """Parameter 0 lacks its first gradient, 4 its last two, 15 all of them: each is counted on its own."""
    missing = {(0, 0), (5, 4), (6, 4), (3, 7)} | {(step, 15) for step in range(7)}
    for score, smoothing in ALL:
        ((got, want),) = run(score, smoothing, 7, torch.float64, missing=missing)
        assert_accurate(got, want, torch.float64, factor=1e3, what=f"{score}, {smoothing}")


@pytest.mark.parametrize("score", SCORES)
def test_a_step_without_any_gradient_changes_nothing(score):
    parameters = make_parameters()
    statistics, updates = make_buffers(parameters, score, "ema")
    importance_update_(parameters, parameters, statistics, updates, ScoreRule(score, "ema"))
    before = statistics.clone(), updates.clone()
    importance_update_(parameters, [None] * len(parameters), statistics, updates, ScoreRule(score, "ema"))
    assert torch.equal(statistics, before[0]) and torch.equal(updates, before[1])


@pytest.mark.parametrize("score", SCORES)
def test_a_step_that_is_not_active_changes_nothing(score):
    parameters, ends = make_parameters(), []
    for marks in ((None, None), (True, False, True)):
        statistics, updates = make_buffers(parameters, score, "ema_uncertainty")
        for mark in marks:
            active = None if mark is None else torch.tensor(mark)
            grads = [p * (9.0 if mark is False else 1.0) for p in parameters]
            importance_update_(
                parameters, grads, statistics, updates, ScoreRule(score, "ema_uncertainty"), active=active
            )
        ends.append((statistics, updates))
    assert torch.equal(ends[0][0], ends[1][0]) and (ends[1][1] == 2).all()


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=5
    ),
    score=st.sampled_from(SCORES),
    smoothing=st.sampled_from(SMOOTHINGS),
    steps=st.integers(1, 4),
    gaps=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 14)), max_size=6),
)
def test_drawn_models(shapes, score, smoothing, steps, gaps):
    assume(any(rank for _, rank, _ in shapes))
    ((got, want),) = run(score, smoothing, steps, torch.float64, shapes=tuple(shapes), missing=gaps)
    assert_accurate(got, want, torch.float64, factor=1e4)


@pytest.mark.parametrize("score", SCORES)
def test_a_model_of_rank_zero_layers_only(score):
    parameters = make_parameters(((5, 0, 4), (3, 0, 3)))
    statistics, updates = make_buffers(parameters, score, "ema")
    importance_update_(parameters, parameters, statistics, updates, ScoreRule(score, "ema"))
    assert importance_scores(parameters, statistics, ScoreRule(score, "ema")).shape == (0,)


def test_magnitude_reads_lambda_only():
    parameters = make_parameters()
    statistics, updates = make_buffers(parameters, "magnitude", "none")
    assert statistics.numel() == sum(E.numel() for E in parameters[1::3])
    importance_update_(parameters, parameters, statistics, updates, ScoreRule("magnitude", "none"))
    scores = importance_scores(parameters, statistics, ScoreRule("magnitude", "none"))
    assert torch.equal(scores, torch.cat(parameters[1::3]).abs().squeeze(1))


def test_triplet_score_is_lambda_plus_two_means():
    A, E, B = (torch.tensor(v, dtype=torch.float64) for v in ([[1.0, 2.0, 6.0]], [[5.0]], [[1.0], [3.0]]))
    statistics, updates = make_buffers([A, E, B], "sensitivity", "none")
    importance_update_(
        [A, E, B],
        [torch.ones_like(t) for t in (A, E, B)],
        statistics,
        updates,
        ScoreRule("sensitivity", "none"),
    )
    assert (
        importance_scores([A, E, B], statistics, ScoreRule("sensitivity", "none")).item() == 5.0 + 3.0 + 2.0
    )


def test_uncertainty_uses_the_average_already_updated():
    A, E, B = torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    statistics, updates = make_buffers([A, E, B], "sensitivity", "ema_uncertainty")
    grads = [torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double(), torch.zeros(1, 1).double()]
    importance_update_(
        [A, E, B], grads, statistics, updates, ScoreRule("sensitivity", "ema_uncertainty", 0.5, 0.75)
    )
    ema = 0.5 * 2.0
    got = importance_scores([A, E, B], statistics, ScoreRule("sensitivity", "ema_uncertainty")).item()
    assert got == ema * (0.25 * abs(2.0 - ema))


def test_gsnr_of_gradients_with_a_large_mean_keeps_its_variance():
    """In float32, v̄ - m̄² would lose everything here; Welford's recurrence does not."""
    parameters = make_parameters(((4, 2, 4),), torch.float32)
    statistics, updates = make_buffers(parameters, "gsnr", "none", torch.float32)
    generator = torch.Generator().manual_seed(0)
    histories = [[] for _ in parameters]
    for _ in range(30):
        grads = [100 + torch.randn(p.shape, generator=generator) for p in parameters]
        for history, parameter, grad in zip(histories, parameters, grads, strict=True):
            history.append((parameter.clone(), grad))
        importance_update_(parameters, grads, statistics, updates, ScoreRule("gsnr", "none"))
    got = importance_scores(parameters, statistics, ScoreRule("gsnr", "none"))
    assert_accurate(got, triplet_scores(histories, "gsnr", "none", 0.85, 0.85), torch.float32, factor=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta1", [0.5, 0.95, 0.9999])
def test_gsnr_after_the_first_update_has_no_variance(beta1, dtype):
    """The first gradient has all the weight: the mean is g and Var 0 exactly, so the ratio is 1e6."""
    parameters = make_parameters(((4, 2, 4),), dtype)
    statistics, updates = make_buffers(parameters, "gsnr", "none", dtype)
    grads = [p.flip(0).clone() for p in parameters]
    importance_update_(parameters, grads, statistics, updates, ScoreRule("gsnr", "none", beta1))
    scores = importance_scores(parameters, statistics, ScoreRule("gsnr", "none"))
    assert torch.allclose(scores, torch.full_like(scores, 3e6), rtol=1e-3), scores
    assert (statistics[1] >= 0).all(), "a variance cannot be negative"
    for _ in range(4):
        importance_update_(parameters, grads, statistics, updates, ScoreRule("gsnr", "none", beta1))
        assert (statistics[1] >= 0).all()


def test_gsnr_of_a_constant_gradient_is_bounded_and_of_none_zero():
    parameters = make_parameters(((4, 2, 4),), torch.float32)
    for value, expected in ((0.5, 3e6), (0.0, 0.0), (1e-18, None)):
        statistics, updates = make_buffers(parameters, "gsnr", "none", torch.float32)
        for _ in range(5):
            grads = [torch.full_like(p, value) for p in parameters]
            importance_update_(parameters, grads, statistics, updates, ScoreRule("gsnr", "none"))
        scores = importance_scores(parameters, statistics, ScoreRule("gsnr", "none"))
        assert scores.isfinite().all()
        if expected is not None:
            assert torch.allclose(scores, torch.full_like(scores, expected), rtol=1e-4)


def test_inputs_are_left_alone():
    for score in SCORES:
        parameters = make_parameters()
        grads = [p.flip(0) * 2 for p in parameters]
        before = [t.clone() for t in parameters + grads]
        statistics, updates = make_buffers(parameters, score, "ema_uncertainty")
        importance_update_(parameters, grads, statistics, updates, ScoreRule(score, "ema_uncertainty"))
        kept = statistics.clone()
        importance_scores(parameters, statistics, ScoreRule(score, "ema_uncertainty"))
        assert all(torch.equal(a, b) for a, b in zip(before, parameters + grads, strict=True))
        assert torch.equal(kept, statistics)


def test_parameters_that_require_gradients_are_taken():
    parameters = [p.requires_grad_() for p in make_parameters()]
    statistics, updates = make_buffers(parameters, "sensitivity", "ema")
    importance_update_(
        parameters, [p.detach() for p in parameters], statistics, updates, ScoreRule("sensitivity", "ema")
    )
    assert not statistics.requires_grad


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_strided_parameters_and_gradients(layout):
    parameters = make_parameters()

    def restride(t):
        if layout == "transposed":
            return t.t().contiguous().t()
        return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]

    expected, got = [], []
    for values, out in ((parameters, expected), ([restride(p) for p in parameters], got)):
        statistics, updates = make_buffers(values, "sensitivity", "ema_uncertainty")
        importance_update_(values, [v * 2 for v in values], statistics, updates)
        out.append(importance_scores(values, statistics))
    assert torch.equal(expected[0], got[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": ScoreRule("entropy")}, "entropy"),
        ({"statistics": torch.zeros(2, 5)}, "statistics"),
        ({"statistics": torch.zeros(1, 83)}, "statistics"),
        ({"updates": torch.zeros(4, dtype=torch.int64)}, "updates"),
        ({"grads": [None]}, "grads"),
        ({"active": torch.tensor([True])}, "active is torch.bool"),
        ({"active": torch.tensor(1)}, "active is torch.int64"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_arguments(changes, said):
    parameters = make_parameters()
    statistics, updates = make_buffers(parameters, "sensitivity", "ema_uncertainty")
    arguments = {"parameters": parameters, "grads": parameters, "statistics": statistics, "updates": updates}
    with pytest.raises((ValueError, TypeError), match=said) as error:
        importance_update_(**{**arguments, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"smoothing": "median"}, "smoothing 'median' is not one of"),
        ({"beta1": 1.0}, "beta1 must be between 0 and 1, got 1.0"),
        ({"beta2": 0.0}, "beta2 must be between 0 and 1, got 0.0"),
        ({"beta1": float("nan")}, "beta1 must be between 0 and 1, got nan"),
    ],
)
def test_rules_that_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        ScoreRule(**changes)
