"""One layer in float64: forward and every gradient of the fused SVDLinear against PEFT's."""

import copy

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_fast.integrations.layers import FusedSVDLinear, fuse_layer
from tests.helpers.parity_runs import TOLERANCES

IN, OUT = 10, 14
BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
}
FACTORS = ("lora_A", "lora_E", "lora_B")
every_base = pytest.mark.parametrize("base", BASES)


def pair(base: str, rank: int = 3, dropout: float = 0.0) -> tuple[SVDLinear, FusedSVDLinear]:
    """PEFT's layer with random weights, and its fused twin."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        total_step=10,
        init_r=rank,
        lora_dropout=dropout,
        fan_in_fan_out=base == "Conv1D",
        target_modules=["x"],
    )
    layer = SVDLinear(BASES[base](), "default", config=config, r=rank, lora_alpha=8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter is not layer.ranknum["default"]:
                parameter.copy_(torch.randn_like(parameter))
    layer.base_layer.requires_grad_(False)
    twin = copy.deepcopy(layer)
    assert fuse_layer(twin, "default", "default") is None
    assert type(twin) is FusedSVDLinear
    return layer, twin


def evaluate(layer: SVDLinear, x: torch.Tensor, calls: int = 1, seed: int = 7) -> dict[str, torch.Tensor]:
    """The output of ``calls`` uses of the layer and the gradients by its factors and by x."""
    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    outputs = [layer(x * (1 + call)) for call in range(calls)]
    y = torch.cat([output.reshape(-1, OUT) for output in outputs])
    weights = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    (y * weights + y.square()).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: getattr(layer, name)["default"].grad for name in FACTORS}


def check(peft: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    assert peft.keys() == ours.keys()
    for name, expected in peft.items():
        assert ours[name].shape == expected.shape, name
        scale = expected.abs().max() if expected.numel() else 1.0
        assert (ours[name] - expected).abs().le(TOLERANCES["layer"] * scale).all(), name


@every_base
@pytest.mark.parametrize("shape", [(2, 5, IN), (1, 1, IN), (63, IN), (1, IN), (IN,), (2, 3, 4, IN)])
def test_forward_and_gradients(base, shape):
    layer, twin = pair(base)
    x = torch.randn(shape, dtype=torch.float64)
    check(evaluate(layer, x), evaluate(twin, x))


@every_base
@pytest.mark.parametrize("rank", [1, 8, 12, 16, 33])
def test_ranks(base, rank):
    layer, twin = pair(base, rank)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    check(evaluate(layer, x), evaluate(twin, x))


@every_base
def test_dropout_with_the_same_seed(base):
    layer, twin = pair(base, dropout=0.3)
    x = torch.randn(4, 6, IN, dtype=torch.float64)
    peft = evaluate(layer, x, calls=2)
    check(peft, evaluate(twin, x, calls=2))
    assert not torch.equal(evaluate(layer.eval(), x, calls=2)["y"], peft["y"])  # it was on
    check(evaluate(layer.eval(), x), evaluate(twin.eval(), x))


@every_base
def test_used_twice_in_one_forward(base):
    layer, twin = pair(base)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    check(evaluate(layer, x, calls=3), evaluate(twin, x, calls=3))


@every_base
def test_pruned_triplets(base):
    layer, twin = pair(base, rank=4)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    with torch.no_grad():
        for each in (layer, twin):
            each.lora_E["default"][1:3] = 0.0
    ours = evaluate(twin, x)
    check(evaluate(layer, x), ours)
    assert (ours["lora_A"][1:3] == 0).all() and (ours["lora_B"][:, 1:3] == 0).all()  # exactly zero
    assert (ours["lora_E"] != 0).all()  # but they may come back


@pytest.mark.parametrize(
    "base", [base for base in BASES if base != "Conv1D"]
)  # which refuses such input itself
def test_input_that_is_not_contiguous(base):
    layer, twin = pair(base)
    x = torch.randn(IN, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    assert not x.is_contiguous()
    check(evaluate(layer, x), evaluate(twin, x))


@every_base
def test_rank_zero(base):
    layer, twin = pair(base, rank=0)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin(x), twin.base_layer(x))


def test_an_empty_batch():
    layer, twin = pair("linear")
    x = torch.randn(0, 5, IN, dtype=torch.float64)
    check(evaluate(layer, x), evaluate(twin, x))
