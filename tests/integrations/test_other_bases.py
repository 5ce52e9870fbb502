"""Bases beside plain linears: GPTQ's, weights that are tensor subclasses, convolutions, embeddings."""

import copy
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.gptq import SVDQuantLinear
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn

from adalora_fast import fuse
from adalora_fast.integrations.layers import FusedSVDLinear, adapter_layers
from tests.helpers.models import awake
from tests.helpers.peft_models import one_line

IN, OUT = 32, 24
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "total_step": 20}
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed; pip install torchao"
)


class Net(nn.Module):
    """Two layers; ``first`` is the one under test."""

    def __init__(self, first: nn.Module):
        super().__init__()
        self.first, self.second = first, nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted_net(first: nn.Module) -> PeftModel:
    torch.manual_seed(5)
    return awake(get_peft_model(Net(first), AdaLoraConfig(**ADALORA, target_modules=["first", "second"])))


def run(model: PeftModel, shape: tuple[int, ...]) -> tuple[list[float], list[dict]]:
    """Losses and rank patterns of a whole run by hand, in PEFT's order."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    generator, losses, patterns = torch.Generator().manual_seed(6), [], []
    for step in range(ADALORA["total_step"]):
        x = torch.randn(shape, generator=generator)
        loss = (model(x) - x.mean()).square().mean()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        values = [layer.lora_E["default"].flatten() for layer in adapter_layers(model).values()]
        patterns.append((torch.cat(values) == 0).tolist())
    return losses, patterns


def assert_trains_as_peft(build, shape: tuple[int, ...]) -> PeftModel:
    """The same losses and the same pruned triplets at every step; returns the fused model."""
    expected, pruned = run(adapted_net(build()), shape)
    ours = fuse(adapted_net(build()))
    losses, found = run(ours, shape)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert found == pruned and sum(pruned[-1]) == len(pruned[-1]) // 2
    return ours


# -- GPTQ --------------------------------------------------------------------------------------------


class QuantLinear(nn.Module):
    """What PEFT asks of a GPTQ layer: sizes, integer weights with scales, a forward that dequantises."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("qweight", torch.randint(-8, 8, (OUT, IN), generator=generator).to(torch.int8))
        self.register_buffer("scales", torch.rand(OUT, 1, generator=generator) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.qweight * self.scales).to(x.dtype))


@pytest.fixture
def gptq(monkeypatch):
    """PEFT takes ``QuantLinear`` for the class of the GPTQ library."""
    monkeypatch.setattr("peft.tuners.adalora.model.get_gptqmodel_quant_linear", lambda *a, **k: QuantLinear)


def test_gptq_trains_as_peft(gptq):
    assert type(adapted_net(QuantLinear()).base_model.model.first) is SVDQuantLinear
    ours = assert_trains_as_peft(QuantLinear, (6, IN))
    assert type(ours.base_model.model.first).__name__ == "FusedSVDQuantLinear"
    assert ours.base_model.unfused == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gptq_gradients(gptq, dtype):
    results = []
    for model in (adapted_net(QuantLinear()), fuse(adapted_net(QuantLinear()))):
        layer = model.base_model.model.first
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(8)).to(dtype).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(f["default"].grad for f in (layer.lora_A, layer.lora_E))])
    for expected, found in zip(*results, strict=True):
        allowed = {torch.float32: 2**-20, torch.bfloat16: 2**-5}[dtype] * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


def test_gptq_is_not_merged(gptq):
    model = fuse(adapted_net(QuantLinear()))
    second = model.base_model.model.second.base_layer.weight.clone()
    with one_line(NotImplementedError, "first cannot be merged", "QuantLinear", "to_lora"):
        model.merge_and_unload()
    assert torch.equal(model.base_model.model.second.base_layer.weight, second)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_gptq_copies(gptq, copier):
    model = fuse(adapted_net(QuantLinear()))
    twin = copier(model)
    assert type(twin.base_model.model.first) is type(model.base_model.model.first)
    x = torch.randn(2, IN)
    assert torch.equal(twin(x), model(x))


# -- weights that know their own product --------------------------------------------------------------


class Doubling(Tensor):
    """A weight whose product is not what its entries say, as a quantised one's is not."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *rest = args
            return F.linear(x, 2 * weight.as_subclass(Tensor), *rest)
        return super().__torch_function__(func, types, args, kwargs)


def linear() -> nn.Linear:
    torch.manual_seed(9)
    return nn.Linear(IN, OUT)


def doubling() -> nn.Linear:
    new = linear()
    new.weight = nn.Parameter(new.weight.data.as_subclass(Doubling), requires_grad=False)
    assert type(new) is nn.Linear and type(new.weight) is Doubling
    return new


def test_a_weight_of_another_type_is_used_through_its_layer():
    ours = assert_trains_as_peft(doubling, (6, IN))
    assert type(ours.base_model.model.first) is FusedSVDLinear
    with one_line(NotImplementedError, "first", "Doubling"):
        ours.merge_adapter()


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights(bits):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

    def build() -> nn.Linear:
        config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(weight_dtype=torch.int4)
        new = nn.Sequential(linear())
        quantize_(new, config)
        return new[0]

    assert type(adapted_net(build()).base_model.model.first) is SVDLinear  # PEFT has no class of its own
    ours = assert_trains_as_peft(build, (6, IN))
    with one_line(NotImplementedError, "first", "quantised", "to_lora"):
        ours.merge_and_unload()


# -- what is no linear ---------------------------------------------------------------------------------


class Images(nn.Module):
    """A convolution whose output a linear layer reads."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(10)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, **options)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.conv(x)).mean((2, 3)))


def test_convolutions_keep_pefts_forward_and_are_pruned_as_pefts():
    def build() -> PeftModel:
        torch.manual_seed(5)
        config = AdaLoraConfig(**ADALORA, target_modules=["conv", "second"])
        return awake(get_peft_model(Images(), config))

    expected, ours = run(build(), (2, 4, 5, 5)), fuse(build())
    losses, pruned = run(ours, (2, 4, 5, 5))
    assert losses == pytest.approx(expected[0], rel=1e-4) and pruned == expected[1]
    assert list(ours.base_model.unfused) == ["conv"]
    assert ours.base_model._check_merge_allowed() is None  # PEFT merges convolutions
    x = torch.randn(2, 4, 5, 5)
    before = ours(x)
    torch.testing.assert_close(ours.merge_and_unload()(x), before)


def test_embeddings_are_refused_by_peft():
    with pytest.raises(ValueError, match=r"Target module Embedding\(9, 4\) is not supported"):
        get_peft_model(
            nn.ModuleDict({"words": nn.Embedding(9, 4)}), AdaLoraConfig(**ADALORA, target_modules=["words"])
        )
