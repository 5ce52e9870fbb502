"""Options of AdaLoraConfig and methods of PeftModel, with PEFT's AdaLoRA and with the fused model."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_fast import fuse
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.models import TARGETS, VOCABULARY, adapt, awake, batch, bert, trainable
from tests.helpers.peft_models import logits, one_line
from tests.integrations.comparing import SHORT, assert_same_run, awake_and_fused, short_run

INFERENCE = {"inference_mode": True, "init_r": 6, "target_r": 2, "total_step": 10, "task_type": "SEQ_CLS"}


def build(**overrides) -> PeftModel:
    targets = overrides.pop("target_modules", TARGETS["bert"])
    return adapt(bert(), targets, **{**SHORT, **overrides})


def trained_names(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


OPTIONS = {
    "bias all": ({"bias": "all"}, 13, "LayerNorm.bias"),
    "bias lora_only": ({"bias": "lora_only"}, 13, "query.base_layer.bias"),
    "modules_to_save": (
        {"modules_to_save": ["pooler"], "target_modules": ["query", "value"]},
        4,
        "pooler.modules_to_save.default.dense.weight",
    ),
    "layers_to_transform": ({"layers_to_transform": [1], "target_modules": ["query", "value"]}, 2, None),
    "layers_pattern": (
        {"layers_to_transform": 0, "layers_pattern": "layer", "target_modules": ["key", "value"]},
        2,
        None,
    ),
    "exclude_modules": ({"exclude_modules": ["value", "pooler.dense"]}, 10, None),
    "exclude_modules, a pattern": ({"exclude_modules": r".*layer\.0.*"}, 7, None),
    "all-linear": ({"target_modules": "all-linear"}, 13, None),
    "target_modules, a pattern": ({"target_modules": r".*layer\.1.*(query|value)"}, 2, None),
    "init_lora_weights False": ({"init_lora_weights": False}, 13, None),
    "init_lora_weights gaussian": ({"init_lora_weights": "gaussian"}, 13, None),
    "trainable_token_indices": ({"trainable_token_indices": [1, 5]}, 13, "trainable_tokens_delta"),
    "layer_replication": ({"layer_replication": [(0, 2), (1, 2)], "target_modules": ["query"]}, 3, None),
    "orth_reg_weight 0": ({"orth_reg_weight": 0.0}, 13, None),
    "lora_alpha 0": ({"lora_alpha": 0}, 13, None),
    "deltaT 3": ({"deltaT": 3}, 13, None),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_with(case):
    options, layers, also_trained = OPTIONS[case]
    ours = assert_same_run(lambda: build(**options))
    assert len(adapter_layers(ours)) == layers and ours.base_model.unfused == {}
    assert also_trained is None or any(also_trained in name for name in trained_names(ours))


@pytest.mark.parametrize("case", ["bias all", "bias lora_only", "modules_to_save", "trainable_token_indices"])
def test_what_is_trained_beside_the_adapter_is_saved(case, tmp_path):
    options = OPTIONS[case][0]
    model = fuse(awake(build(**options)))
    short_run(model)
    model.save_pretrained(tmp_path)
    fresh = fuse(build(**options))
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_get_pefts_gradients(bias):
    found = []
    for model in awake_and_fused(lambda: build(bias=bias)):
        model.train()(**batch(0)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, ours = found
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


# -- several adapters --------------------------------------------------------------------------------------


def test_switching_between_adapters_in_the_middle_of_a_run():
    peft, ours = awake_and_fused(build)
    seen = []
    for model in (peft, ours):
        torch.manual_seed(4)
        model.add_adapter("other", AdaLoraConfig(**INFERENCE, target_modules=["query", "value"]))
        awake(model, "other", seed=8).double()
        outputs = [logits(model)]
        short_run(model, stop=7)
        model.set_adapter("other")
        outputs += [logits(model), torch.tensor([p.requires_grad for p in model.parameters()])]
        model.set_adapter("default")
        outputs += [logits(model), torch.tensor([p.requires_grad for p in model.parameters()])]
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.requires_grad_(False)
        seen.append((outputs, short_run(model, start=7)))
        model.delete_adapter("other")
        assert list(model.peft_config) == ["default"]
        seen[-1][0].append(logits(model))
    (expected, run), (found, our_run) = seen
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert our_run[1] == run[1] and our_run[0] == pytest.approx(run[0], abs=2e-6)


def test_a_second_trainable_adapter_is_refused_as_by_peft():
    for model in (build(), fuse(build())):
        with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
            model.add_adapter("other", AdaLoraConfig(**{**INFERENCE, "inference_mode": False}))
        assert list(model.peft_config) == ["default"]
        short_run(model)


def test_lora_beside_adalora_is_refused_as_by_peft():
    for model in (build(), fuse(build())):
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("lora", LoraConfig(target_modules=["query"], inference_mode=True))


def test_a_mixed_model_is_refused_with_the_reason():
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]), mixed=True)
    model.add_adapter("ada", AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["value"]))
    assert not hasattr(model.base_model, "rankallocator")  # PEFT's never prunes
    with one_line(TypeError, "PeftMixedModel", "never pruned", "mixed=True"):
        fuse(model)


def test_weighted_adapters_are_refused_as_by_peft():
    for model in (build(), fuse(build())):
        with pytest.raises(TypeError, match="does not support add_weighted_adapter"):
            model.add_weighted_adapter(["default"], [1.0], "sum")


# -- scale, status, lazy loading ---------------------------------------------------------------------------


def test_scales_may_change_at_any_time():
    peft, ours = awake_and_fused(build)
    with rescale_adapter_scale(peft, 0.5), rescale_adapter_scale(ours, 0.5):
        expected, found = logits(peft), logits(ours)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logits(ours), logits(peft))
    assert not torch.allclose(logits(ours), found, atol=1e-3)
    for model in (peft, ours):
        for layer in adapter_layers(model).values():
            layer.scale_layer(3.0)
    torch.testing.assert_close(logits(ours), logits(peft))


def test_status_is_as_pefts():
    peft, ours = awake_and_fused(build)
    found, expected = ours.get_model_status(), peft.get_model_status()
    assert found.base_model_type == expected.base_model_type
    assert found.trainable_params == expected.trainable_params and found.enabled and not found.merged_adapters
    left, right = ours.get_layer_status(), peft.get_layer_status()
    for one, other in zip(left, right, strict=True):
        one.module_type = other.module_type
        assert one == other


@pytest.mark.parametrize("lazy", [False, True])
def test_loading_without_memory_for_the_new_weights(lazy, tmp_path):
    model = fuse(awake(build()))
    short_run(model, stop=6 if lazy else 16)  # (PEFT cannot cut down a finished adapter without its memory)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    loaded = fuse(PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=lazy))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    second = fuse(build())
    second.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=lazy)
    second.set_adapter("second")
    torch.testing.assert_close(logits(second), expected, rtol=1e-5, atol=1e-6)


# -- generation ----------------------------------------------------------------------------------------------


def causal() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return adapt(LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **SHORT)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation(options):
    peft, ours = awake_and_fused(causal)
    inputs = {name: batch(0)[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    expected = peft.eval().generate(**inputs, **options)
    assert torch.equal(ours.eval().generate(**inputs, **options), expected)
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(**inputs, **options), expected)
    merged = ours.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, **options), expected)


def test_a_causal_model_trains_as_peft():
    peft, ours = awake_and_fused(causal)
    results = []
    for model in (peft, ours):
        optimizer = torch.optim.SGD(trainable(model), lr=0.02)
        losses = []
        for step in range(SHORT["total_step"]):
            tokens = batch(step)["input_ids"]
            loss = model.train()(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append(losses)
    assert results[1] == pytest.approx(results[0], abs=2e-6)
    assert ours.base_model.peft_rank_pattern() == peft.peft_config["default"].rank_pattern
