"""The model is cast, its parameters are replaced, a layer changes shape: the allocator follows or says no."""

import pytest
import torch
from torch import nn

from tests.helpers.small_model import (
    backward,
    kept,
    lambdas,
    layers_of,
    make_allocator,
    make_model,
    make_optimizer,
    train,
)


@pytest.mark.parametrize("when", [0, 3, 9, 11])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_is_cast_during_the_run(when, dtype):
    model = make_model(dtype=torch.float32)
    allocator = make_allocator(model)
    train(model, make_optimizer(model), allocator, range(when))
    model.to(dtype)
    train(model, make_optimizer(model), allocator, range(when, 12))
    assert sum(allocator.ranks().values()) == 5 == (lambdas(model) != 0).sum()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("when", [0, 3, 10])
def test_parameters_replaced_by_new_objects(when):
    """As ``load_state_dict(assign=True)`` or a sharding wrapper does: the same names, other tensors."""
    results = []
    for replaced in (False, True):
        model = make_model()
        allocator = make_allocator(model)
        train(model, make_optimizer(model, torch.optim.SGD), allocator, range(when))
        if replaced:
            for layer in layers_of(model):
                for name, factor in layer.factors()._asdict().items():
                    setattr(layer, name, nn.Parameter(factor.detach().clone()))
        train(model, make_optimizer(model, torch.optim.SGD), allocator, range(when, 12))
        results.append((kept(allocator), lambdas(model)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_load_state_dict_with_assign():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    train(model, optimizer, allocator, range(4))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for layer in layers_of(model):
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
    train(model, make_optimizer(model), allocator, range(4, 12))
    assert (lambdas(model) != 0).sum() == 5


def test_a_layer_of_another_rank_is_refused():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    train(model, optimizer, allocator, range(3))
    layer = layers_of(model)[1]
    layer.lora_A = nn.Parameter(torch.randn(2, 8, dtype=torch.float64))
    layer.lora_E = nn.Parameter(torch.randn(2, 1, dtype=torch.float64))
    layer.lora_B = nn.Parameter(torch.randn(7, 2, dtype=torch.float64))
    backward(model, 3)
    with pytest.raises(
        ValueError, match=r"adapter shapes changed since the allocator was made; call rebind\(\)"
    ):
        allocator.step()
    allocator.rebind()
    assert len(kept(allocator)) == 11 and all(kept(allocator))


def test_a_layer_of_another_rank_is_refused_after_the_final_mask_too():
    model = make_model()
    optimizer, allocator = make_optimizer(model), make_allocator(model)
    train(model, optimizer, allocator, range(12))
    before = lambdas(model)
    layer = layers_of(model)[1]
    layer.lora_A = nn.Parameter(torch.randn(2, 8, dtype=torch.float64))
    layer.lora_E = nn.Parameter(torch.randn(2, 1, dtype=torch.float64))
    layer.lora_B = nn.Parameter(torch.randn(7, 2, dtype=torch.float64))
    backward(model, 12)
    with pytest.raises(ValueError, match=r"adapter shapes changed|the mask is \(12,\), the matrices have 11"):
        allocator.step()
    assert torch.equal(lambdas(model)[:4], before[:4])


def test_layers_on_several_devices_are_refused():
    model = make_model()
    model[4].to("meta")
    with pytest.raises(ValueError, match=r"several devices \(\['cpu', 'meta'\]\)"):
        make_allocator(model)


def test_half_adapters_are_scored_in_float32():
    model = make_model(dtype=torch.bfloat16).to(torch.bfloat16)
    allocator = make_allocator(model)
    train(model, make_optimizer(model), allocator, range(4))
    statistics = [t for name, t in allocator.state_dict()["tensors"].items() if name.startswith("ema/")]
    assert len(statistics) == 9 and all(t.dtype == torch.float32 for t in statistics)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in statistics)
