"""``attach``: an allocation that cannot silently not run, nor run at the wrong moment."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.small_model import (
    backward,
    kept,
    lambdas,
    make_allocator,
    make_model,
    make_optimizer,
    train,
)


@pytest.fixture
def run():
    model = make_model()
    return model, make_optimizer(model), make_allocator(model)


def hooked_steps(model, optimizer, steps):
    for t in steps:
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad()


def test_automatic_equals_by_hand(run):
    by_hand = make_model()
    allocator = make_allocator(by_hand)
    train(by_hand, make_optimizer(by_hand), allocator, range(12))
    model, optimizer, automatic = run
    automatic.attach(optimizer)
    hooked_steps(model, optimizer, range(12))
    assert kept(automatic) == kept(allocator) and automatic.t == 12
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_a_call_by_hand_beside_the_automatic_one_is_refused(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    t = allocator.t
    with pytest.raises(RuntimeError, match=r"attach\(\) already does: remove the call"):
        allocator.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"attach\(\) already does: remove the call"):
        allocator.step()
    assert allocator.t == t == 1


def test_manual_call_before_the_optimizer_is_refused(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer, automatic=False)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"without an optimizer.step\(\).*after optimizer.step\(\)"):
        allocator.step()
    assert allocator.t == 0
    optimizer.step()
    allocator.step()
    assert allocator.t == 1
    with pytest.raises(RuntimeError, match=r"without an optimizer.step\(\)"):
        allocator.step()
    assert allocator.t == 1


def test_manual_run_equals_the_loop_without_attach(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer, automatic=False)
    train(model, optimizer, allocator, range(12))
    assert sum(kept(allocator)) == 5 == (lambdas(model) != 0).sum()


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_skipped_step_with_an_overflow_is_accepted(run, value):
    model, optimizer, allocator = run
    allocator.attach(optimizer, automatic=False)
    train(model, optimizer, allocator, range(2))
    backward(model, 2)
    model[0].lora_A.grad[0, 0] = value
    before = allocator.state_dict()["tensors"]
    allocator.step()  # the scaler did not step the optimizer
    after = allocator.state_dict()["tensors"]
    assert allocator.t == 3 and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("automatic", [True, False])
def test_with_a_gradient_scaler(run, automatic):
    model, optimizer, allocator = run
    allocator.attach(optimizer, automatic=automatic)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    stepped = 0
    for t in range(12):
        overflow = t in (3, 4)
        output = model(torch.randn(3, 6, dtype=torch.float64)).square().mean()
        scaler.scale(output * (float("inf") if overflow else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        stepped += not overflow
        if not automatic:
            allocator.step()
        optimizer.zero_grad()
    assert allocator.t == (stepped if automatic else 12)
    for name, tensor in allocator.state_dict()["tensors"].items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    assert lambdas(model).isfinite().all()


def test_the_wrong_optimizer(run):
    _, _, allocator = run
    other = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="holds none of the adapter's parameters; attach the one that trains them"
    ):
        allocator.attach(other)


@pytest.mark.parametrize("thing", [None, object(), nn.Linear(3, 3)], ids=lambda t: type(t).__name__)
def test_no_optimizer_at_all(run, thing):
    with pytest.raises(ValueError, match=r"is no torch optimizer; call allocator.step\(\) by hand"):
        run[2].attach(thing)


def test_a_second_optimizer_is_refused_until_detached(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"attached already; call detach\(\) first"):
        allocator.attach(make_optimizer(model))
    hooked_steps(model, optimizer, range(2))
    allocator.detach()
    hooked_steps(model, optimizer, range(2, 4))
    assert allocator.t == 2, "a detached optimizer steps nothing"
    allocator.detach()
    fresh = make_optimizer(model)
    allocator.attach(fresh)
    hooked_steps(model, fresh, range(4, 6))
    assert allocator.t == 4


def test_after_detaching_calls_by_hand_are_free(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    allocator.detach()
    train(model, optimizer, allocator, range(12))
    assert allocator.is_final


class Wrapped:
    """As Accelerate's: the optimizer inside, under the same name."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_wrapped_optimizers_are_unwrapped(run):
    model, optimizer, allocator = run
    allocator.attach(Wrapped(Wrapped(optimizer)))
    hooked_steps(model, optimizer, range(3))
    assert allocator.t == 3


def test_an_error_in_the_hook_is_seen(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    model[0].lora_E = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"adapter shapes changed .* call rebind\(\)"):
        optimizer.step()


def test_accumulation_counts_optimizer_steps(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    for t in range(4):
        for part in range(3):
            backward(model, 3 * t + part)
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.t == 4


def test_deep_copy_of_a_model_with_an_attached_optimizer(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    hooked_steps(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    assert twin.rankallocator is not allocator and twin.rankallocator.t == 3
    hooked_steps(model, optimizer, range(3, 5))
    assert (allocator.t, twin.rankallocator.t) == (5, 3), "the original's optimizer does not step the copy"
    twin_optimizer = make_optimizer(twin)
    twin.rankallocator.attach(twin_optimizer)
    hooked_steps(twin, twin_optimizer, range(3, 12))
    assert (allocator.t, twin.rankallocator.t) == (5, 12)
    assert (lambdas(twin) != 0).sum() == 5


def test_a_copy_steps_by_hand_without_an_optimizer(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    hooked_steps(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    train(twin, make_optimizer(twin), twin.rankallocator, range(3, 12))
    assert twin.rankallocator.is_final


def test_reset_keeps_the_optimizer(run):
    model, optimizer, allocator = run
    allocator.attach(optimizer)
    hooked_steps(model, optimizer, range(4))
    allocator.reset()
    hooked_steps(model, optimizer, range(4))
    assert allocator.t == 4
