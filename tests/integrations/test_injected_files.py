"""``add_adapter``'s files by transformers' own methods, and several adapters in one model."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification

from adalora_fast import fuse, to_lora
from tests.helpers.injecting import (
    END,
    LAYERS,
    added,
    config,
    finished_run,
    kept_triplets,
    logits,
    run_steps,
    twin,
)
from tests.helpers.models import awake, batch, bert, trainable
from tests.helpers.peft_models import no_warning, one_line, same_state, same_weights

STATE = "adalora_allocator.safetensors"


@pytest.fixture(scope="module")
def finished():
    return finished_run()


def test_a_run_saved_and_resumed_by_hand_is_the_whole_run(tmp_path):
    whole = fuse(added())
    run_steps(whole, whole.rankallocator)
    first = fuse(added())
    optimizer = run_steps(first, first.rankallocator, stop=9)
    first.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adalora_allocator.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    second = fuse(added())
    with no_warning():
        second.load_adapter(tmp_path, is_trainable=True)
    assert same_state(first.rankallocator.state_dict(), second.rankallocator.state_dict())
    other = torch.optim.AdamW(trainable(second), lr=2e-2)
    other.load_state_dict(optimizer.state_dict())
    run_steps(second, second.rankallocator, 9, END, other)
    assert same_weights(second, whole) and kept_triplets(whole) == 2 * LAYERS


def test_a_finished_adapter_loads_everywhere(finished, tmp_path):
    expected = logits(finished)
    finished.save_pretrained(tmp_path)
    plain, fused = bert(), fuse(added())
    plain.load_adapter(tmp_path)
    fused.load_adapter(tmp_path)
    peft_model = PeftModel.from_pretrained(bert(), tmp_path)
    for model in (plain, fused, peft_model):
        torch.testing.assert_close(logits(model), expected)
    assert fused.rankallocator.is_over and fused.rankallocator.ranks() == finished.rankallocator.ranks()
    assert finished.peft_config["default"].rank_pattern is None
    again = fuse(plain)  # loaded for inference, fused afterwards
    torch.testing.assert_close(logits(again), expected)


def test_scales_are_in_the_files_once(tmp_path):
    model = awake(fuse(added(alpha_pattern={"query": 32.0}, use_rslora=True)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain, fused = bert(), fuse(added(alpha_pattern={"query": 32.0}, use_rslora=True))
    plain.load_adapter(tmp_path)
    fused.load_adapter(tmp_path)
    torch.testing.assert_close(logits(plain), expected)
    torch.testing.assert_close(logits(fused), expected)


def test_a_cut_down_checkpoint_of_a_peft_model_loads(tmp_path):
    peft_model = fuse(twin())
    run_steps(peft_model, peft_model.base_model.rankallocator)
    peft_model.base_model.rankallocator.finalize()
    peft_model.save_pretrained(tmp_path)
    model = fuse(added())
    model.load_adapter(tmp_path)
    torch.testing.assert_close(logits(model), logits(peft_model))
    assert sum(model.rankallocator.ranks().values()) == 2 * LAYERS
    model.save_pretrained(tmp_path / "again")
    again = fuse(added())
    again.load_adapter(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(peft_model))


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
    model = fuse(added())
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    before = copy.deepcopy(model)
    with one_line(ValueError, "adapter_model.safetensors"):
        model.load_adapter(tmp_path)
    assert same_weights(model, before)


def test_a_head_unfrozen_by_hand_is_not_lost_without_a_word(tmp_path):
    model = fuse(added())
    model.classifier.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"classifier\.weight.*modules_to_save"):
        model.save_pretrained(tmp_path)
    with_head = fuse(added(modules_to_save=["classifier"]))
    with no_warning():
        with_head.save_pretrained(tmp_path / "head")


def test_modules_to_save_come_back(tmp_path):
    model = fuse(added(modules_to_save=["classifier"]))
    run_steps(model, model.rankallocator, stop=6)
    model.save_pretrained(tmp_path)
    again = fuse(added(modules_to_save=["classifier"]))
    again.load_adapter(tmp_path, is_trainable=True)
    assert same_weights(model, again)
    torch.testing.assert_close(logits(model), logits(again))


def test_saving_without_one_allocator_step_warns(tmp_path):
    model = fuse(added())
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    model(**batch(0)).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="without one allocator step"):
        model.save_pretrained(tmp_path)


# -- several adapters --------------------------------------------------------------------------


def test_a_second_adapter_for_inference(tmp_path):
    other = awake(fuse(added(use_rslora=True)))
    expected = logits(other)
    other.save_pretrained(tmp_path)
    model = fuse(added())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that there will be several adapters
        model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), expected)
    model.set_adapter("default")
    assert model.adalora.base_model.active_adapters == ["default"]
    run_steps(model, model.rankallocator)
    model.rankallocator.finalize()
    alone = fuse(added())
    run_steps(alone, alone.rankallocator)
    assert kept_triplets(model) == 2 * LAYERS
    torch.testing.assert_close(logits(model), logits(alone))
    model.save_pretrained(tmp_path / "trained")
    assert (tmp_path / "trained" / STATE).is_file()
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / STATE).exists()
    torch.testing.assert_close(logits(to_lora(model, adapter_name="other")), expected)


def test_a_second_trainable_adapter_is_refused_and_leaves_nothing_behind():
    model = fuse(added())
    with pytest.raises(ValueError, match="only 1 trainable adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(config(), "second")
    assert list(model.peft_config) == ["default"]
    run_steps(model, model.rankallocator, stop=3)


def test_a_deleted_adapter_takes_the_allocator_with_it():
    model = fuse(added())
    model.delete_adapter("default")
    assert type(model) is BertForSequenceClassification and not model._forward_hooks
    assert "rankallocator" not in model.__dict__
    torch.manual_seed(1)
    model.add_adapter(config(), "anew")
    fuse(model)
    run_steps(model, model.rankallocator)
    assert sum(model.rankallocator.ranks().values()) == 2 * LAYERS
