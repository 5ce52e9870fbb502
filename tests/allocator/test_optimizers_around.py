"""Optimizers whose ``step()`` nobody calls, that keep second copies of the weights, or that work in the
gradients: an allocation runs all the same, and pruned triplets stay zero in whatever is evaluated.
"""

import copy
import io
import warnings

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adalora_fast import compact
from adalora_fast.allocator import attachment
from tests.helpers.small_model import (
    SCHEDULE,
    backward,
    kept,
    lambdas,
    layers_of,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
)

STEPS = SCHEDULE["total_step"] + 4


class ScheduleFree(torch.optim.Optimizer):
    """Trains at y, evaluates at x, keeps z; normalises the gradient in its own memory."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.steps, self.at_y = 0, True

    def _move(self, weight):
        for p in self.param_groups[0]["params"]:
            if "z" in self.state[p]:
                p.lerp_(self.state[p]["z"], weight)

    @torch.no_grad()
    def eval(self):
        if self.at_y:
            self._move(1 - 1 / self.param_groups[0]["beta"])
        self.at_y = False

    @torch.no_grad()
    def train(self):
        if not self.at_y:
            self._move(1 - self.param_groups[0]["beta"])
        self.at_y = True

    @torch.no_grad()
    def step(self):
        self.steps += 1
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            z = self.state[p].setdefault("z", p.clone())
            p.grad.div_(p.grad.abs() + 1e-3)
            p.lerp_(z, 1 / self.steps)
            p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / self.steps) - 1))
            z.sub_(p.grad, alpha=group["lr"])


class SAM(torch.optim.Optimizer):
    """Two steps of its own around each of the optimizer inside."""

    def __init__(self, params, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=1e-2)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["before"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self):
        raise NotImplementedError


class Lookahead:
    """Every third step goes half of the way back to slow weights, kept in its own state or in the inner's."""

    def __init__(self, optimizer, own_state):
        self.optimizer, self.steps = optimizer, 0
        self.state = {} if own_state else optimizer.state

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        for p in self.optimizer.param_groups[0]["params"]:
            slow = self.state.setdefault(p, {}).setdefault("slow", p.clone())
            if self.steps % 3 == 0:
                p.copy_(slow.lerp_(p, 0.5))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def pruned(allocator):
    return torch.tensor([not keep for keep in kept(allocator)])


# -- schedule-free ------------------------------------------------------------------------------


@pytest.mark.parametrize("automatic", [True, False])
def test_schedule_free_evaluates_without_the_pruned_triplets(automatic):
    model = make_model()
    optimizer, allocator = ScheduleFree(trained(model)), make_allocator(model)
    allocator.attach(optimizer, automatic=automatic)
    for t in range(STEPS):
        optimizer.train()
        backward(model, t)
        optimizer.step()
        if not automatic:
            allocator.step()
        optimizer.zero_grad()
        if t >= allocator.schedule.final_step or allocator.schedule.masks_at(t):
            optimizer.eval()
            values = lambdas(model)
            assert (values[pruned(allocator)] == 0).all() and (values[~pruned(allocator)] != 0).all(), t
    assert allocator.is_final


