"""How encoders name matrices and heads: as it is written down, and as it is seen in those that are not."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    TrainerState,
)

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.methods.bottleneck import places_of
from adalora_fast.experiments.models.encoders import load_model
from adalora_fast.experiments.models.families import (
    FAMILIES,
    _as_built,
    adapted_modules,
    check_model_type,
    family_of,
    is_of_head,
    locate_matrix,
    position_limit,
)
from adalora_fast.experiments.models.loading import load_encoder
from adalora_fast.experiments.run.trainer import EverythingLearns
from tests.helpers.tiny import LAYERS, RECIPE, encoder_config, save_encoder
from tests.helpers.training_runs import settings, train

SIX = ["query", "key", "value", "attention output", "intermediate", "output"]
FUSED = ["query key value", "attention output", "intermediate", "output"]
ENCODERS = [name for name in FAMILIES if name != "mbart"]
HEADED = {
    "classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
OTHERS = {  # not in FAMILIES: layers, adapted matrices of each, modules of the head
    "camembert": (LAYERS, SIX, {"classifier"}),
    "ernie": (LAYERS, SIX, {"pooler", "classifier"}),
    "mpnet": (
        LAYERS,
        [*(f"attention.attn.{name}" for name in "qkvo"), *SIX[4:]],
        {"classifier"},
    ),
    "albert": (  # one layer, applied again and again
        1,
        [
            *(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value", "dense")),
            *("albert_layers.0.ffn", "albert_layers.0.ffn_output"),
        ],
        {"pooler", "classifier"},
    ),
    "eurobert": (LAYERS, [*SIX, "gate"], {"dense", "classifier"}),
    "xlm": (LAYERS, ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"], {"sequence_summary"}),
}


def built(family, kind="classification"):
    with torch.device("meta"):
        return HEADED[kind].from_config(encoder_config(family))


@pytest.mark.parametrize("name", ENCODERS)
def test_the_matrices_of_every_family(name):
    family = FAMILIES[name]
    assert list(family.matrices) == (FUSED if name == "modernbert" else SIX)
    assert len(set(family.matrices.values())) == len(family.matrices)
    assert "classifier" in family.head and "translation" not in family.kinds


def test_the_matrices_of_mbart():
    crossed = ["cross query", "cross key", "cross value", "cross output"]
    family = FAMILIES["mbart"]
    assert list(family.matrices) == [*SIX[:4], *crossed, *SIX[4:]] and family.kinds == ("translation",)
    assert list(family.adapted) == [*SIX[:4], *crossed] and family.head_for("translation") == []


@pytest.mark.parametrize("kind", ["classification", "regression", "question_answering"])
def test_heads(kind):
    head = ["qa_outputs"] if kind == "question_answering" else ["pooler", "classifier"]
    assert FAMILIES["deberta-v2"].head_for(kind) == head
    assert FAMILIES["modernbert"].head_for(kind) == ["head", "classifier"]


@pytest.mark.parametrize("kind", HEADED)
@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_seen_in_a_model_is_what_is_written_of_its_family(name, kind):
    written, seen = FAMILIES[name], _as_built(built(name, kind))
    assert seen.matrices == written.matrices
    assert sorted(seen.head_for(kind)) == sorted(written.head_for(kind))
    assert sorted(seen.dropout) == sorted(written.dropout)


@pytest.mark.parametrize("name", OTHERS)
def test_another_encoder_is_trained_from_its_folder(name, data_dir, tmp_path):
    layers, matrices, head = OTHERS[name]
    folder = save_encoder(tmp_path / name, model_type=name)
    chosen = settings(folder, data_dir)
    train(chosen, tmp_path / "run")
    ranks = json.loads((tmp_path / "run" / "ranks.json").read_text())["ranks"]
    places = [locate_matrix(module) for module in ranks]
    assert sorted(places) == sorted((layer, matrix) for layer in range(layers) for matrix in matrices)
    assert sum(ranks.values()) == RECIPE.target_r * len(places)

    model, _ = load_encoder(chosen, TASKS["sst2"])
    assert set(family_of(model).head_for("classification")) == head
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    outside = {module.removeprefix("base_model.model.") for module in saved if "lora_" not in module}
    assert outside == {module for module, _ in model.named_parameters() if is_of_head(module, head)}


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "eurobert"])
def test_another_encoder_answers_questions(name, tmp_path):
    folder = save_encoder(tmp_path / name, model_type=name)
    model, tokenizer = load_model(str(folder), kind="question_answering", dropout=0.0)
    assert family_of(model).head_for("question_answering") == ["qa_outputs"]
    model = adapt(model, settings(folder, tmp_path, task="squad"), TASKS["squad"]).train()
    inputs = tokenizer(["moon bread"], ["old soup"], return_tensors="pt")
    losses = [
        model(**inputs, start_positions=torch.tensor([1]), end_positions=torch.tensor([2])).loss
        for _ in range(2)
    ]
    assert losses[0] == losses[1]  # no dropout is left
    losses[0].backward()
    trained = {module: p for module, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all("lora_" in module or "qa_outputs" in module for module in trained)


def test_an_encoder_without_linear_layers(data_dir):
    model = built("squeezebert")  # convolutions
    assert family_of(model).head_for("classification") == ["pooler", "classifier"]
    with pytest.raises(ValueError, match="a squeezebert encoder has no linear matrices in its layers; use"):
        adapted_modules(model, None)


def test_a_place_for_bottlenecks_that_is_not_known():
    with pytest.raises(ValueError, match="where a bottleneck belongs in a mpnet encoder is not known; use"):
        places_of(built("mpnet"))
    assert len(places_of(built("ernie"))) == 2 * LAYERS


@pytest.mark.parametrize(
    ("name", "kind"),
    [("perceiver", "classification"), ("big_bird", "question_answering")],  # head inside, head of two parts
)
def test_a_head_that_peft_cannot_save_beside_the_encoder(name, kind):
    with pytest.raises(ValueError, match=f"type '{name}' does not keep encoder and head apart as PEFT needs"):
        family_of(built(name, kind))


def test_as_many_tokens_as_another_encoder_has_positions():
    limits = {name: position_limit(built(name)) for name in OTHERS}
    own = {"camembert": 39, "mpnet": 38, "eurobert": None}  # behind the padding's, and rotary
    assert limits == {name: own.get(name, 40) for name in OTHERS}


def test_virtual_tokens_for_another_encoder():
    with pytest.raises(ValueError, match="the method prompt is not known to work with a ernie encoder; use"):
        adapt(built("ernie"), settings("ernie", "", method="prompt"), TASKS["sst2"])


def test_a_tensor_without_a_gradient_stops_the_run():
    """As the unused pooler of BigBird would be trained, or Reformer's layers, without a word."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0](torch.ones(1, 2)).sum().backward()
    first, later = TrainerState(), TrainerState(global_step=1)
    with pytest.raises(
        ValueError, match=r"2 of 4 trained tensors of this encoder get no gradient, one .*1\.w"
    ):
        EverythingLearns().on_pre_optimizer_step(None, first, None, model=model)
    EverythingLearns().on_pre_optimizer_step(None, later, None, model=model)
    model[1].requires_grad_(False)
    EverythingLearns().on_pre_optimizer_step(None, first, None, model=model)


