"""γ ∇R once per optimizer step for models without a PeftModel at the top."""

import copy

import pytest
import torch

from adalora_fast import fuse, orthogonality_loss
from adalora_fast.integrations.locate import tuners
from tests.helpers.injecting import MAKERS, Towers
from tests.helpers.models import batch, trainable
from tests.helpers.peft_models import one_line

GAMMA = 0.5


def sides(model) -> list[torch.Tensor]:
    layers = [layer for tuner in tuners(model) for layer in tuner.rankallocator.factors()]
    return [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]


def one_step(model, loss) -> None:
    """An optimizer step that changes nothing, with all allocators attached."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    for tuner in tuners(model):
        tuner.rankallocator.attach(optimizer, automatic=False)
    loss(model).backward()
    optimizer.step()


def is_once(model, expected: list[torch.Tensor]) -> None:
    for side, part in zip(sides(model), expected, strict=True):
        torch.testing.assert_close(side.grad, part, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("labelled", [True, False], ids=["own loss", "from logits"])
def test_a_model_that_carries_its_layers_itself(make, labelled):
    model = fuse(MAKERS[make](orth_reg_weight=GAMMA).double()).train()
    alone = copy.deepcopy(model)
    (GAMMA * orthogonality_loss(alone)).backward()
    expected = [side.grad for side in sides(alone)]
    inputs = batch(1)
    if not labelled:
        inputs.pop("labels")
    one_step(model, lambda m: m(**inputs).loss if labelled else m(**inputs).logits.square().mean())
    is_once(model, expected)


def test_a_term_over_two_towers_is_not_added_a_second_time():
    model = fuse(Towers().double()).train()
    alone = copy.deepcopy(model)
    (GAMMA * orthogonality_loss(alone)).backward()
    expected = [side.grad for side in sides(alone)]
    one_step(model, lambda m: m(**batch(1))["loss"] + GAMMA * orthogonality_loss(m))
    is_once(model, expected)


def test_each_of_two_towers_gets_its_own_term():
    model = fuse(Towers().double()).train()
    alone = copy.deepcopy(model)
    sum(GAMMA * tuner.orthogonality_loss() for tuner in tuners(alone)).backward()
    expected = [side.grad for side in sides(alone)]
    one_step(model, lambda m: m(**batch(1))["loss"])
    is_once(model, expected)


def test_the_tasks_gradient_of_two_towers_needs_a_term_for_each():
    model = fuse(Towers(), score_gradient="task").train()
    with one_line(ValueError, "2 allocators", "add up"):
        orthogonality_loss(model)
