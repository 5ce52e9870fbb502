"""The fused layer beside PEFT's for every type of base, factors and autocast: values, gradients, types."""

import copy

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adalora_fast.integrations.layers import fuse_layer

IN, OUT = 48, 40
HALF = (torch.float16, torch.bfloat16)
BASES = [(torch.float32, torch.float32)] + [
    (half, factors) for half in HALF for factors in (torch.float32, half)
]
EPSILON = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FACTORS = ("lora_A", "lora_E", "lora_B")


def layer_of(base: torch.dtype, factors: torch.dtype, conv1d: bool) -> SVDLinear:
    """PEFT's layer with an adapter that shows."""
    torch.manual_seed(0)
    config = AdaLoraConfig(total_step=10, init_r=5, fan_in_fan_out=conv1d, target_modules=["x"])
    linear = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT)
    layer = SVDLinear(linear.to(base), "default", config=config, r=5, lora_alpha=8)
    for name in FACTORS:
        factor = getattr(layer, name)["default"]
        factor.data = (torch.randn(factor.shape) * 0.4).to(factors)
    layer.base_layer.requires_grad_(False)
    return layer


def evaluate(layer: SVDLinear, dtype: torch.dtype, autocast: torch.dtype | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, IN, generator=generator).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: getattr(layer, name)["default"].grad for name in FACTORS}


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("autocast", [None, *HALF], ids=["off", "fp16", "bf16"])
@pytest.mark.parametrize(("base", "factors"), BASES, ids=str)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_as_peft(conv1d, base, factors, autocast, precision):
    peft = layer_of(base, factors, conv1d)
    ours = copy.deepcopy(peft)
    assert fuse_layer(ours, precision, "default") is None
    expected, found = evaluate(peft, base, autocast), evaluate(ours, base, autocast)
    epsilon = max(EPSILON[dtype] for dtype in (base, factors, autocast or base))
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        allowed = 4 * epsilon * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_an_input_of_another_type_needs_autocast_as_in_peft(conv1d):
    peft = layer_of(torch.float32, torch.float32, conv1d)
    ours = copy.deepcopy(peft)
    fuse_layer(ours, "default", "default")
    x = torch.randn(2, IN, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        peft(x)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, weight torch\.float32.*autocast"):
        ours(x)
