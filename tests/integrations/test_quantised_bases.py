"""Fused layers over quantised bases against PEFT's own: values, gradients, whole runs, refusals."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from adalora_fast import fuse
from adalora_fast.integrations.export import to_lora
from adalora_fast.integrations.layers import FusedLayer, adapter_layers
from tests.helpers.models import LLAMA_LINEARS, adapt, awake, llama, trained_weights
from tests.helpers.peft_models import adamw, logits, no_warning, one_line, same_weights, steps, trained
from tests.helpers.quantised import (
    KINDS,
    adapted_quantised,
    awake_quantised,
    needs_bitsandbytes,
    quantised,
    small,
    smooth_logits,
)
from tests.helpers.trainers import trainer

pytestmark = needs_bitsandbytes
CLASSES = {"int8": "SVDLinear8bitLt", "nf4": "SVDLinear4bit", "fp4": "SVDLinear4bit"}
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYER = "model.layers.0.mlp.down_proj"
FACTORS = ("lora_A", "lora_E", "lora_B")
SHORT = {"total_step": 20, "tinit": 2, "tfinal": 4}


def evaluate(model: PeftModel, dtype: torch.dtype, autocast: torch.dtype | None = None) -> dict:
    """Output and gradients of one adapted layer."""
    layer = model.base_model.model.get_submodule(LAYER)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, layer.in_features, generator=generator).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
        with torch.no_grad():
            assert not isinstance(layer, FusedLayer) or y.dtype == layer.base_layer(x).dtype
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: getattr(layer, name)["default"].grad for name in FACTORS}


def assert_as_peft(found: dict, expected: dict, epsilon: float) -> None:
    """No further apart than a few roundings of the coarser type, relative to the largest entry."""
    for name, tensor in expected.items():
        allowed = 8 * epsilon * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=allowed, check_dtype=False, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_fused_in_place(kind):
    model = adapted_quantised(kind)
    layers, state = adapter_layers(model), list(model.state_dict())
    assert {type(layer).__name__ for layer in layers.values()} == {CLASSES[kind]}
    fuse(model)
    assert model.base_model.unfused == {}
    assert {type(layer).__name__ for layer in layers.values()} == {f"Fused{CLASSES[kind]}"}
    assert all(new is old for new, old in zip(adapter_layers(model).values(), layers.values(), strict=True))
    assert list(model.state_dict()) == state


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype, precision):
    expected = evaluate(awake_quantised(kind, dtype), dtype)
    found = evaluate(fuse(awake_quantised(kind, dtype), precision=precision), dtype)
    assert_as_peft(found, expected, EPSILON[dtype])
    assert found["y"].dtype == found["x"].dtype == dtype
    if (kind, dtype) == ("int8", torch.bfloat16):  # PEFT's own 8-bit layer changes the type of its result
        assert expected["y"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype):
    expected = evaluate(awake_quantised(kind, dtype), dtype, torch.bfloat16)
    found = evaluate(fuse(awake_quantised(kind, dtype)), dtype, torch.bfloat16)
    assert_as_peft(found, expected, EPSILON[torch.bfloat16])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_repeatable(kind, context):
    peft, ours = (
        model.eval().base_model.model.get_submodule(LAYER)
        for model in (awake_quantised(kind), fuse(awake_quantised(kind)))
    )
    x = torch.randn(3, 5, ours.in_features)
    with context():
        expected = peft(x)
        for _ in range(2):
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_prunes_as_peft(kind):
    peft, ours = (
        adapt(prepare_model_for_kbit_training(quantised(llama(width=64), kind)), LLAMA_LINEARS, **SHORT)
        for _ in range(2)
    )
    fuse(ours)
    optimizers = adamw(peft), adamw(ours)
    for step in range(20):
        expected, found = (
            steps(model, optimizer, step, step + 1) for model, optimizer in zip((peft, ours), optimizers)
        )
        assert found == pytest.approx(expected, rel=1e-4)
        pattern = peft.peft_config["default"].rank_pattern
        assert pattern is None or ours.base_model.peft_rank_pattern() == pattern, step
    ranks = ours.base_model.rankallocator.ranks().values()
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    expected = trained_weights(peft)
    for name, found in trained_weights(ours).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3, msg=name)


def test_an_8_bit_model_in_half_precision_runs_without_autocast():
    # q_proj alone is adapted: attention wants one type for queries, keys and values
    base = quantised(llama(width=64).to(torch.bfloat16), "int8")
    model = awake(adapt(base, ["q_proj"]))
    with pytest.raises(RuntimeError, match="dtype"):
        logits(model)  # PEFT's own
    assert logits(fuse(model)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_before_anything_changes(kind):
    base = llama(width=64)
    base.model.layers[0].self_attn.q_proj, plain = nn.Identity(), base.model.layers[0].self_attn.q_proj
    quantised(base, kind)
    base.model.layers[0].self_attn.q_proj = plain  # comes first and could be merged
    model = fuse(awake(adapt(base, LLAMA_LINEARS)))
    before, weight = logits(model), plain.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with one_line(NotImplementedError, "k_proj cannot be merged", "quantised", "unquantised base"):
            merge()
    assert torch.equal(plain.weight, weight) and torch.equal(logits(model), before)
    layer = model.base_model.model.get_submodule(LAYER)
    with one_line(NotImplementedError, "quantised"):
        layer.merge()


@pytest.mark.parametrize("kind", KINDS)
def test_the_remedy_works(kind):
    model = fuse(awake_quantised(kind))
    expected = smooth_logits(model)
    torch.testing.assert_close(smooth_logits(to_lora(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_unloaded(kind):
    model = fuse(awake_quantised(kind))
    expected = logits(quantised(llama(width=64), kind))
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert not adapter_layers(plain) and torch.equal(logits(plain), expected)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_is_saved_and_resumed(tmp_path, kind):
    whole = trained(fuse(adapted_quantised(kind, **SHORT)), 9)
    whole.save_pretrained(tmp_path)
    resumed = fuse(adapted_quantised(kind, **SHORT))
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert resumed.base_model.rankallocator.t == 9
    for model in (whole, resumed):
        steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), 9, 20)
    assert same_weights(whole, resumed)
    whole.save_pretrained(tmp_path / "end")
    loaded = PeftModel.from_pretrained(quantised(llama(width=64), kind), tmp_path / "end")
    torch.testing.assert_close(smooth_logits(loaded), smooth_logits(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_is_fused_too(kind):
    def complete(model: PeftModel) -> torch.Tensor:
        torch.manual_seed(4)
        config = AdaLoraConfig(
            inference_mode=True, init_r=6, target_r=2, total_step=9, target_modules=["q_proj"]
        )
        model.add_adapter("other", config)
        small(awake(awake(model), "other", seed=8))
        model.base_model.set_adapter(["default", "other"])
        return smooth_logits(model)

    peft, ours = adapted_quantised(kind, task_type=None), fuse(adapted_quantised(kind, task_type=None))
    torch.testing.assert_close(complete(ours), complete(peft), rtol=1e-4, atol=1e-4)
    assert all(isinstance(layer, FusedLayer) for layer in adapter_layers(ours).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_fused(kind):
    model = fuse(awake_quantised(kind))
    twin = copy.deepcopy(model)
    assert {type(layer) for layer in adapter_layers(twin).values()} == {
        type(layer) for layer in adapter_layers(model).values()
    }
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    torch.compiler.reset()
    model = fuse(awake_quantised(kind))
    layer = model.base_model.model.get_submodule(LAYER)
    x = torch.randn(3, 5, layer.in_features)
    expected = layer(x)
    with no_warning():
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)


def test_targets_may_mix_quantised_and_plain_layers():
    base = quantised(llama(width=64), "nf4")
    model = get_peft_model(
        base, AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "score"])
    )
    fuse(model)
    kinds = {type(layer).__name__ for layer in adapter_layers(model).values()}
    assert kinds == {"FusedSVDLinear4bit", "FusedSVDLinear"}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_trainer_run_in_mixed_precision(kind, tmp_path):
    model = adapted_quantised(kind, lora_dropout=0.1)
    run = trainer(model, tmp_path, max_steps=8, bf16=True, gradient_checkpointing=True)
    assert torch.tensor(run.train().training_loss).isfinite()
    assert model.base_model.unfused == {}
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * len(adapter_layers(model))
