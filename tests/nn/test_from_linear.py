"""``from_linear`` on layers that are more than an nn.Linear: what it would lose is kept, or refused."""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from adalora_fast import AdaLoraLinear
from adalora_fast.nn.calls import is_called
from adalora_fast.nn.plain import HOOKS


class Scaled(nn.Linear):
    def forward(self, x):
        return 3.0 * super().forward(x)


class Named(nn.Linear):
    """Computes what nn.Linear does; other code may ask for its class or call what it adds."""

    def norm(self):
        return self.weight.norm()


class Wrapped(nn.Parameter):
    """A weight that knows its own product, as quantised ones do."""


def with_weight(weight):
    linear = nn.Linear(6, 5)
    del linear.weight
    linear.weight = weight
    return linear


def whole_numbers():
    return nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)


def with_hook(attribute):
    """A linear layer with one hook of this kind."""
    linear = nn.Linear(6, 5)
    register = {
        "_forward_hooks": lambda hook: linear.register_forward_hook(hook, with_kwargs=True),
        "_forward_pre_hooks": linear.register_forward_pre_hook,
        "_backward_hooks": linear.register_full_backward_hook,
        "_backward_pre_hooks": linear.register_full_backward_pre_hook,
        "_state_dict_hooks": linear.register_state_dict_post_hook,
        "_state_dict_pre_hooks": linear.register_state_dict_pre_hook,
        "_load_state_dict_pre_hooks": linear.register_load_state_dict_pre_hook,
        "_load_state_dict_post_hooks": linear.register_load_state_dict_post_hook,
    }[attribute]

    def steering(*arguments):
        return None

    register(steering)
    return linear


def with_own_forward():
    linear = nn.Linear(6, 5)
    linear.forward = functools.partial(nn.Linear.forward, linear)
    return linear


def compiled():
    linear = nn.Linear(6, 5)
    linear.compile(backend="eager")
    return linear


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Scaled(6, 5), "is a Scaled, whose own behaviour would be lost; adapt it through PEFT"),
        (lambda: Named(6, 5), "is a Named, whose own behaviour would be lost"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), r"parametrized .*remove_parametrizations"),
        (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), r"parametrized .*remove_parametrizations"),
        (lambda: spectral_norm(nn.Linear(6, 5)), r"SpectralNorm.*remove_spectral_norm"),
        (lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5), r"L1Unstructured.*prune\.remove"),
        (lambda: nn.LazyLinear(5), "is a LazyLinear without a weight; run one batch through the model"),
        (with_own_forward, "has a forward that was put onto it"),
        (compiled, r"was compiled by itself; call compile\(\) on the adapted layer"),
        (lambda: with_weight(Wrapped(torch.randn(5, 6))), "has a Wrapped as its weight"),
        (lambda: with_weight(whole_numbers()), r"floating-point weights, this has torch\.int8"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(make, said):
    linear = make()
    trainable = [parameter.requires_grad for parameter in linear.parameters()]
    with pytest.raises(TypeError, match=rf"from_linear needs an nn\.Linear .*{said}") as error:
        AdaLoraLinear.from_linear(linear, 2)
    assert "\n" not in str(error.value)
    assert [parameter.requires_grad for parameter in linear.parameters()] == trainable, "it was changed"


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_made_in_every_call_is_adapted_once_it_is_written_down():
    linear = weight_norm(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    with pytest.raises(TypeError, match=r"WeightNorm.*torch\.nn\.utils\.remove_weight_norm"):
        AdaLoraLinear.from_linear(linear, 2)
    expected = linear(x)
    torch.testing.assert_close(AdaLoraLinear.from_linear(remove_weight_norm(linear), 2)(x), expected)
    linear = parametrizations.weight_norm(nn.Linear(6, 5))
    expected = linear(x)
    remove_parametrizations(linear, "weight")
    torch.testing.assert_close(AdaLoraLinear.from_linear(linear, 2)(x), expected)


@pytest.mark.parametrize("attribute", HOOKS)
def test_a_hook_of_any_kind_is_refused_by_its_name(attribute):
    linear = with_hook(attribute)
    assert getattr(linear, attribute)
    with pytest.raises(TypeError, match=r"hook \(.*steering\).*register it on the adapted layer"):
        AdaLoraLinear.from_linear(linear, 2)


def test_every_kind_of_hook_is_known():
    """PyTorch may add one."""
    kinds = {name for name in nn.Module().__dict__ if name.endswith("hooks")}
    assert kinds == set(HOOKS)


def test_a_hook_on_the_adapted_layer_runs_and_stays_with_the_frozen_one():
    layer = AdaLoraLinear.from_linear(nn.Linear(6, 5), 2)
    x, seen = torch.randn(3, 6), []
    expected = layer(x)
    layer.register_forward_hook(lambda module, inputs, kwargs, output: output + 1.0, with_kwargs=True)
    layer.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(1))
    torch.testing.assert_close(layer(x), expected + 1)
    frozen = layer.to_linear()
    torch.testing.assert_close(frozen(x), expected + 1)
    frozen(x.clone().requires_grad_()).sum().backward()
    assert seen == [1]
    assert is_called not in frozen._forward_pre_hooks.values()


def test_further_members_are_kept():
    linear = nn.Linear(6, 5)
    linear.tag, linear._is_hf_initialized = "first", True
    linear.register_buffer("largest", torch.ones(6))
    linear.register_buffer("passing", torch.ones(6), persistent=False)
    linear.gate = nn.Parameter(torch.ones(1))
    linear.probe = nn.Linear(5, 2)
    layer = AdaLoraLinear.from_linear(linear, 2)
    for module in (layer, layer.to_linear(), copy.deepcopy(layer)):
        assert module.tag == "first" and module._is_hf_initialized
        assert set(module.state_dict()) - {"lora_A", "lora_E", "lora_B"} == set(linear.state_dict())
        assert {name for name, _ in module.named_buffers()} == {"largest", "passing"}
    assert layer.gate is linear.gate and layer.gate.requires_grad and layer.probe is linear.probe
    assert not hasattr(layer.to_linear(), "ranknum")


def test_a_member_whose_name_means_something_else_is_refused():
    linear = nn.Linear(6, 5)
    linear.alpha = 3
    with pytest.raises(ValueError, match="an attribute 'alpha', which is AdaLoraLinear's own; rename it"):
        AdaLoraLinear.from_linear(linear, 2)


def test_a_weight_that_was_resized():
    linear = nn.Linear(6, 5)
    linear.weight, linear.bias = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7))
    layer = AdaLoraLinear.from_linear(linear, 2)
    x = torch.randn(3, 6)
    assert layer.out_features == 7 and torch.equal(layer(x), linear(x))
    assert torch.equal(layer.to_linear()(x), linear(x))


def test_what_mha_projects_with_is_an_ordinary_linear():
    linear = nn.modules.linear.NonDynamicallyQuantizableLinear(6, 5)
    x = torch.randn(3, 6)
    assert torch.equal(AdaLoraLinear.from_linear(linear, 2)(x), linear(x))


def test_a_lazy_linear_that_has_run_is_one():
    linear = nn.LazyLinear(5)
    x = torch.randn(3, 6)
    expected = linear(x)
    assert torch.equal(AdaLoraLinear.from_linear(linear, 2)(x), expected)


def test_the_hook_that_keeps_it_called_is_copied_and_pickled():
    layer = AdaLoraLinear(6, 5, 2)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert list(twin._forward_pre_hooks.values()) == [is_called]
