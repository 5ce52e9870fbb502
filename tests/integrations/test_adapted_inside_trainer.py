"""AdaLoraCallback where the Trainer's model is not a PeftModel: runs, checkpoints, the best model."""

import warnings

import pytest
import torch
from transformers import Trainer

from adalora_fast import AdaLoraCallback
from adalora_fast.integrations.locate import peft_models, tuners
from tests.helpers.injecting import Towers, Wrapped, added, injected, logits
from tests.helpers.models import bert, trainable
from tests.helpers.peft_models import no_warning, one_line, same_state, same_weights
from tests.helpers.trainers import STEPS, StopAt, trainer

LAYERS = 13
MODELS = {
    "add_adapter": lambda: added(lora_dropout=0.1),
    "add_adapter, with a head": lambda: added(modules_to_save=["classifier"]),
    "inject_adapter_in_model": lambda: injected(lora_dropout=0.1),
    "a PeftModel inside": Wrapped,
    "add_adapter inside": lambda: Wrapped(added()),
    "two PeftModels": Towers,
}


def allocators(model) -> list:
    return [tuner.rankallocator for tuner in tuners(model)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_and_a_resumed_run_end_alike(kind, tmp_path):
    whole = MODELS[kind]()
    run = trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=9)
    assert all(tuner.rankallocator.t == 0 for tuner in tuners(whole))  # fused when the Trainer is made
    run.train()
    for allocator in allocators(whole):
        assert allocator.t == STEPS and allocator.is_over
        assert sum(allocator.ranks().values()) == 2 * LAYERS
    budgets = [entry["adalora/budget"] for entry in run.state.log_history if "loss" in entry]
    assert budgets[-1] == 2 * LAYERS * len(allocators(whole))
    again = MODELS[kind]()
    resumed = trainer(again, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    assert same_weights(whole, again)
    for one, other in zip(allocators(whole), allocators(again), strict=True):
        assert same_state(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("kind", ["add_adapter", "inject_adapter_in_model", "two PeftModels"])
def test_the_best_model_comes_back_with_its_allocator(kind, tmp_path):
    model = MODELS[kind]()
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=8,
        save_steps=8,
        metric_for_best_model="accuracy_of_time",
        greater_is_better=True,
    )
    run.compute_metrics = _Falling()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-8")
    messages = [str(w.message) for w in caught if "final allocation" in str(w.message)]
    assert len(messages) == len(allocators(model)) and f"8 of {STEPS}" in messages[0]
    for allocator in allocators(model):
        assert allocator.is_over and sum(allocator.ranks().values()) == 2 * LAYERS
    # It is the model that stopped at step 8: same weights, same masks.
    stopped = MODELS[kind]()
    early = trainer(stopped, tmp_path / "early", StopAt(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early.train()
    assert same_weights(model, stopped)


class _Falling:
    """A metric that is best at the first evaluation."""

    def __init__(self):
        self.value = 1.0

    def __call__(self, prediction):
        self.value /= 2
        return {"accuracy_of_time": self.value}


def test_label_smoothing_is_that_of_the_original_class(tmp_path):
    # transformers chooses how to shift labels by the name of the model's class.
    model = added()
    trainer(model, tmp_path, label_smoothing_factor=0.1, max_steps=4).train()
    assert model._get_name() == "BertForSequenceClassification"


def test_a_saved_model_after_the_run(tmp_path):
    model = added()
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "out"))
    plain = bert()
    plain.load_adapter(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_checkpoint_elsewhere_is_refused_by_name(tmp_path):
    run = trainer(Wrapped(), tmp_path / "a", save_strategy="steps", save_steps=9, max_steps=12)
    run.train()
    other = trainer(Wrapped(), tmp_path / "b", max_steps=12)
    with one_line(ValueError, "step 9", "output_dir"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-9"))


def test_a_search_keeps_the_state_in_the_trials_folder(tmp_path):
    from adalora_fast.integrations.run_folders import checkpoint_folder

    run = trainer(added(), tmp_path)
    run.state.global_step = 6
    assert checkpoint_folder(run.args, run.state) == tmp_path / "checkpoint-6"
    (tmp_path / "run-0" / "checkpoint-6").mkdir(parents=True)
    assert checkpoint_folder(run.args, run.state) == tmp_path / "run-0" / "checkpoint-6"


def test_a_frozen_teacher_inside_is_left_alone(tmp_path):
    model = Towers(inference_mode=True)
    trainer(model, tmp_path, max_steps=6).train()
    first, second = (tower.base_model.rankallocator for tower in model.towers.values())
    assert first.is_over and second is None


def test_another_score_than_the_models(tmp_path):
    from adalora_fast import fuse

    model = fuse(Towers(), "gsnr")
    with one_line(ValueError, "fisher", "gsnr"):
        trainer(model, tmp_path, callback=AdaLoraCallback(score="fisher"))


def test_a_model_without_adalora(tmp_path):
    with one_line(TypeError, "BertForSequenceClassification", "get_peft_model"):
        trainer(bert(), tmp_path).train()


def test_the_trainer_takes_the_handle_too(tmp_path):
    from adalora_fast import fuse

    model, other = fuse(added()), added()
    trainer(model.adalora, tmp_path / "a", label_names=["labels"]).train()
    trainer(other, tmp_path / "b").train()
    assert isinstance(trainer(other, tmp_path / "c"), Trainer)
    for one, two in zip(trainable(model), trainable(other), strict=True):
        torch.testing.assert_close(one, two)
    assert peft_models(model) == {"": model.adalora}


def test_nothing_is_said_in_a_run_without_fault(tmp_path):
    with no_warning():
        trainer(added(), tmp_path, max_steps=6, save_strategy="steps", save_steps=3).train()
