"""The fused layer inside PEFT's machinery: merging, hooks, autocast, tracing, checkpointing, odd ranks."""

import copy

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_fast import fuse
from adalora_fast.integrations.layers import FusedSVDLinear, adapter_layers, fuse_layer
from tests.helpers.models import adapted, awake, batch
from tests.helpers.peft_models import adamw, logits, one_line, steps, trained

IN, OUT = 10, 14
KINDS = ("lora_A", "lora_E", "lora_B")


def layer_of(
    rank: int = 4, dtype: torch.dtype = torch.float32, conv1d: bool = False, dropout: float = 0.0
) -> SVDLinear:
    """PEFT's layer with an adapter that shows: the base in ``dtype``, the adapter in float32."""
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT)
    config = AdaLoraConfig(
        total_step=10, init_r=rank, lora_dropout=dropout, fan_in_fan_out=conv1d, target_modules=["x"]
    )
    layer = SVDLinear(base.to(dtype), "default", config=config, r=rank, lora_alpha=8)
    for factor in (layer.lora_A, layer.lora_E, layer.lora_B):
        factor["default"].data = torch.randn(factor["default"].shape)
    layer.base_layer.requires_grad_(False)
    return layer


def fused(layer: SVDLinear, precision: str = "default") -> FusedSVDLinear:
    twin = copy.deepcopy(layer)
    assert fuse_layer(twin, precision, "default") is None
    return twin


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(family, safe):
    model, peft = fuse(awake(adapted(family).double())), awake(adapted(family).double())
    expected = logits(model)
    torch.testing.assert_close(expected, logits(peft))
    model.merge_adapter(safe_merge=safe)
    peft.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), expected)
    for name, layer in adapter_layers(model).items():
        assert layer.merged
        assert torch.equal(layer.base_layer.weight, adapter_layers(peft)[name].base_layer.weight)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in adapter_layers(model).values())
    torch.testing.assert_close(logits(model), expected)
    assert model.base_model.rankallocator is not None


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merge_and_unload(family):
    model = fuse(awake(adapted(family).double()))
    expected = logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert not adapter_layers(plain)
    torch.testing.assert_close(logits(plain), expected)


def test_safe_merge_leaves_the_weights_when_the_adapter_is_broken():
    layer = fused(layer_of())
    before = layer.base_layer.weight.clone()
    layer.lora_B["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)


def test_a_merged_layer_under_disable_adapter_is_unmerged():
    layer = fused(layer_of())
    x = torch.randn(3, IN)
    plain = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), plain)
    assert not layer.merged


def test_unload():
    model = fuse(awake(adapted("bert")))
    with model.disable_adapter():
        expected = logits(model)
    plain = model.unload()
    assert not adapter_layers(plain)
    assert torch.equal(logits(plain), expected)


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_of_the_base_layer_are_called(kind, conv1d):
    layer, calls = fused(layer_of(conv1d=conv1d)), []
    x = torch.randn(2, 5, IN)
    expected = layer(x)
    if kind == "forward":
        layer.base_layer.register_forward_hook(lambda module, inputs, output: calls.append(1) or output + 1)
        expected = expected + 1
    else:
        layer.base_layer.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)
    assert calls == [1, 1]