def test_scores_are_of_the_gradients_that_were_not_normalised():
    runs = []
    for attached in (True, False):
        model = make_model()
        optimizer, allocator = ScheduleFree(trained(model)), make_allocator(model, score="fisher", tinit=8)
        if attached:
            allocator.attach(optimizer)
        for t in range(6):
            backward(model, t)
            grads = [p.grad.clone() for p in parameters_of(model)]
            optimizer.step()
            if not attached:
                for parameter, grad in zip(parameters_of(model), grads, strict=True):
                    parameter.grad.copy_(grad)
                allocator.step()
            optimizer.zero_grad()
        runs.append(allocator.state_dict()["tensors"])
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_gradients_that_stay_as_they_are_are_copied_once(kind):
    model = make_model()
    optimizer, allocator = make_optimizer(model, kind, weight_decay=0.1), make_allocator(model)
    allocator.attach(optimizer)
    for t in range(3):
        backward(model, t)
        optimizer.step()
        taken = allocator._attachment._taken
        assert taken._needed is False and not taken._copies
        optimizer.zero_grad()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_makes_the_gradients_inside_the_step(set_to_none):
    runs = []
    for closure in (True, False):
        model = make_model()
        optimizer, allocator = make_optimizer(model), make_allocator(model)
        allocator.attach(optimizer)
        for t in range(STEPS):

            def evaluate(model=model, optimizer=optimizer, t=t):
                optimizer.zero_grad(set_to_none=set_to_none)
                backward(model, t)

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        runs.append([*allocator.state_dict()["tensors"].values(), *trained(model)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# -- steps that have other names, and slow weights ----------------------------------------------


def test_sam_allocates_once_per_pair_of_steps():
    model = make_model()
    optimizer, allocator = SAM(trained(model)), make_allocator(model)
    allocator.attach(optimizer)
    for t in range(STEPS):
        backward(model, t)
        optimizer.first_step()
        backward(model, t)
        optimizer.second_step()
        assert allocator.t == t + 1
    assert allocator.is_final and (lambdas(model)[pruned(allocator)] == 0).all()


@pytest.mark.parametrize("own_state", [True, False])
def test_slow_weights_train_on_after_compaction(own_state):
    """The state of a wrapper follows as that of the optimizer inside does."""
    outputs = []
    for compacted in (False, True):
        model = make_model()
        optimizer, allocator = Lookahead(make_optimizer(model), own_state), make_allocator(model)
        allocator.attach(optimizer)
        for t in range(STEPS + 5):
            if compacted and t == STEPS:
                compact(model, optimizer)
                assert {id(p) for p in optimizer.state} <= {id(p) for p in trained(model)}
            backward(model, t, gamma=0)
            optimizer.step()
            optimizer.optimizer.zero_grad()
        outputs.append(model(torch.ones(2, 6, dtype=torch.float64)).detach())
        assert allocator.t == STEPS + 5 and sum(kept(allocator)) == SCHEDULE["target_total_rank"]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own_state", [True, False])
def test_slow_weights_forget_pruned_triplets(own_state):
    model = make_model()
    optimizer, allocator = Lookahead(make_optimizer(model), own_state), make_allocator(model)
    allocator.attach(optimizer)
    went_back = 0
    for t in range(STEPS + 3):
        backward(model, t)
        optimizer.step()
        optimizer.optimizer.zero_grad()
        if allocator.is_final:
            went_back += optimizer.steps % 3 == 0
            assert (lambdas(model)[pruned(allocator)] == 0).all()
    assert went_back >= 2


def test_the_moments_of_ordinary_optimizers_are_left_alone():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    allocator.attach(optimizer)
    for t in range(STEPS):
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad()
    moments = torch.cat([optimizer.state[layer.lora_E]["exp_avg"].flatten() for layer in layers_of(model)])
    assert (moments[pruned(allocator)] != 0).any()


def test_the_averages_of_asgd_are_pruned():
    model = make_model()
    optimizer, allocator = make_optimizer(model, torch.optim.ASGD, t0=1), make_allocator(model)
    allocator.attach(optimizer)
    for t in range(STEPS):
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad()
    averages = torch.cat([optimizer.state[layer.lora_E]["ax"].flatten() for layer in layers_of(model)])
    assert (averages[pruned(allocator)] == 0).all() and (averages != 0).any()


# -- an optimizer that is never called ----------------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(attachment, "UNSEEN_CHANGES", 5)


def test_another_optimizer_trains(soon):
    """Also in the middle of a run."""
    model = make_model()
    attached, other = make_optimizer(model), make_optimizer(model)
    allocator = make_allocator(model)
    allocator.attach(attached)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(20):
            backward(model, t)
            (attached if t < 4 else other).step()
            other.zero_grad()
    (warning,) = caught
    message = str(warning.message)
    assert "weights changed 5 times and step() of the attached AdamW was not called" in message
    assert "\n" not in message and allocator.t == 4


def test_what_is_no_reason_to_warn(soon):
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    allocator.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(20):  # many batches to a step
            backward(model, t)
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(10):  # steps that a scaler skips
            output = model(torch.randn(3, 6, dtype=torch.float64)).square().mean()
            scaler.scale(output * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        for t in range(10):
            backward(model, t)
            optimizer.step()
            optimizer.zero_grad()
    assert allocator.t == 11


def test_lbfgs_evaluates_often_in_one_step():
    model = make_model()
    optimizer, allocator = torch.optim.LBFGS(trained(model), lr=0.1), make_allocator(model)
    allocator.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(4):

            def closure(t=t):
                optimizer.zero_grad()
                loss = model(torch.ones(2, 6, dtype=torch.float64)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert allocator.t == 4


def test_nothing_is_left_after_detaching():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    allocator.attach(optimizer)
    assert model[0].lora_E._post_accumulate_grad_hooks
    allocator.detach()
    assert not model[0].lora_E._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_an_attached_model_can_be_copied_and_pickled():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    allocator.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    twin = copy.deepcopy(model)
    assert not twin[0].lora_E._post_accumulate_grad_hooks
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).rankallocator.t == 1  # written two lines above


# -- averages of the weights --------------------------------------------------------------------


def averaged_run(kind):
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    allocator.attach(optimizer)
    if kind == "ema":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    else:
        average = AveragedModel(model)
    for t in range(STEPS):
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return allocator, average


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_an_average_is_pruned_like_the_model(kind):
    allocator, average = averaged_run(kind)
    inside = average.module
    assert (lambdas(inside)[pruned(allocator)] != 0).any(), "it remembers what was pruned"
    assert inside.rankallocator.is_stale_copy() and not allocator.is_stale_copy()
    before = lambdas(inside)
    allocator.apply_mask(average)
    keep = ~pruned(allocator)
    assert torch.equal(lambdas(inside)[keep], before[keep]) and (lambdas(inside)[~keep] == 0).all()
    assert kept(inside.rankallocator) == kept(allocator)
    assert inside.rankallocator.is_final and not inside.rankallocator.is_stale_copy()


def test_a_copy_that_is_left_alone_keeps_its_own_mask():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    for t in range(4):
        backward(model, t)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    best = copy.deepcopy(model)
    assert not best.rankallocator.is_stale_copy()


def test_a_model_that_is_no_copy():
    model = make_model()
    allocator = make_allocator(model)
    for other in (torch.nn.Linear(2, 2), model):
        with pytest.raises(ValueError, match=r"has no allocator of its own .*; give a deep copy"):
            allocator.apply_mask(other)
