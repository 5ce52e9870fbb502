"""``score_gradient="task"`` scores what the task's loss alone would have given, clipped and scaled or not."""

import copy

import pytest
import torch
from torch import nn

from adalora_fast import orthogonality_loss
from adalora_fast.ops import importance_scores
from adalora_fast.ops.importance import ScoreRule
from tests.helpers.scoring import triplet_scores
from tests.helpers.small_model import (
    layers_of,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
    task_loss,
)
from tests.helpers.tolerances import relative_error

STEPS = 8
GAMMA = 0.5


class Observer:
    """Beside a run: the history of (w, task gradient), from which the scores follow without any allocator."""

    def __init__(self, model, **options):
        options = {"score": "movement", "smoothing": "ema", "total_step": 100, "tinit": 90, **options}
        self.model, self.allocator = model, make_allocator(model, score_gradient="task", **options)
        self.optimizer = make_optimizer(model)
        self.histories = [[] for _ in parameters_of(model)]

    def pure(self, losses):
        """The task's gradient of every factor, summed over ``losses``; nothing is accumulated in .grad."""
        parameters = parameters_of(self.model)
        total = [torch.zeros_like(p) for p in parameters]
        for loss in losses:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        return total

    def record(self, pure, factor=1.0):
        """After the optimizer's step: keep (w, factor · task gradient)."""
        for history, parameter, grad in zip(self.histories, parameters_of(self.model), pure, strict=True):
            history.append((parameter.detach().clone(), grad * factor))

    def check(self, bound=1e-10):
        allocator = self.allocator
        with torch.no_grad():
            got = importance_scores(
                allocator.parameters(),
                allocator._statistics.values,
                ScoreRule(allocator.score.name, allocator.smoothing),
            )
        want = triplet_scores(self.histories, allocator.score.name, allocator.smoothing, 0.85, 0.85)
        assert relative_error(got, want) < bound


