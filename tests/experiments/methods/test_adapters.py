"""What is adapted and what is trained, on real (tiny) transformers models."""

import warnings

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.methods.allocation import (
    PeftAllocation,
    check_budget,
    ranks_of,
    training_callbacks,
)
from adalora_fast.experiments.models.families import FAMILIES, locate_matrix
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings
from tests.helpers.tiny import LAYERS, RECIPE, encoder_config

TYPES = ["bert", "roberta", "deberta-v2", "modernbert"]  # every family: test_encoders.py
ADAPTED = ["adalora", "peft", "lora"]


def settings(method="adalora", model="tiny", recipe=RECIPE, **options):
    return RunSettings(task="sst2", model=str(model), method=method, recipe=recipe, **options)


def classifier(family):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(encoder_config(family))


def adapted(family, method, **options):
    return adapt(classifier(family), settings(method, **options), TASKS["sst2"])


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_head(name, family, kind="classification"):
    return bool(set(FAMILIES[family].head_for(kind)).intersection(name.split(".")))


@pytest.mark.parametrize("method", ["adalora", "lora"])
@pytest.mark.parametrize("family", TYPES)
def test_every_matrix_of_every_layer_once(family, method):
    model = adapted(family, method)
    ranks = ranks_of(model, settings(method))
    places = [locate_matrix(name) for name in ranks]
    assert len(places) == len(set(places)) == LAYERS * len(FAMILIES[family].matrices)
    assert set(ranks.values()) == {RECIPE.init_r if method == "adalora" else RECIPE.target_r}
    assert not any(in_head(name, family) for name in ranks)


@pytest.mark.parametrize("method", ADAPTED)
@pytest.mark.parametrize("family", TYPES)
def test_adapters_and_the_whole_head_are_trained_and_nothing_else(family, method):
    model = adapted(family, method)
    outside = {name for name in trained(model) if "lora_" not in name}
    assert outside and all(in_head(name, family) for name in outside)
    expected = sum(p.numel() for name, p in classifier(family).named_parameters() if in_head(name, family))
    assert sum(p.numel() for name, p in model.named_parameters() if name in outside) == expected


@pytest.mark.parametrize("method", ADAPTED)
def test_the_numbers_that_peft_keeps_as_parameters_are_not_trained_on_a_narrow_base(method):
    model = adapt(classifier("bert").bfloat16(), settings(method), TASKS["sst2"])
    assert not [name for name in trained(model) if "ranknum" in name]


@pytest.mark.parametrize("method", ADAPTED)
def test_question_answering_has_its_own_head(method):
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(encoder_config("bert"))
    model = adapt(model, settings(method), TASKS["squad"])
    assert model.peft_config["default"].task_type.value == "QUESTION_ANS"
    assert {name.split(".")[-1] for name in trained(model) if "qa_outputs" in name} == {"weight", "bias"}
    assert all(in_head(name, "bert", "question_answering") for name in trained(model) if "lora_" not in name)


@pytest.mark.parametrize("family", TYPES)
def test_head_only_and_full(family):
    model = adapted(family, "head")
    assert trained(model) == {name for name, _ in model.named_parameters() if in_head(name, family)}
    everything = adapted(family, "full")
    assert trained(everything) == {name for name, _ in everything.named_parameters()}
    assert ranks_of(model, settings("head")) == ranks_of(everything, settings("full")) == {}


def test_settings_reach_the_adapter():
    recipe = Recipe(init_r=6, target_r=3, scale=2.5, deltaT=7, beta1=0.7, beta2=0.6, orth_reg_weight=0.4)
    options = {"score": "fisher", "smoothing": "sum", "score_gradient": "task"}
    model = adapted("bert", "adalora", recipe=recipe, **options)
    config, allocator = model.peft_config["default"], model.base_model.rankallocator
    assert (config.init_r, config.target_r, config.lora_alpha) == (6, 3, 15.0)
    assert (config.deltaT, config.beta1, config.beta2, config.orth_reg_weight) == (7, 0.7, 0.6, 0.4)
    assert allocator.score.name == "fisher" and allocator.smoothing == "sum"
    plain = adapted("bert", "lora", recipe=recipe).peft_config["default"]
    assert (plain.r, plain.lora_alpha / plain.r) == (3, 2.5)  # the same scale at either rank


def test_the_control_is_pefts_own():
    model = adapted("bert", "peft")
    assert type(model.base_model).__module__ == "peft.tuners.adalora.model"
    (callback,) = training_callbacks(settings("peft"))
    assert isinstance(callback, PeftAllocation)
    assert training_callbacks(settings("lora")) == training_callbacks(settings("head")) == []
    with pytest.raises(RuntimeError, match="never made its final mask"):
        ranks_of(model, settings("peft"))


@pytest.mark.parametrize(("ranks", "right"), [({"a": 3, "b": 1}, True), ({"a": 3, "b": 2}, False)])
def test_the_budget_is_exact(ranks, right):
    if right:
        assert check_budget(ranks, settings()) == 4
        return
    with pytest.raises(RuntimeError, match="sensitivity: the total rank is 5, the budget is 4"):
        check_budget(ranks, settings())


def test_pefts_allocator_may_prune_too_much_but_not_too_little():
    assert check_budget({"a": 1, "b": 2}, settings("peft")) == 3
    with pytest.raises(RuntimeError, match="peft-adalora: the total rank is 5"):
        check_budget({"a": 3, "b": 2}, settings("peft"))


def test_adapting_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for method in ADAPTED:
            adapted("bert", method)
