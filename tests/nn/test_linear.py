"""AdaLoraLinear: a linear layer that starts as the one it adapts, merges, saves, moves and copies."""

import copy
import io

import pytest
import torch
from torch import nn

from adalora_fast import AdaLoraLinear
from tests.helpers.tolerances import assert_accurate

HALF = (torch.bfloat16, torch.float16)


def trained(layer):
    """The layer with an adapter that does something."""
    nn.init.normal_(layer.lora_E)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [0, 1, 8])
@pytest.mark.parametrize("training", [True, False])
def test_from_linear_starts_as_the_linear(dtype, bias, r, training):
    linear = nn.Linear(37, 29, bias=bias, dtype=dtype).train(training)
    layer = AdaLoraLinear.from_linear(linear, r, alpha=32, dropout=0.3)
    x = torch.randn(63, 37, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and (not bias or not layer.bias.requires_grad)
    assert layer.training is training
    assert all(
        f.requires_grad and f.dtype == torch.promote_types(dtype, torch.float32) for f in layer.factors()
    )
    assert [tuple(f.shape) for f in layer.factors()] == [(r, 37), (r, 1), (29, r)]
    assert layer.scaling == 32 / (r + 1e-5)


def test_initial_factors():
    torch.manual_seed(0)
    layer = AdaLoraLinear.from_linear(nn.Linear(500, 400), 50)
    for factor in (layer.lora_A, layer.lora_B):
        assert abs(factor.mean()) < 5e-4 and abs(factor.std() - 0.02) < 5e-4
    assert (layer.lora_E == 0).all()


def test_a_new_layer_draws_its_weight_as_linear_does():
    torch.manual_seed(0)
    linear = nn.Linear(20, 30)
    torch.manual_seed(0)
    layer = AdaLoraLinear(20, 30, 4)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


def test_only_the_adapter_learns():
    layer = trained(AdaLoraLinear(5, 6, 3))
    layer(torch.randn(4, 5)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_E",
        "lora_B",
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(dtype, bias, safe):
    layer = trained(AdaLoraLinear(37, 29, 4, bias=bias, dtype=dtype, dropout=0.5)).eval()
    x, before = torch.randn(9, 37, dtype=dtype), layer.weight.detach().clone()
    y = layer(x)
    layer.merge(safe_merge=safe)
    assert layer.merged and not torch.equal(layer.weight, before)
    assert_accurate(layer(x), y, dtype, factor=10)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    merged = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, merged), "merging twice must not add twice"
    layer.unmerge()
    assert not layer.merged
    assert_accurate(layer.weight, before, dtype, factor=10)
    weight = layer.weight.detach().clone()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_E", "lora_B"])
def test_safe_merge_refuses_a_broken_adapter(dtype, value, factor):
    layer = trained(AdaLoraLinear(5, 6, 3, dtype=dtype))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        getattr(layer, factor).view(-1)[0] = value
    with pytest.raises(ValueError, match="not be finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, before)


def test_safe_merge_refuses_what_overflows_in_the_weights_type():
    layer = AdaLoraLinear(4, 4, 2, dtype=torch.float16, alpha=2.0)
    with torch.no_grad():
        for factor, value in zip(layer.factors(), (300, 1, 300), strict=True):
            factor.fill_(value)  # ΔW = 1.8e5: finite in float32, infinite in float16
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="not be finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, before)


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero(bias):
    linear = nn.Linear(5, 6, bias=bias)
    layer = AdaLoraLinear.from_linear(linear, 0)
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), linear(x))
    before = layer.weight.detach().clone()
    layer.merge(safe_merge=True)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert (layer.get_delta_weight() == 0).all() and layer.get_delta_weight().shape == (6, 5)


def test_delta_weight_is_what_the_layer_adds():
    layer = trained(AdaLoraLinear(7, 6, 3, dtype=torch.float64)).eval()
    x = torch.randn(9, 7, dtype=torch.float64)
    difference = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    assert_accurate(x @ layer.get_delta_weight().t(), difference.detach(), torch.float64, factor=10)
    A, E, B = layer.factors()
    assert_accurate(
        layer.get_delta_weight(), 16 / (3 + 1e-5) * (B @ E.diagflat() @ A).detach(), torch.float64
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_base_trains_a_float32_adapter(dtype):
    layer = AdaLoraLinear.from_linear(nn.Linear(37, 29, dtype=dtype), 4, dropout=0.1)
    y = trained(layer)(torch.randn(9, 37, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(f.dtype == f.grad.dtype == torch.float32 for f in layer.factors())


def test_state_dict_round_trip():
    layer, other = trained(AdaLoraLinear(5, 6, 3)), AdaLoraLinear(5, 6, 3)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_E", "lora_B"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), other(x))


def test_a_linears_state_dict_loads():
    linear, layer = nn.Linear(5, 6), AdaLoraLinear(5, 6, 3)
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(result.missing_keys) == {"lora_A", "lora_E", "lora_B"} and not result.unexpected_keys
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), linear(x))
    with pytest.raises(RuntimeError, match="lora_A"):
        layer.load_state_dict(linear.state_dict())


def test_deepcopy_is_independent():
    layer = trained(AdaLoraLinear(5, 6, 3))
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), twin(x))
    twin.merge()
    with torch.no_grad():
        twin.lora_A.zero_()
    assert not layer.merged and not torch.equal(layer.lora_A, twin.lora_A)


def test_pickling():
    layer = trained(AdaLoraLinear(5, 6, 3))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(4, 5)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_cast(dtype):
    layer = trained(AdaLoraLinear(5, 6, 3)).to(dtype)
    y = layer(torch.randn(4, 5, dtype=dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and layer.lora_A.grad.dtype == dtype


def test_meta_and_back():
    layer = AdaLoraLinear(5, 6, 3, device="meta")
    assert layer(torch.randn(4, 5, device="meta")).shape == (4, 6)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters()) and (layer.lora_E == 0).all()
    assert layer(torch.randn(4, 5)).isfinite().all()
    assert AdaLoraLinear.from_linear(nn.Linear(5, 6, device="meta"), 3).lora_A.is_meta


def test_default_dtype_is_respected():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = AdaLoraLinear(5, 6, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32


def test_repr_says_what_it_is():
    text = repr(AdaLoraLinear(5, 6, 3, alpha=32, dropout=0.1, bias=False))
    assert all(
        part in text
        for part in ("in_features=5", "out_features=6", "r=3", "alpha=32", "dropout=0.1", "bias=False")
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"r": -1}, "r must be an integer of at least 0, got -1"),
        ({"r": 2.0}, "r must be an integer of at least 0, got 2.0"),
        ({"r": True}, "r must be an integer of at least 0, got True"),
        ({"r": 2, "dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"r": 2, "dropout": float("nan")}, r"dropout must be in \[0, 1\], got nan"),
        ({"r": 2, "precision": "tf32"}, "precision 'tf32' is not one of"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, said):
    for make in (
        lambda **a: AdaLoraLinear(5, 6, **a),
        lambda **a: AdaLoraLinear.from_linear(nn.Linear(5, 6), **a),
    ):
        with pytest.raises(ValueError, match=said) as error:
            make(**arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 3, 1), nn.Embedding(3, 4), None, nn.Bilinear(2, 2, 2)], ids=str
)
def test_only_linear_layers(module):
    with pytest.raises(TypeError, match=r"from_linear needs an nn\.Linear"):
        AdaLoraLinear.from_linear(module, 2)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"x .*4.*lora_A"):
        AdaLoraLinear(5, 6, 3)(torch.randn(2, 4))