def clip(model, limit):
    """Clip as in training and return the factor that was applied."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    return min(1.0, limit / (norm + 1e-6))


@pytest.mark.parametrize("limit", [None, 0.05, 1e3], ids=["unclipped", "clipped", "clip unused"])
@pytest.mark.parametrize("score", ["sensitivity", "movement", "fisher", "gsnr"])
def test_plain_loop(score, limit):
    seen = Observer(make_model(), score=score, smoothing="none")
    for t in range(STEPS):
        pure = seen.pure([task_loss(seen.model, t)])
        (task_loss(seen.model, t) + GAMMA * orthogonality_loss(seen.model)).backward()
        factor = 1.0 if limit is None else clip(seen.model, limit)
        seen.optimizer.step()
        seen.record(pure, factor)
        seen.allocator.step()
        seen.optimizer.zero_grad()
        seen.check()


def test_total_is_another_score():
    """The test above would notice if the regulariser stayed in."""
    seen = Observer(make_model())
    seen.allocator.score_gradient = "total"
    pure = seen.pure([task_loss(seen.model, 0)])
    (task_loss(seen.model, 0) + GAMMA * orthogonality_loss(seen.model)).backward()
    seen.optimizer.step()
    seen.record(pure)
    seen.allocator.step()
    with pytest.raises(AssertionError):
        seen.check(bound=1e-3)


@pytest.mark.parametrize("penalty", ["fro", "squared"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_clipping_and_both_ways_of_zeroing(penalty, set_to_none):
    seen = Observer(make_model())
    for t in range(STEPS):
        pure = seen.pure([task_loss(seen.model, t, part) / 3 for part in range(3)])
        for part in range(3):
            loss = task_loss(seen.model, t, part) + GAMMA * orthogonality_loss(seen.model, penalty)
            (loss / 3).backward()
        factor = clip(seen.model, 0.05)
        seen.optimizer.step()
        seen.record(pure, factor)
        seen.allocator.step()
        seen.optimizer.zero_grad(set_to_none=set_to_none)
        seen.check()


@pytest.mark.parametrize("separately", [True, False])
def test_a_scaled_loss(separately):
    seen = Observer(make_model())
    for t in range(STEPS):
        scale = 2.0 ** (10 + t)
        pure = seen.pure([task_loss(seen.model, t)])
        if separately:
            (scale * task_loss(seen.model, t)).backward()
            (scale * GAMMA * orthogonality_loss(seen.model)).backward()
        else:
            (scale * (task_loss(seen.model, t) + GAMMA * orthogonality_loss(seen.model))).backward()
        for parameter in parameters_of(seen.model):
            parameter.grad.div_(scale)
        seen.optimizer.step()
        seen.record(pure)
        seen.allocator.step()
        seen.optimizer.zero_grad()
        seen.check()


@pytest.mark.parametrize("regularised", [[0, 2, 4, 6], [0, 1], [7], []], ids=str)
def test_the_regulariser_on_some_steps_only(regularised):
    seen = Observer(make_model())
    for t in range(STEPS):
        pure = seen.pure([task_loss(seen.model, t)])
        loss = task_loss(seen.model, t)
        if t in regularised:
            loss = loss + GAMMA * orthogonality_loss(seen.model)
        loss.backward()
        seen.optimizer.step()
        seen.record(pure)
        seen.allocator.step()
        seen.optimizer.zero_grad()
        seen.check()


def test_a_value_that_is_only_logged_changes_nothing():
    seen = Observer(make_model())
    for t in range(STEPS):
        pure = seen.pure([task_loss(seen.model, t)])
        orthogonality_loss(seen.model).item()
        (task_loss(seen.model, t) + GAMMA * orthogonality_loss(seen.model)).backward()
        seen.optimizer.step()
        seen.record(pure)
        seen.allocator.step()
        seen.optimizer.zero_grad()
        seen.check()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("steps_on_skip", [True, False], ids=["allocator steps", "allocator does not"])
def test_a_skipped_step_leaves_nothing_behind(set_to_none, steps_on_skip):
    """After an overflow the optimizer is not stepped; with ``attach()`` neither is the allocator."""
    seen = Observer(make_model())
    for t in range(STEPS):
        overflow = t in (2, 3)
        pure = seen.pure([task_loss(seen.model, t)])
        (task_loss(seen.model, t) + GAMMA * orthogonality_loss(seen.model)).backward()
        if overflow:
            parameters_of(seen.model)[4].grad.fill_(float("inf"))
            if steps_on_skip:
                seen.allocator.step()
        else:
            seen.optimizer.step()
            seen.record(pure)
            seen.allocator.step()
            seen.check()
        seen.optimizer.zero_grad(set_to_none=set_to_none)


def test_a_skipped_step_before_two_separate_backward_passes():
    """The task's gradient is there already when the regulariser's backward begins."""
    seen = Observer(make_model())
    for t in range(STEPS):
        pure = seen.pure([task_loss(seen.model, t)])
        task_loss(seen.model, t).backward()
        (GAMMA * orthogonality_loss(seen.model)).backward()
        if t not in (2, 3):
            factor = clip(seen.model, 0.05)
            seen.optimizer.step()
            seen.record(pure, factor)
            seen.allocator.step()
            seen.check()
        seen.optimizer.zero_grad()


def test_with_a_gradient_scaler_and_attach():
    seen = Observer(make_model())
    seen.allocator.attach(seen.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for t in range(STEPS):
        overflow = t in (2, 3)
        pure = seen.pure([task_loss(seen.model, t)])
        loss = task_loss(seen.model, t) * (float("inf") if overflow else 1.0)
        scaler.scale(loss + GAMMA * orthogonality_loss(seen.model)).backward()
        scaler.unscale_(seen.optimizer)
        factor = clip(seen.model, 0.05)
        before = seen.allocator.t
        scaler.step(seen.optimizer)
        scaler.update()
        if not overflow:
            assert seen.allocator.t == before + 1
            seen.record(pure, factor)
            seen.check(bound=1e-6)  # the scaler's inverse is a float32
        seen.optimizer.zero_grad()


@pytest.mark.parametrize("ranks", [(0, 3, 5), (4, 0, 5), (4, 3, 0), (1, 1, 9)], ids=str)
def test_layers_of_rank_zero(ranks):
    """Clipping must be seen whichever layer is empty."""
    model = make_model(ranks)
    seen = Observer(model)
    for t in range(STEPS):
        pure = seen.pure([task_loss(model, t)])
        (task_loss(model, t) + GAMMA * orthogonality_loss(model)).backward()
        factor = clip(model, 0.05)
        seen.optimizer.step()
        seen.record(pure, factor)
        seen.allocator.step()
        seen.optimizer.zero_grad()
        seen.check()


def test_a_first_layer_that_has_nothing_to_learn():
    """Orthonormal factors and λ = 0: the first layer's gradients vanish, clipping must show elsewhere."""
    model = make_model()
    first = layers_of(model)[0]
    with torch.no_grad():
        first.lora_A.copy_(torch.eye(4, 6))
        first.lora_B.copy_(torch.eye(8, 4))
        first.lora_E.zero_()
    seen = Observer(model)
    pure = seen.pure([task_loss(model, 0)])
    (task_loss(model, 0) + GAMMA * orthogonality_loss(model)).backward()
    factor = clip(model, 0.05)
    seen.optimizer.step()
    seen.record(pure, factor)
    seen.allocator.step()
    seen.check()


