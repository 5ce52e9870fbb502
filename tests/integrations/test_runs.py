"""Around a run: evaluation alone, a second run, going on elsewhere, batches without the adapted part."""

import copy
import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from adalora_fast import AdaLoraCallback, fuse, to_lora
from adalora_fast.allocator import gradients
from adalora_fast.integrations.trainer import unwrap
from tests.helpers.models import adapted, bert, examples, trainable
from tests.helpers.peft_models import adamw, logits, no_warning, steps
from tests.helpers.trainers import STEPS, peft_model, trainer

SHORT = {"total_step": 20, "tinit": 2, "tfinal": 4, "deltaT": 1}


def messages(caught):
    return [str(each.message) for each in caught if each.category is UserWarning]


def finished(tmp_path):
    """(a finished run, its folder)."""
    run = trainer(peft_model(), tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    return run, tmp_path / "saved"


def evaluating(model, folder):
    """A Trainer as in the training's script, with nothing to train on."""
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True)
    return Trainer(
        model=model, args=arguments, eval_dataset=examples(8, seed=6), callbacks=[AdaLoraCallback()]
    )


# -- evaluation alone ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run, place = finished(folder)
    return run.evaluate()["eval_loss"], run.model, place


FORMS = {
    "for inference": lambda model, place: PeftModel.from_pretrained(bert(), place),
    "fused, for inference": lambda model, place: fuse(PeftModel.from_pretrained(bert(), place)),
    "trainable": lambda model, place: PeftModel.from_pretrained(bert(), place, is_trainable=True),
    "merged": lambda model, place: PeftModel.from_pretrained(bert(), place).merge_and_unload(),
    "exported": lambda model, place: to_lora(copy.deepcopy(model)),
}


@pytest.mark.parametrize("form", FORMS)
def test_evaluate_and_predict(saved, tmp_path, form):
    loss, trained, place = saved
    run = evaluating(FORMS[form](trained, place), tmp_path)
    found = run.evaluate()
    assert abs(found["eval_loss"] - loss) < 1e-5
    assert run.predict(examples(8, seed=6)).predictions.shape == (8, 3)


@pytest.mark.parametrize("form", ["plain", "lora"])
def test_evaluation_without_any_adalora(tmp_path, form):
    model = bert()
    if form == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert evaluating(model, tmp_path).evaluate()["eval_loss"] > 0


def test_training_an_adapter_for_inference_is_refused(saved, tmp_path):
    model = PeftModel.from_pretrained(bert(), saved[2])
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer(model, tmp_path).train()


# -- a second run -------------------------------------------------------------------------------


def test_a_second_run_trains_within_the_kept_triplets(tmp_path):
    run = trainer(peft_model(), tmp_path)
    run.train()
    allocator = run.model.base_model.rankallocator
    pattern, before = allocator.rank_pattern(), [p.detach().clone() for p in allocator.lambdas()]
    with pytest.warns(UserWarning, match=r"allocation is over: it trains on within the \d+ triplets"):
        run.train()
    assert allocator.rank_pattern() == pattern and allocator.is_final and allocator.t == STEPS
    after = allocator.lambdas()
    kept = torch.tensor([keep for layer in pattern.values() for keep in layer])
    assert (torch.cat(list(after)).flatten()[~kept] == 0).all()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), "it trained"


def test_a_run_that_begins_anew_in_the_middle_says_so(tmp_path):
    model = peft_model()
    first = trainer(model, tmp_path, max_steps=STEPS)
    steps(model, adamw(model), 0, 5)
    with pytest.warns(UserWarning, match=r"starts again at step 0 .* 5 steps so far are dropped\. .*resume"):
        first.train()
    assert unwrap(model).base_model.rankallocator.is_final


def test_a_longer_schedule_in_mid_run_names_the_triplets_that_come_back(tmp_path):
    trainer(peft_model(), tmp_path, max_steps=24, save_strategy="steps", save_steps=14).train()
    again = trainer(peft_model(), tmp_path, max_steps=200)
    with pytest.warns(UserWarning, match=r"another schedule: the budget of step 14 is \d+, \d+ triplets"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))


def test_the_same_schedule_is_resumed_without_a_word(tmp_path):
    trainer(peft_model(), tmp_path, save_strategy="steps", save_steps=14).train()
    again = trainer(peft_model(), tmp_path)
    with no_warning():
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))


# -- a run that goes on elsewhere ---------------------------------------------------------------


def middle(tmp_path):
    model = fuse(adapted("bert", **SHORT))
    steps(model, adamw(model), 0, 9)
    model.save_pretrained(tmp_path)
    return model


def test_fuse_in_mid_run_names_the_call_that_loads_the_state(tmp_path):
    run = middle(tmp_path)
    with pytest.warns(UserWarning, match=r"empty statistics; .* model\.load_adapter\(folder, 'default'"):
        loaded = fuse(PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True))
    assert loaded.base_model.rankallocator.t == 0
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    theirs, ours = loaded.base_model.rankallocator, run.base_model.rankallocator
    assert theirs.t == 9
    first, second = theirs.state_dict()["tensors"], ours.state_dict()["tensors"]
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": False}], ids=str)
def test_a_new_adapter_is_fused_without_a_word(options):
    with no_warning():
        fuse(adapted("bert", **SHORT, **options))


