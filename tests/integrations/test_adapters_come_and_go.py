"""Adapters of a fused model that are deleted, added again, or loaded under other keys."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn

from adalora_fast import RankAllocator, fuse, to_lora
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.checkpoints import CONFIG, END, MIDDLE, checkpoints, loaded_by_peft, new, train
from tests.helpers.models import ENCODER_LINEARS, adapted, bert
from tests.helpers.peft_models import adamw, logits, one_line, same_state, same_weights


def settings(**changes) -> AdaLoraConfig:
    common = {"task_type": "SEQ_CLS", "init_r": 4, "target_r": 2, "lora_alpha": 8, **CONFIG}
    return AdaLoraConfig(target_modules=ENCODER_LINEARS, **{**common, **changes})


def readded(stop: int = 5, **changes) -> PeftModel:
    """A model whose adapter was trained, deleted, and added again under the same name."""
    model = new()
    train(model, adamw(model), 0, stop)
    model.delete_adapter("default")
    torch.manual_seed(7)
    model.add_adapter("default", settings(**changes))
    return model


# -- deleted and added again -----------------------------------------------------------------------


def test_deleting_the_adapter_under_training_takes_its_allocator_along():
    model = new()
    optimizer = adamw(model)
    model.base_model.rankallocator.attach(optimizer)
    model.delete_adapter("default")
    assert model.base_model.rankallocator is None and not model.peft_config
    optimizer.step()  # nothing is called any more
    assert torch.equal(logits(model.base_model.model), logits(bert()))
    with one_line(ValueError, "trainable"):
        model.base_model.update_and_allocate(0)


def test_a_re_added_adapter_trains_as_a_new_one(tmp_path):
    """The same budget, mask, weights and files as of the same adapter in a new model."""
    model = readded()
    allocator = model.base_model.rankallocator
    assert isinstance(allocator, RankAllocator) and allocator.t == 0 and not allocator.is_over
    fresh = new()
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        torch.manual_seed(9)
        train(each, adamw(each), 0, END)
        each.base_model.rankallocator.finalize()
    assert same_weights(model, fresh)
    assert same_state(allocator.state_dict(), fresh.base_model.rankallocator.state_dict())
    assert sum(allocator.ranks().values()) == 26
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(to_lora(model)), logits(model), rtol=1e-5, atol=1e-6)


def test_a_re_added_adapter_of_another_rank_has_its_own_scale():
    model = readded(init_r=6, target_r=3, use_rslora=True)
    allocator = model.base_model.rankallocator
    assert set(allocator.ranks().values()) == {6} and allocator.schedule.target == 3 * 13
    layer = next(iter(adapter_layers(model).values()))
    assert layer.scaling["default"] / layer._denominator["default"] == pytest.approx(8 / 6**0.5)
    model.delete_adapter("default")
    model.add_adapter("default", settings())
    assert layer.scaling["default"] / layer._denominator["default"] == pytest.approx(8 / (4 + 1e-5))


def test_a_config_that_does_not_fit_adds_nothing():
    model = new()
    model.delete_adapter("default")
    with one_line(ValueError, "target_r"):
        model.add_adapter("default", settings(init_r=4, target_r=4))
    assert not model.peft_config and model.base_model.rankallocator is None
    model.add_adapter("default", settings())
    model.set_adapter("default")
    train(model, adamw(model), 0, 3)


@pytest.mark.parametrize("start", ["deleted", "for inference"])
@pytest.mark.parametrize("which", ["middle", "end"])
def test_a_trainable_adapter_that_is_loaded_into_a_model_without_one(start, which):
    """Its state comes along: the run goes on where it was."""
    saved = checkpoints()
    if start == "deleted":
        model = new()
        model.delete_adapter("default")
    else:
        model = fuse(adapted("bert", inference_mode=True, **CONFIG))
        model.delete_adapter("default")
    folder = getattr(saved, which)
    model.load_adapter(folder, "default", is_trainable=True)
    model.set_adapter("default")
    allocator = model.base_model.rankallocator
    torch.testing.assert_close(logits(model), getattr(saved, f"{which}_logits"), rtol=1e-5, atol=1e-6)
    if which == "end":
        assert allocator.is_over and allocator.ranks() == saved.ranks
        return
    assert allocator.t == MIDDLE and same_state(allocator.state_dict(), saved.middle_state)
    train(model, saved.optimizer_of(model), MIDDLE, END)
    allocator.finalize()
    torch.testing.assert_close(logits(model), saved.end_logits, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_model_adds_nothing():
    model = fuse(adapted("llama", **CONFIG))
    model.delete_adapter("default")
    with pytest.raises(ValueError):
        model.load_adapter(checkpoints().middle, "default", is_trainable=True)
    assert not model.peft_config and model.base_model.rankallocator is None


# -- other keys ------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """The BERT of the checkpoints as a part called ``inner`` instead of ``bert``."""

    def __init__(self) -> None:
        super().__init__()
        whole = bert()
        self.config, self.inner, self.classifier = whole.config, whole.bert, whole.classifier

    def forward(self, input_ids, attention_mask=None):
        return self.classifier(self.inner(input_ids, attention_mask=attention_mask).pooler_output)


MAPPING = {r"^bert\.": "inner."}


def renamed() -> PeftModel:
    from peft import get_peft_model

    config = copy.copy(settings(modules_to_save=["classifier"]))
    config.task_type = None
    return fuse(get_peft_model(Renamed(), config))


@torch.no_grad()
def answer(model: PeftModel) -> torch.Tensor:
    from tests.helpers.models import batch

    inputs = batch(99)
    return model.eval()(inputs["input_ids"], inputs["attention_mask"])


@pytest.mark.parametrize("which", ["middle", "end"])
@pytest.mark.parametrize("adapter", ["default", "second"])
def test_key_mapping(adapter, which):
    saved, model = checkpoints(), renamed()
    trains = adapter == "default"
    model.load_adapter(getattr(saved, which), adapter, is_trainable=trains, key_mapping=MAPPING)
    model.set_adapter(adapter)
    torch.testing.assert_close(answer(model), getattr(saved, f"{which}_logits"), rtol=1e-5, atol=1e-6)
    if not trains:
        return
    allocator = model.base_model.rankallocator
    if which == "end":
        ranks = {name.replace("bert.", "inner."): rank for name, rank in saved.ranks.items()}
        assert allocator.is_over and allocator.ranks() == ranks
    else:
        assert allocator.t == MIDDLE
        assert torch.equal(allocator._mask, saved.middle_state["tensors"]["mask"])


@pytest.mark.parametrize("which", ["middle", "end"])
def test_a_mapping_that_is_missing_or_wrong_changes_nothing(which):
    for mapping in (None, {r"^bert\.": "other."}):
        model = renamed()
        before = answer(model)
        with one_line(ValueError, "lacks", "inner"):
            model.load_adapter(
                getattr(checkpoints(), which), "default", is_trainable=True, key_mapping=mapping
            )
        assert torch.equal(answer(model), before)


@pytest.mark.parametrize("which", ["middle", "end"])
def test_a_second_adapter_under_other_keys_is_saved_under_the_new_ones(which, tmp_path):
    model = renamed()
    model.load_adapter(getattr(checkpoints(), which), "second", key_mapping=MAPPING)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = renamed()
    again.load_adapter(tmp_path / "second", "second")
    for each in (model, again):
        each.set_adapter("second")
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-6)