@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_a_frozen_factor(frozen):
    model = make_model()
    parameters_of(model)[frozen].requires_grad_(False)
    allocator = make_allocator(model, score_gradient="task")
    optimizer = make_optimizer(model)
    for t in range(4):
        (task_loss(model, t) + GAMMA * orthogonality_loss(model)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert allocator.state_dict()["tensors"]["updates"].max() == 3 + 1


def test_parameters_replaced_by_new_objects():
    model = make_model()
    seen = Observer(model)
    for t in range(STEPS):
        if t == 3:
            for layer in layers_of(model):
                for name, factor in layer.factors()._asdict().items():
                    setattr(layer, name, nn.Parameter(factor.detach().clone()))
            seen.optimizer = make_optimizer(model)
        pure = seen.pure([task_loss(model, t)])
        (task_loss(model, t) + GAMMA * orthogonality_loss(model)).backward()
        factor = clip(model, 0.05)
        seen.optimizer.step()
        seen.record(pure, factor)
        seen.allocator.step()
        seen.optimizer.zero_grad()
        seen.check()


def test_a_deep_copy_keeps_to_itself():
    model = make_model()
    seen = Observer(model)
    (task_loss(model, 0) + GAMMA * orthogonality_loss(model)).backward()
    seen.optimizer.zero_grad()
    seen.allocator.reset()
    twin = Observer.__new__(Observer)
    twin.model = copy.deepcopy(model)
    twin.allocator, twin.optimizer = twin.model.rankallocator, make_optimizer(twin.model)
    twin.histories = [[] for _ in parameters_of(twin.model)]
    for t in range(4):
        for run in (seen, twin):
            pure = run.pure([task_loss(run.model, t)])
            (task_loss(run.model, t) + GAMMA * orthogonality_loss(run.model)).backward()
            factor = clip(run.model, 0.05)
            run.optimizer.step()
            run.record(pure, factor)
            run.allocator.step()
            run.optimizer.zero_grad()
            run.check()


def test_gradients_themselves_keep_the_regulariser():
    """Only the scores leave it out; the optimizer sees the whole gradient."""
    first, second = make_model(), make_model()
    for model, score_gradient in ((first, "task"), (second, "total")):
        allocator = make_allocator(model, score_gradient=score_gradient, tinit=8)
        optimizer = make_optimizer(model)
        for t in range(STEPS):
            (task_loss(model, t) + GAMMA * orthogonality_loss(model)).backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_float32_keeps_the_small_task_part():
    """The regulariser is most of the gradient here; what is left without it still ranks the triplets."""
    model = make_model(dtype=torch.float32)
    exact = copy.deepcopy(model).double()
    scores = []
    for m in (model, exact):
        allocator = make_allocator(m, score="fisher", score_gradient="task", total_step=100, tinit=90)
        optimizer = make_optimizer(m, torch.optim.SGD, lr=1e-3)
        for t in range(STEPS):
            (1e-2 * task_loss(m, t) + GAMMA * orthogonality_loss(m)).backward()
            clip(m, 0.5)
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()
        with torch.no_grad():
            scores.append(
                importance_scores(
                    allocator.parameters(), allocator._statistics.values, ScoreRule("fisher", "ema")
                )
            )
    assert relative_error(scores[0], scores[1]) < 1e-3