def test_full_backward_hooks_of_the_base_layer_are_called():
    layer, calls = fused(layer_of()), []
    layer.base_layer.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(1))
    layer(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert calls == [1]


def test_the_base_layers_own_forward_is_respected():
    # accelerate's and others' habit: a new forward is put onto the instance
    layer = fused(layer_of())
    x = torch.randn(3, IN)
    expected, original = layer(x) + 2, layer.base_layer.forward
    layer.base_layer.forward = lambda inputs: original(inputs) + 2
    torch.testing.assert_close(layer(x), expected)


# -- types -----------------------------------------------------------------------------------------


def factor_gradient(layer: nn.Module, kind: str) -> torch.Tensor:
    return getattr(getattr(layer, "_orig_mod", layer), kind)["default"].grad


def evaluate(
    layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Output and gradients for a given gradient of the output."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {kind: factor_gradient(layer, kind) for kind in KINDS}


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Same type, and no further apart than ``tolerance`` times the largest entry."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * expected.abs().max().item())


# The outputs of base, adapter and their sum are each rounded to bfloat16 (2^-8), by PEFT and here.
ROUNDED = 3 * 2**-8


@pytest.mark.parametrize("conv1d", [False, True])
def test_precision_highest_is_peft_on_a_bfloat16_base(conv1d):
    peft = layer_of(dtype=torch.bfloat16, conv1d=conv1d)
    ours = fused(peft, "highest")
    x, dy = torch.randn(4, 6, IN).bfloat16(), torch.randn(4, 6, OUT).bfloat16()
    expected, found = evaluate(peft, x, dy), evaluate(ours, x, dy)
    assert found["y"].dtype == torch.bfloat16
    for name in ("y", "x"):
        assert_near(found[name], expected[name], ROUNDED)
    for name in KINDS:  # all in float32: sums of 4 · 6 · OUT products
        assert_near(found[name], expected[name], 24 * OUT * 2**-24)
    default = evaluate(fused(peft), x, dy)
    assert not torch.allclose(default["lora_A"], found["lora_A"], rtol=1e-4)  # there is something to choose


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_base_default_precision(dtype):
    truth, layer = layer_of(dtype=dtype).double(), fused(layer_of(dtype=dtype))
    x = torch.randn(4, 6, IN).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = truth(x.double())
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 4
    assert (y.double() - expected).abs().max() <= bound * expected.abs().max()
    y.float().sum().backward()
    assert all(
        factor["default"].grad.dtype == torch.float32 for factor in (layer.lora_A, layer.lora_E, layer.lora_B)
    )


@pytest.mark.parametrize("conv1d", [False, True])
def test_autocast_to_bfloat16(conv1d):
    peft = layer_of(conv1d=conv1d)
    x, dy = torch.randn(4, 6, IN), torch.randn(4, 6, OUT)
    expected, found = evaluate(peft, x, dy, autocast=True), evaluate(fused(peft), x, dy, autocast=True)
    assert found["y"].dtype == torch.bfloat16
    for name, tensor in expected.items():  # PEFT's adapter goes through bfloat16 twice more on its way
        assert_near(found[name], tensor, 2 * ROUNDED)


def test_training_under_autocast():
    model = fuse(adapted("bert", total_step=20, tinit=2, tfinal=4))
    optimizer = adamw(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = steps(model, optimizer, 0, 20)
    assert torch.tensor(losses).isfinite().all()
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * 13


# -- tracing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_compiles_without_a_graph_break(conv1d, training):
    torch.compiler.reset()
    layer = fused(layer_of(conv1d=conv1d)).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    expected, found = evaluate(layer, x, dy), evaluate(compiled, x, dy)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_gradient_checkpointing():
    plain, ours = fuse(awake(adapted("bert"))), fuse(awake(adapted("bert")))
    ours.get_base_model().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert ours.get_base_model().is_gradient_checkpointing
    for model in (plain, ours):
        model.train()(**batch(0)).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)


# -- ranks -----------------------------------------------------------------------------------------


def test_rank_zero_is_the_base_layer():
    layer = fused(layer_of(rank=0))
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_pruned_model_computes_what_pefts_layers_do():
    model = trained(fuse(adapted("bert", total_step=20, tinit=2, tfinal=4)), 20)
    values = torch.cat([layer.lora_E["default"].flatten() for layer in adapter_layers(model).values()])
    assert (values == 0).sum() == values.numel() // 2
    found = logits(model)
    for layer in adapter_layers(model).values():
        layer.__class__ = SVDLinear
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-6)


def test_wrong_input_is_refused():
    layer = fused(layer_of())
    with one_line(ValueError, IN + 1, IN):
        layer(torch.randn(2, IN + 1))
