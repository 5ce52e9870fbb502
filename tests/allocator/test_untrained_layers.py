"""An adapted layer that never gets a gradient is named once, early in the run; others are not named."""

import copy
import warnings

import pytest
import torch
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss
from adalora_fast.allocator.guard import FIRST_STEPS, UntrainedLayers

SAID = r"1 of 3 adapted layers had no gradient in the first {} training steps .*: {}; if their weight is read"


class Model(nn.Module):
    """Three adapted layers; ``path`` says which of them run in a step. ``read`` is read, never called."""

    def __init__(self, read=False):
        super().__init__()
        self.layers = nn.ModuleList(AdaLoraLinear(6, 6, 3) for _ in range(3))
        self.read = read

    def forward(self, x, path=(0, 1, 2)):
        for number in path:
            layer = self.layers[number]
            is_read = self.read and number == 1
            x = x + torch.tanh(nn.functional.linear(x, layer.weight) if is_read else layer(x))
        return x


def train(model, allocator, steps, path=lambda step: (0, 1, 2), weight=0.1):
    """Ordinary steps, with the orthogonality term, which reaches lora_A and lora_B of every layer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss = model(torch.randn(4, 6), path(step)).square().mean()
        (loss + weight * orthogonality_loss(model)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()


def made(model, total_step=40, **options):
    return RankAllocator(model, target_r=1, tinit=2, tfinal=4, total_step=total_step, **options)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_layer_whose_weight_is_read_is_named_once():
    model = Model(read=True)
    allocator = made(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, allocator, FIRST_STEPS - 1)
    with pytest.warns(UserWarning, match=SAID.format(FIRST_STEPS, r"layers\.1")):
        train(model, allocator, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, allocator, 20)


def test_a_layer_that_never_runs_is_named():
    model = Model()
    with pytest.warns(UserWarning, match=SAID.format(FIRST_STEPS, r"layers\.2")):
        train(model, made(model), FIRST_STEPS, lambda step: (0, 1))


def test_frozen_layers_are_named_as_such():
    model = Model()
    model.layers[2].lora_E.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 of 3 adapted layers .*: layers\.0, layers\.2 \(frozen\);"):
        train(model, made(model), FIRST_STEPS, lambda step: (1, 2))


def test_layers_that_run_now_and_then_are_not_named(quiet):
    """Layerdrop, mixtures of experts: every layer runs in some of the first steps."""
    model = Model()
    train(model, made(model), 30, lambda step: ((0,), (1,), (2, 0))[step % 3])


def test_an_ordinary_start_is_not_named(quiet):
    """lora_A's and lora_B's gradients are zero while lora_E is; zero is a gradient."""
    model = Model()
    assert all((layer.lora_E == 0).all() for layer in model.layers)
    train(model, made(model), 15)


def test_steps_in_which_nothing_is_trained_do_not_count(quiet):
    watch, parameters = UntrainedLayers(100), [nn.Parameter(torch.zeros(1, 1)) for _ in range(6)]
    gradient = torch.ones(1, 1)
    for _ in range(50):  # the orthogonality term alone
        watch.look(("a", "b"), parameters, [gradient, None, gradient] * 2)
    for step in range(FIRST_STEPS):
        watch.look(
            ("a", "b"), parameters, [None, gradient, None, None, gradient if step == 9 else None, None]
        )


def test_a_layer_without_triplets_is_not_named(quiet):
    model = Model()
    model.layers[1] = AdaLoraLinear(6, 6, 0)
    train(model, made(model), 15)


def test_a_short_run_is_judged_at_its_end():
    model = Model()
    allocator = made(model, total_step=8)
    assert allocator.schedule.final_step == 4 < FIRST_STEPS
    with pytest.warns(UserWarning, match=SAID.format(4, r"layers\.0")):
        train(model, allocator, 8, lambda step: (1, 2))


def test_many_layers_are_counted_and_some_are_shown():
    watch = UntrainedLayers(1)
    parameters, names = [nn.Parameter(torch.zeros(1, 1)) for _ in range(36)], [f"layer{i}" for i in range(12)]
    shown = r"11 of 12 .*: layer1, layer2, layer3, layer4, layer5 and 6 more;"
    with pytest.warns(UserWarning, match=shown) as said:
        watch.look(names, parameters, [None, torch.ones(1, 1), None, *[None] * 33])
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_a_capture_is_judged_at_once():
    """A CUDA graph trains the layers of its capture: there is no later step to wait for."""
    watch, parameters = UntrainedLayers(100), [nn.Parameter(torch.zeros(1, 1)) for _ in range(6)]
    grads = [None, torch.ones(1, 1), None, None, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            watch.look(("a", "b"), parameters, grads)
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers had no gradient in the first 4 .*: b;"):
        watch.look(("a", "b"), parameters, grads, at_once=True)


def test_it_starts_again_with_the_run(quiet):
    model = Model()
    allocator = made(model)
    train(model, allocator, 20)
    allocator.reset()
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"layers\.1"):
        train(twin, twin.rankallocator, FIRST_STEPS, lambda step: (0, 2))
    train(model, allocator, FIRST_STEPS)
