"""A registered score runs as the built-in one with the same formula does, in every situation.

It runs in plain PyTorch: bit for bit as the built-in one does there, and up to rounding as the kernels do.
"""

import copy

import pytest
import torch

from adalora_fast import RankAllocator, register_score
from adalora_fast.allocator import scores
from adalora_fast.ops.dispatch import backend
from tests.helpers.backends import each_backend
from tests.helpers.small_model import (
    backward,
    kept,
    lambdas,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
    train,
)
from tests.helpers.tolerances import assert_accurate

backend_in_use = each_backend("importance", "reference", "auto")
FORMULAS = {
    "sensitivity": lambda w, g, state: (w * g).abs(),
    "movement": lambda w, g, state: -w * g,
    "fisher": lambda w, g, state: g * g,
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(scores, "_scores", dict(scores._scores))
    for name, formula in FORMULAS.items():
        register_score(f"my-{name}", formula, smoothing="ema")


def statistics(allocator):
    return {n: t for n, t in allocator.state_dict()["tensors"].items() if not n.startswith("user/")}


def run_both(score, disturb=lambda model, t: False, dtype=torch.float64, **options):
    """Twin runs, built-in score and registered one; ``disturb`` may alter gradients (True: no step)."""
    runs = []
    for name in (score, f"my-{score}"):
        model = make_model(dtype=dtype)
        options = {"smoothing": "ema", **options}
        runs.append((model, make_optimizer(model), make_allocator(model, score=name, **options)))
    for t in range(12):
        for model, optimizer, allocator in runs:
            backward(model, t)
            if not disturb(model, t):
                optimizer.step()
            allocator.step()
            optimizer.zero_grad()
        first, second = (statistics(allocator) for _, _, allocator in runs)
        for name in first:
            if backend.wanted() == "reference" or not first[name].is_floating_point():
                assert torch.equal(first[name], second[name]), f"step {t}: {name}"
            else:
                assert_accurate(first[name], second[name], dtype, factor=10, what=f"step {t}: {name}")
    assert torch.equal(lambdas(runs[0][0]), lambdas(runs[1][0]))
    assert all(tensor.isfinite().all() for tensor in first.values())


@pytest.mark.parametrize("smoothing", ["ema_uncertainty", "ema", "sum", "none"])
@pytest.mark.parametrize("score", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_built_in_one(score, smoothing, dtype):
    run_both(score, smoothing=smoothing, dtype=dtype)


@pytest.mark.parametrize("score", FORMULAS)
def test_equals_the_built_in_one_with_missing_gradients(score):
    def disturb(model, t):
        parameters_of(model)[t % 9].grad = None

    run_both(score, disturb)


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("score", FORMULAS)
def test_equals_the_built_in_one_with_overflows(score, value):
    def disturb(model, t):
        if t in (1, 2, 6):
            parameters_of(model)[t].grad[0, 0] = value
        return t in (1, 2, 6)

    run_both(score, disturb)


@pytest.mark.parametrize("score", FORMULAS)
def test_equals_the_built_in_one_where_the_signal_overflows(score):
    """g is finite, g² or w g is not: that step must leave the statistics alone as well."""

    def disturb(model, t):
        if t == 3:
            parameters_of(model)[0].grad[0, 0] = 3e36
            parameters_of(model)[0].detach()[0, 0] = 1e3
        return t == 3

    run_both(score, disturb, dtype=torch.float32)


@pytest.mark.parametrize("score_gradient", ["total", "task"])
def test_equals_the_built_in_one_on_the_tasks_gradient(score_gradient):
    run_both("fisher", score_gradient=score_gradient)


def running_mean(w, g, state):
    """Adam-like: a state of two tensors, one of them a scalar."""
    state["count"] = state.get("count", torch.zeros((), dtype=torch.int64)) + 1
    state["mean"] = state.get("mean", torch.zeros_like(g)).lerp(g, 0.1)
    return (w * state["mean"]).abs() / state["count"]


def test_state_is_kept_between_steps_and_in_checkpoints():
    register_score("averaged", running_mean, smoothing="none")
    whole = make_model()
    allocator, optimizer = make_allocator(whole, score="averaged"), make_optimizer(whole)
    train(whole, optimizer, allocator, range(5))
    state = allocator.state_dict()
    counts = {n: t for n, t in state["tensors"].items() if n.startswith("user/") and n.endswith("count")}
    assert counts and all(t == 5 for t in counts.values())

    other = make_model(seed=1)
    other.load_state_dict(whole.state_dict())
    resumed, resumed_optimizer = make_allocator(other, score="averaged"), make_optimizer(other)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(state)
    train(whole, optimizer, allocator, range(5, 12))
    train(other, resumed_optimizer, resumed, range(5, 12))
    assert kept(allocator) == kept(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_state_is_not_touched_by_an_overflow():
    register_score("averaged", running_mean)
    model = make_model()
    allocator, optimizer = make_allocator(model, score="averaged"), make_optimizer(model)
    train(model, optimizer, allocator, range(2))
    before = allocator.state_dict()["tensors"]
    backward(model, 2)
    parameters_of(model)[0].grad.fill_(float("inf"))
    allocator.step()
    after = allocator.state_dict()["tensors"]
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_w_and_g_are_as_documented():
    seen = []

    def look(w, g, state):
        seen.append((tuple(w.shape), w.dtype, g.dtype))
        assert w.shape == g.shape and w.dim() == 3 and not w.requires_grad
        return torch.ones_like(w)

    register_score("looking", look)
    model = make_model(dtype=torch.bfloat16)
    train(model, make_optimizer(model), make_allocator(model, score="looking"), [0])
    assert all(w is g is torch.float32 for _, w, g in seen)
    assert sorted(shape for shape, _, _ in seen) == sorted(
        (1, *factor.shape) for factor in parameters_of(model)
    ), "one call per shape and kind"


def test_a_function_that_writes_into_its_arguments_harms_nothing():
    def careless(w, g, state):
        return w.mul_(g).abs_()

    register_score("careless", careless)
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, score="careless")
    backward(model, 0)
    optimizer.step()
    before = [(p.detach().clone(), p.grad.clone()) for p in parameters_of(model)]
    allocator.step()
    for (w, g), p in zip(before, parameters_of(model), strict=True):
        assert torch.equal(w, p) and torch.equal(g, p.grad)


@pytest.mark.parametrize(
    "function", [lambda w, g, s: g.sum(), lambda w, g, s: None, lambda w, g, s: g[0], lambda w, g, s: 1.0]
)
def test_a_result_of_the_wrong_shape_is_refused(function):
    register_score("broken", function)
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, score="broken")
    backward(model, 0)
    optimizer.step()
    with pytest.raises(ValueError, match=r"score 'broken' must return a tensor \(1, 4, 6\), got"):
        allocator.step()
    assert allocator.t == 0


def test_waiting_for_updates():
    register_score("patient", FORMULAS["fisher"], min_updates=6)
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model, score="patient", tinit=0, deltaT=1)
    for t in range(12):
        train(model, optimizer, allocator, [t])
        budget = 12 if t < 5 else allocator.schedule.budget(t)
        assert sum(kept(allocator)) == budget, f"step {t}"


def test_the_allocator_names_its_score():
    model = make_model()
    allocator = RankAllocator(model, total_step=9, target_r=2, score="my-fisher")
    assert allocator.score.name == "my-fisher" and allocator.smoothing == "ema"
    assert allocator.state_dict()["config"]["score"] == "my-fisher"
