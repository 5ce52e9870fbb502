"""A fused layer calls whatever has behaviour of its own: hooks, forwards and bases that come after ``fuse``,
dropout whose mode is not the layer's.
"""

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from adalora_fast import fuse
from adalora_fast.integrations.layers import FusedSVDLinear

IN, OUT = 6, 5


class Scaled(nn.Linear):
    def forward(self, x):
        return 3.0 * super().forward(x)


def peft_model(dropout=0.0, base=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT) if base is None else base)
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=9, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def layer_of(model):
    return model.base_model.model[0]


def pair(**options):
    """(PEFT's layer, the fused one) with the same weights."""
    peft = peft_model(**options)
    fused = fuse(copy.deepcopy(peft))
    assert isinstance(layer_of(fused), FusedSVDLinear) and not isinstance(layer_of(peft), FusedSVDLinear)
    return layer_of(peft), layer_of(fused)


def steer(base):
    base.register_forward_hook(lambda module, inputs, output: output + 1.0)


def scale_input(base):
    base.register_forward_pre_hook(
        lambda module, inputs, kwargs: ((2 * inputs[0],), kwargs), with_kwargs=True
    )


def own_forward(base):
    original = base.forward
    base.forward = lambda x: 3.0 * original(x)


def other_class(base):
    base.__class__ = Scaled


def parametrized(base):
    parametrizations.weight_norm(base)
    with torch.no_grad():
        base.parametrizations.weight.original0.mul_(2)


CHANGES = (steer, scale_input, own_forward, other_class, parametrized)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_base_has_its_effect(change, when):
    x = torch.randn(4, IN)
    peft = peft_model()
    plain = layer_of(peft)(x)
    if when == "before":
        change(layer_of(peft).base_layer)
        fused = fuse(copy.deepcopy(peft))
    else:
        fused = fuse(copy.deepcopy(peft))
        torch.testing.assert_close(layer_of(fused)(x), plain)
        change(layer_of(peft).base_layer)
        change(layer_of(fused).base_layer)
    expected = layer_of(peft)(x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(layer_of(fused)(x), expected)


def test_another_base_takes_its_place():
    peft, fused = pair()
    other = Scaled(IN, OUT)
    peft.base_layer, fused.base_layer = other, other
    x = torch.randn(4, IN)
    torch.testing.assert_close(fused(x), peft(x))


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_for_every_module_see_the_base(kind):
    """Module trackers and FLOP counters register such hooks."""
    layer, seen = pair()[1], []
    module = nn.modules.module
    register, hook = {
        "forward": (module.register_module_forward_hook, lambda m, inputs, output: seen.append(m)),
        "pre": (module.register_module_forward_pre_hook, lambda m, inputs: seen.append(m)),
        "backward": (module.register_module_full_backward_hook, lambda m, g_in, g_out: seen.append(m)),
    }[kind]
    handle = register(hook)
    try:
        layer(torch.randn(4, IN, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert layer.base_layer in seen
    seen.clear()
    layer(torch.randn(4, IN, requires_grad=True)).sum().backward()
    assert not seen


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_has_its_own_mode(training):
    """Monte Carlo dropout turns it on in evaluation; freezing it turns it off in training."""
    x = torch.randn(50, IN)
    peft, fused = pair(dropout=0.5)
    for layer in (peft, fused):
        layer.train(training)
        layer.lora_dropout.train(not training)
    torch.manual_seed(1)
    expected = peft(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), expected)
    assert torch.equal(expected, peft(x)) is training  # where nothing is dropped, twice the same


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x


def test_another_dropout_is_called():
    peft, fused = pair(dropout=0.5)
    for layer in (peft, fused):
        layer.lora_dropout["default"] = Halved()
    x = torch.randn(4, IN)
    torch.testing.assert_close(fused(x), peft(x))
    half = fused(x) - fused.base_layer(x)
    fused.lora_dropout["default"] = nn.Identity()
    torch.testing.assert_close(2 * half, fused(x) - fused.base_layer(x))


def test_a_hook_on_the_dropout_is_called():
    peft, fused = pair(dropout=0.5)
    for layer in (peft, fused):
        layer.eval().lora_dropout["default"].register_forward_hook(
            lambda module, inputs, output: 0.5 * output
        )
    x = torch.randn(4, IN)
    torch.testing.assert_close(fused(x), peft(x))


def test_a_hook_on_the_adapted_layer_runs_once():
    peft, fused = pair()
    for layer in (peft, fused):
        steer(layer)
    x = torch.randn(4, IN)
    torch.testing.assert_close(fused(x), peft(x))