@pytest.mark.parametrize(
    "options", [{"model_type": "modernvbert"}, {"model_type": "ernie", "is_decoder": True}]
)
def test_more_or_other_than_a_text_encoder(options):
    with pytest.raises(
        ValueError, match=r"is not for regression here; choose one of .*, or another text encod"
    ):
        check_model_type("mine", AutoConfig.for_model(**options), "regression")


def test_a_switch_is_no_dropout():
    """ESM's `token_dropout` says how embeddings are scaled."""
    config = encoder_config("ernie")
    config.token_dropout = True
    with torch.device("meta"):
        family = family_of(AutoModelForSequenceClassification.from_config(config))
    assert family.dropout == ("hidden_dropout_prob", "attention_probs_dropout_prob")


def test_no_encoder_at_all():
    error = (
        "model 'mine' of type 'gpt2' is not for classification here; choose one of type bert, .*, or anoth"
    )
    with pytest.raises(ValueError, match=error):
        check_model_type("mine", AutoConfig.for_model("gpt2"), "classification")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", (3, "query")),
        ("base_model.model.bert.encoder.layer.11.attention.output.dense", (11, "attention output")),
        ("bert.encoder.layer.0.output.dense", (0, "output")),
        ("deberta.encoder.layer.7.attention.self.value_proj", (7, "value")),
        ("distilbert.transformer.layer.5.ffn.lin1", (5, "intermediate")),
        ("model.layers.21.attn.Wqkv", (21, "query key value")),
        ("model.layers.0.attn.Wo", (0, "attention output")),
        ("model.layers.0.mlp.Wo", (0, "output")),
        ("model.layers.0.mlp.Wi", (0, "intermediate")),
        ("model.layers.0.Wo", (0, "Wo")),
        ("model.encoder.layers.3.self_attn.q_proj", (3, "query")),
        ("base_model.model.model.decoder.layers.3.self_attn.q_proj", (3, "decoder query")),
        ("model.decoder.layers.11.encoder_attn.out_proj", (11, "cross output")),
        ("model.encoder.layers.0.fc1", (0, "intermediate")),
        ("model.decoder.layers.0.fc2", (0, "decoder output")),
        ("model.decoder.layers.0.encoder_attn", (0, "decoder encoder_attn")),
        ("roberta.encoder.layer.1.output.dense.lora_A", (1, "output.dense.lora_A")),
        ("roberta.encoder.layer.1.attention.self", (1, "attention.self")),
        ("bert.encoder.layer.1.crossattention.self.query", (1, "crossattention.self.query")),
        ("bert.pooler.dense", None),
        ("classifier", None),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn", (0, "albert_layers.0.ffn")),
        ("base_model.model.transformer.attentions.11.q_lin", (11, "q_lin")),
    ],
)
def test_locating_a_matrix(name, place):
    assert locate_matrix(name) == place
