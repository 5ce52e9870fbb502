"""What is adapted and what is trained, on real (tiny) transformers models of every family."""

import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from adalora_fast.experiments.adapters import adapt, check_budget, load_encoder, ranks_of
from adalora_fast.experiments.models import FAMILIES, locate_matrix
from adalora_fast.experiments.recipes import Recipe
from adalora_fast.experiments.runs import RunSettings
from adalora_fast.experiments.tasks import TASKS
from tests.experiments.tiny import LAYERS, RECIPE, encoder_config, save_encoder

SIX = ["query", "key", "value", "attention output", "intermediate", "output"]
HEADS = {  # parameters outside of the adapters that are trained: what is new, or was not trained for this
    "bert": {"bert.pooler", "classifier"},
    "electra": {"classifier"},
    "roberta": {"classifier"},
    "xlm-roberta": {"classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
}


def settings(method="adalora", model="tiny", recipe=RECIPE, **options):
    return RunSettings(task="sst2", model=str(model), method=method, recipe=recipe, **options)


def classifier(family):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(encoder_config(family))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_head(name, family):
    return any(f"{head}." in name for head in HEADS[family])


@pytest.mark.parametrize("method", ["adalora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_six_matrices_per_layer(family, method):
    model = adapt(classifier(family), settings(method))
    ranks = ranks_of(model, settings(method))
    assert [locate_matrix(name) for name in ranks] == [(i, name) for i in range(LAYERS) for name in SIX]
    assert set(ranks.values()) == {RECIPE.init_r if method == "adalora" else RECIPE.target_r}
    assert not any("pooler" in name or "classifier" in name for name in ranks)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and "." in name]
    assert len(adapted) == 6 * LAYERS


@pytest.mark.parametrize("method", ["adalora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_the_whole_head_are_trained_and_nothing_else(family, method):
    model = adapt(classifier(family), settings(method))
    outside = {name for name in trained(model) if "lora_" not in name}
    assert outside and all(in_head(name, family) for name in outside)
    expected = sum(p.numel() for name, p in classifier(family).named_parameters() if in_head(name, family))
    assert sum(p.numel() for name, p in model.named_parameters() if name in outside) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_head_only_and_full(family):
    model = adapt(classifier(family), settings("head"))
    assert trained(model) == {name for name, _ in model.named_parameters() if in_head(name, family)}
    everything = adapt(classifier(family), settings("full"))
    assert trained(everything) == {name for name, _ in everything.named_parameters()}
    assert ranks_of(model, settings("head")) == ranks_of(everything, settings("full")) == {}


def test_settings_reach_the_adapter():
    recipe = Recipe(init_r=6, target_r=3, scale=2.5, deltaT=7, beta1=0.7, beta2=0.6, orth_reg_weight=0.4)
    options = {"score": "fisher", "smoothing": "sum", "score_gradient": "task"}
    model = adapt(classifier("bert"), settings(recipe=recipe, **options))
    config, allocator = model.peft_config["default"], model.base_model.rankallocator
    assert (config.init_r, config.target_r, config.lora_alpha) == (6, 3, 15.0)
    assert (config.deltaT, config.beta1, config.beta2, config.orth_reg_weight) == (7, 0.7, 0.6, 0.4)
    assert allocator.score.name == "fisher" and allocator.smoothing == "sum"
    plain = adapt(classifier("bert"), settings("lora", recipe=recipe)).peft_config["default"]
    assert (plain.r, plain.lora_alpha / plain.r) == (3, 2.5)  # the same scale at either rank


@pytest.mark.parametrize("task", ["sst2", "mnli", "stsb"])
def test_the_new_head_knows_its_labels(encoder, task):
    model, tokenizer = load_encoder(settings(model=encoder), TASKS[task])
    labels = TASKS[task].labels
    assert model.config.num_labels == (len(labels) or 1)
    if labels:
        assert [model.config.id2label[code] for code in range(len(labels))] == list(labels)
        assert model.config.problem_type == "single_label_classification"
    else:
        assert model.config.problem_type == "regression"
    assert tokenizer("moon bread")["input_ids"][1:-1] == [15, 19]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_before_the_classifier(tmp_path, family):
    folder = save_encoder(tmp_path / family, model_type=family)
    model, _ = load_encoder(settings(model=folder, recipe=Recipe(classifier_dropout=0.45)), TASKS["sst2"])
    chosen = [name for name, module in model.named_modules() if getattr(module, "p", getattr(
        module, "drop_prob", None)) == 0.45]  # fmt: skip
    assert len(chosen) == 1 and "layer" not in chosen[0]


def test_pretrained_weights_are_loaded(encoder):
    from safetensors.torch import load_file

    model, _ = load_encoder(settings(model=encoder), TASKS["sst2"])
    saved = load_file(encoder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.bert.get_parameter(name), saved[name])


def test_an_unknown_family_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'gpt2' is not known"):
        load_encoder(settings(model=tmp_path), TASKS["sst2"])


def test_a_model_out_of_reach(monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="model 'nobody/nothing' is not reachable; give --model minilm"
    ):
        load_encoder(settings(model="nobody/nothing"), TASKS["sst2"])


@pytest.mark.parametrize(("ranks", "right"), [({"a": 3, "b": 1}, True), ({"a": 3, "b": 2}, False)])
def test_the_budget_is_exact(ranks, right):
    if right:
        assert check_budget(ranks, settings()) == 4
        return
    with pytest.raises(RuntimeError, match="sensitivity: the total rank is 5, the budget is 4"):
        check_budget(ranks, settings())


def test_adapting_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for method in ("adalora", "lora"):
            adapt(classifier("bert"), settings(method))