def test_a_finished_adapter_is_fused_without_a_word(saved):
    model = PeftModel.from_pretrained(bert(), saved[2], is_trainable=True)
    with no_warning():
        assert fuse(model).base_model.rankallocator.is_final


# -- what is evaluated is what is saved ---------------------------------------------------------


def ended():
    model = fuse(adapted("bert", **SHORT))
    steps(model, adamw(model), 0, 20)
    return model, model.base_model.rankallocator


def test_weights_that_were_swapped_in_lose_the_pruned_triplets():
    """An average is copied into the model, evaluated, and taken out again."""
    model, allocator = ended()
    with no_warning():
        logits(model)
    expected = logits(model)
    with torch.no_grad():
        for values in allocator.lambdas():
            values.add_(torch.where(values == 0, 0.3, 0.0))
    with pytest.warns(UserWarning, match=r"\d+ pruned triplets had come back .* load_adapter\(\)"):
        assert torch.equal(logits(model), expected)


def test_loading_other_weights_into_a_finished_model_keeps_them_whole(tmp_path):
    """The mask that the model had is not theirs."""
    other = fuse(adapted("bert", **SHORT))
    steps(other, adamw(other), 0, 5)
    other.save_pretrained(tmp_path)
    model, _ = ended()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), logits(other))


def test_the_saved_average_is_the_evaluated_one(tmp_path):
    model = fuse(adapted("bert", **SHORT))
    optimizer, average = adamw(model), AveragedModel(model)
    for step in range(20):
        steps(model, optimizer, step, step + 1)
        average.update_parameters(model)
    copied = average.module
    with pytest.warns(UserWarning, match=r"copy of a model from step 0.*apply_mask\(copy\)"):
        copied.save_pretrained(tmp_path / "stale")
    model.base_model.rankallocator.apply_mask(average)
    found = logits(copied)
    with no_warning():
        copied.save_pretrained(tmp_path / "average")
    again = PeftModel.from_pretrained(bert(), tmp_path / "average")
    torch.testing.assert_close(logits(again), found, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, logits(model))


# -- batches without the adapted part -----------------------------------------------------------


class Seeing(nn.Module):
    """Adapters in the vision part; some batches are text alone. ``output`` is what a forward returns."""

    def __init__(self, output=dict):
        super().__init__()
        self.output = output
        torch.manual_seed(0)
        self.vision = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.text, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, ids, pixels=None, labels=None):
        hidden = self.text(ids).mean(1)
        if pixels is not None and pixels.any():
            hidden = hidden + self.vision(pixels)
        logits = self.head(hidden)
        return self.output(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def seeing(output=dict):
    config = AdaLoraConfig(
        init_r=4, target_r=2, **SHORT, target_modules=r"vision\.[02]", modules_to_save=["head"]
    )
    return get_peft_model(Seeing(output), config)


def some_batch(t, text_alone):
    draw = torch.Generator().manual_seed(t)
    ids, labels = torch.randint(0, 20, (4, 5), generator=draw), torch.randint(0, 2, (4,), generator=draw)
    return {"ids": ids, "labels": labels, "pixels": None if text_alone else torch.randn(4, 6, generator=draw)}


@pytest.mark.parametrize("output", [dict, SequenceClassifierOutput])  # γ · R is in the second one's loss
@pytest.mark.parametrize("attached", [True, False])
def test_by_hand(attached, output):
    model = fuse(seeing(output))
    allocator, optimizer = model.base_model.rankallocator, torch.optim.AdamW(trainable(model), 1e-2)
    if attached:
        allocator.attach(optimizer)
    with no_warning():
        # The model returns a plain dict, in whose loss PEFT adds no term; only attach() can add it.
        if not attached and output is dict:
            warnings.filterwarnings("default", message="the orthogonality term reached no gradient")
        for t in range(20):
            model(**some_batch(t, t % 4 in (0, 3)))["loss"].backward()
            optimizer.step()
            if not attached:
                model.base_model.update_and_allocate(t)
            optimizer.zero_grad()
    assert allocator.is_final and sum(allocator.ranks().values()) == allocator.schedule.target
    assert allocator.state_dict()["config"]["update_count"] == sum(t % 4 not in (0, 3) for t in range(16))


def test_under_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "LONG", 3)
    rows = [
        {
            "ids": torch.randint(0, 20, (5,)),
            "pixels": torch.randn(6) * (row // 4 not in (3, 7, 8, 9)),
            "labels": torch.tensor(row % 2),
        }
        for row in range(64)
    ]
    model = seeing()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=16,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="sequential",
    )
    run = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[AdaLoraCallback(tinit=1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    allocator = model.base_model.rankallocator
    assert allocator.is_final and sum(allocator.ranks().values()) == allocator.schedule.target
    assert [message for message in messages(caught) if "3 optimizer steps in a row" in message]
