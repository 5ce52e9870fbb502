"""``orthogonality_loss`` finds the adapted layers of any model and of wrappers around it."""

import pytest
import torch
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss
from adalora_fast.nn import adapted_layers
from tests.helpers.tolerances import assert_accurate


def make_model(ranks=(4, 2, 0), dtype=torch.float64):
    torch.manual_seed(0)
    sizes = [(6, 5), (5, 7), (7, 3)]
    layers = [AdaLoraLinear(k, n, r, dtype=dtype) for (k, n), r in zip(sizes, ranks, strict=False)]
    for layer in layers:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return nn.Sequential(layers[0], nn.ReLU(), nn.Sequential(*layers[1:]), nn.Linear(3, 2, dtype=dtype))


def naive(model, penalty):
    norms = []
    for layer in (module for module in model.modules() if isinstance(module, AdaLoraLinear)):
        eye = torch.eye(layer.r, dtype=layer.lora_A.dtype)
        norms += [(layer.lora_A @ layer.lora_A.T - eye).norm(), (layer.lora_B.T @ layer.lora_B - eye).norm()]
    norms = torch.stack(norms)
    return norms.mean() if penalty == "fro" else norms.square().sum()


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model under ``module``, nothing else of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("penalty", ["fro", "squared"])
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: Wrapper(Wrapper(m)), torch.compile])
def test_value_and_gradient(penalty, wrap):
    model, other = make_model((4, 2, 3)), make_model((4, 2, 3))
    value, want = orthogonality_loss(wrap(model), penalty), naive(other, penalty)
    assert value.shape == () and value.dtype == torch.float64
    assert_accurate(value, want.detach(), torch.float64)
    value.backward()
    want.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_accurate(p.grad, q.grad, torch.float64, what=name)


def test_layers_come_in_module_order_once_each():
    model = make_model()
    model.append(model[0])  # the same layer under two names
    assert list(adapted_layers(model)) == ["0", "2.0", "2.1"]


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.Sequential(), Wrapper(nn.ReLU())], ids=lambda m: type(m).__name__
)
def test_no_adapted_layer(model):
    with pytest.raises(ValueError, match=r"has no adapted layer; make some with AdaLoraLinear\.from_linear"):
        orthogonality_loss(model)


def test_unknown_penalty():
    with pytest.raises(ValueError, match="orth_penalty 'nuclear' is not one of"):
        orthogonality_loss(make_model(), "nuclear")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_half_models_get_a_float32_value(dtype):
    model = make_model(dtype=dtype)
    assert orthogonality_loss(model).dtype == torch.float32
    assert orthogonality_loss(model.to(torch.bfloat16)).dtype == torch.float32


def test_without_gradients_and_frozen():
    model = make_model()
    with torch.no_grad():
        assert not orthogonality_loss(model).requires_grad
    model.requires_grad_(False)
    assert not orthogonality_loss(model).requires_grad


@pytest.mark.parametrize("score_gradient", ["total", "task"])
def test_a_frozen_model_with_an_allocator(score_gradient):
    model = make_model()
    RankAllocator(model, total_step=10, target_total_rank=3, score_gradient=score_gradient)
    model.requires_grad_(False)
    assert orthogonality_loss(model).item() == orthogonality_loss(make_model()).item()
