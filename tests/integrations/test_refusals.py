"""What ``fuse`` refuses: the error is one line with the value and the remedy; the model stays as it was."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

from adalora_fast import fuse
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.models import adapted, batch, bert
from tests.helpers.peft_models import adamw, logits, one_line, same_weights, steps, trained

ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["query"]}


def is_untouched(model: PeftModel, before: PeftModel) -> bool:
    """Whether ``model`` is still PEFT's own, as its copy ``before``, attribute by attribute."""
    tuner = model.base_model
    return (
        type(model) is type(before)
        and type(tuner) is AdaLoraModel
        and all(type(layer) is SVDLinear for layer in adapter_layers(model).values())
        and type(tuner.rankallocator) is PeftAllocator
        and tuner.__dict__.keys() == before.base_model.__dict__.keys()
        and all(
            layer.__dict__.keys() == twin.__dict__.keys()
            for layer, twin in zip(
                adapter_layers(model).values(), adapter_layers(before).values(), strict=True
            )
        )
        and same_weights(model, before)
    )


BAD_OPTIONS = {
    "score": ("sensitivty", ValueError),
    "smoothing": ("emaa", ValueError),
    "orth_penalty": ("frobenius", ValueError),
    "precision": ("high", ValueError),
    "score_gradient": ("both", ValueError),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_unknown_options(option):
    value, kind = BAD_OPTIONS[option]
    model = adapted("bert")
    before = copy.deepcopy(model)
    with one_line(kind, value, "is not one of"):
        fuse(model, **{option: value})
    assert is_untouched(model, before)
    fuse(model)  # and the model can still be fused and trained
    steps(model, adamw(model), 0, 2)


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_unknown_options_for_an_inference_only_adapter(option):
    value, kind = BAD_OPTIONS[option]
    model = adapted("bert", inference_mode=True)
    with one_line(kind, value):
        fuse(model, **{option: value})
    assert type(model.base_model) is AdaLoraModel


BAD_CONFIGS = {
    "target above initial rank": ({"init_r": 2, "target_r": 3}, (39, 26, "target_r < init_r")),
    "target equal to initial rank": ({"init_r": 2, "target_r": 2}, (26, "target_r < init_r")),
    "target zero": ({"target_r": 0}, (0, "target_r")),
    "negative target": ({"target_r": -1}, (-13, "target_r")),
    "deltaT zero": ({"deltaT": 0}, ("deltaT", 0)),
    "negative warm-up": ({"tinit": -5}, ("tinit", -5)),
    "beta1 one": ({"beta1": 1.0 - 1e-17}, ("beta1", 1.0)),
    "rank pattern as for LoRA": ({"rank_pattern": {"query": 7}}, ("rank_pattern", "query", 7, "init_r")),
    "rank pattern of lists of numbers": ({"rank_pattern": {"query": [7, 8]}}, ("rank_pattern", "query")),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_whose_numbers_do_not_fit(case):
    overrides, pieces = BAD_CONFIGS[case]
    beta1 = overrides.get("beta1")
    model = adapted("bert", **{name: value for name, value in overrides.items() if name != "beta1"})
    if beta1 is not None:  # PEFT's own constructor asserts
        model.peft_config["default"].beta1 = beta1
    before = copy.deepcopy(model)
    with one_line(ValueError, *pieces):
        fuse(model)
    assert is_untouched(model, before)


def test_a_refused_model_trains_with_peft_as_if_nothing_had_happened():
    tried, untried = adapted("bert"), adapted("bert")
    with one_line(ValueError, "fischer"):
        fuse(tried, score="fischer")
    trained(tried, 20)
    trained(untried, 20)
    assert same_weights(tried, untried)


def test_fused_twice():
    model = trained(fuse(adapted("bert", total_step=20, tinit=2), score="fisher"), 6)
    allocator, expected = model.base_model.rankallocator, logits(model)
    with one_line(ValueError, "fused already"):
        fuse(model, score="gsnr")
    assert model.base_model.rankallocator is allocator
    assert allocator.t == 6 and allocator.score.name == "fisher"
    assert torch.equal(logits(model), expected)


def test_a_plain_model():
    with one_line(TypeError, "BertForSequenceClassification", "get_peft_model"):
        fuse(bert())


def test_something_else_entirely():
    with one_line(TypeError, "str", "get_peft_model"):
        fuse("bert-base-uncased")


def test_the_tuner_instead_of_the_model():
    model = adapted("bert")
    with one_line(TypeError, "AdaLoraModel", "get_peft_model"):
        fuse(model.base_model)
    assert type(model.base_model) is AdaLoraModel


def test_a_part_of_a_model_with_injected_adapters():
    model = inject_adapter_in_model(AdaLoraConfig(**ADALORA), bert())
    with one_line(TypeError, "inject_adapter_in_model", "get_peft_model"):
        fuse(model.bert)
    assert all(type(layer) is SVDLinear for layer in adapter_layers(model).values())
    assert model(**batch(0)).loss.isfinite()


def test_a_lora_model():
    model = get_peft_model(bert(), LoraConfig(r=4, target_modules=["query"]))
    expected = logits(model)
    with one_line(TypeError, "LoraModel", "AdaLoraConfig"):
        fuse(model)
    assert torch.equal(logits(model), expected)


def test_mixed_models():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), mixed=True)
    with one_line(TypeError, "PeftMixedModel", "get_peft_model"):
        fuse(model)


def test_parameters_on_several_devices():
    model = adapted("bert")
    layer = next(iter(adapter_layers(model).values()))
    layer.lora_A["default"] = nn.Parameter(layer.lora_A["default"].to("meta"))
    allocator = model.base_model.rankallocator
    with one_line(ValueError, "several devices", "cpu", "meta"):
        fuse(model)
    assert type(model.base_model) is AdaLoraModel and model.base_model.rankallocator is allocator
