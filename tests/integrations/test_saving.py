"""Saving is whole or not at all, and knows about several adapters."""

import json

import peft.peft_model
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

import adalora_fast.integrations.checkpoints as integration
from adalora_fast import fuse
from adalora_fast.allocator import state as allocator_state
from adalora_fast.allocator.state import read_state
from tests.helpers.checkpoints import ADAPTER, CONFIG, END, STATE, loaded_by_peft, new, stored, train
from tests.helpers.models import ENCODER_LINEARS, adapted, awake, bert, trained_weights
from tests.helpers.peft_models import adamw, logits, one_line


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class DiskFull(OSError):
    pass


def fail(*args, **kwargs):
    raise DiskFull("no space left on device")


def fail_half_written(tensors, path, *args, **kwargs):
    with open(path, "wb") as file:
        file.write(b"half")
    raise DiskFull("no space left on device")


FAILURES = {
    "weights": (peft.peft_model, "safe_save_file", fail_half_written),
    "config": (AdaLoraConfig, "save_pretrained", fail),
    "state": (integration, "write_state", fail),
    "state, half written": (allocator_state, "save_file", fail_half_written),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("finished", [False, True], ids=["middle", "end"])
def test_a_failure_leaves_the_checkpoint_that_was_there(failure, finished, tmp_path, monkeypatch):
    model = new()
    optimizer = adamw(model)
    train(model, optimizer, 0, 4)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    before = contents(folder)
    train(model, optimizer, 4, END)
    if finished:
        model.base_model.rankallocator.finalize()
    place, name, replacement = FAILURES[failure]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, replacement)
        with pytest.raises(DiskFull):
            model.save_pretrained(folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)  # no temporary folder either
    config = model.peft_config["default"]
    assert config.rank_pattern is None and not config.inference_mode
    model.save_pretrained(folder)
    assert contents(folder).keys() == before.keys() and contents(folder)[ADAPTER] != before[ADAPTER]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_writes_nothing_into_a_new_folder(failure, tmp_path, monkeypatch):
    model = new()
    place, name, replacement = FAILURES[failure]
    monkeypatch.setattr(place, name, replacement)
    with pytest.raises(DiskFull):
        model.save_pretrained(tmp_path / "checkpoint")
    assert contents(tmp_path) == {}


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with one_line(ValueError, tmp_path / "file", "folder"):
        new().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_only_the_main_process_writes(tmp_path):
    new().save_pretrained(tmp_path, is_main_process=False)
    assert contents(tmp_path) == {}


def test_an_inference_only_model_saves_as_peft_does(tmp_path):
    model = fuse(awake(adapted("bert", inference_mode=True, **CONFIG)))
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {"README.md", "adapter_config.json", ADAPTER}
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), rtol=1e-5, atol=1e-6)


# -- several adapters --------------------------------------------------------------------------


def with_a_second_adapter(trained: str = "default", second: str = "other"):
    """A model whose adapter ``trained`` can be trained; ``second`` is for inference and has rank 6."""
    torch.manual_seed(1)
    settings = {
        "task_type": "SEQ_CLS",
        "init_r": 4,
        "target_r": 2,
        "lora_alpha": 8,
        "target_modules": ENCODER_LINEARS,
    }
    model = get_peft_model(bert(), AdaLoraConfig(**settings, **CONFIG), adapter_name=trained)
    model.add_adapter(
        second,
        AdaLoraConfig(
            task_type="SEQ_CLS",
            inference_mode=True,
            init_r=6,
            target_r=2,
            total_step=9,
            target_modules=["query", "value"],
        ),
    )
    return awake(fuse(model), second)


@pytest.mark.parametrize("finished", [False, True], ids=["middle", "end"])
@pytest.mark.parametrize("trained, second", [("default", "other"), ("mine", "other"), ("mine", "default")])
def test_several_adapters(trained, second, finished, tmp_path):
    model = with_a_second_adapter(trained, second)
    train(model, adamw(model), 0, END if finished else 9)
    if finished:
        model.base_model.rankallocator.finalize()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    folder = {name: tmp_path if name == "default" else tmp_path / name for name in (trained, second)}
    assert read_state(folder[trained])["config"]["t"] == (END if finished else 9)
    assert not (folder[second] / STATE).exists()
    ranks = {t.shape[0] for name, t in stored(folder[trained]).items() if name.endswith("lora_E")}
    assert (ranks != {4}) == finished
    assert {t.shape[0] for name, t in stored(folder[second]).items() if name.endswith("lora_E")} == {6}
    assert json.loads((folder[second] / "adapter_config.json").read_text())["rank_pattern"] is None
    torch.testing.assert_close(logits(loaded_by_peft(folder[trained])), expected, rtol=1e-5, atol=1e-6)
    again = with_a_second_adapter(trained, second)
    again.load_adapter(folder[trained], trained, is_trainable=True)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)
    weights = trained_weights(again)
    assert all(f".{second}" not in name for name in weights if "lora_" in name)


def test_selected_adapters_only(tmp_path):
    model = with_a_second_adapter()
    train(model, adamw(model), 0, 5)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert STATE not in contents(tmp_path) and ADAPTER not in contents(tmp_path)
    assert set(contents(tmp_path)) == {"README.md", "other/adapter_config.json", f"other/{ADAPTER}"}


@pytest.mark.parametrize("finished", [False, True], ids=["middle", "end"])
def test_without_safetensors(finished, tmp_path):
    # Plain PEFT loads such files; here nothing is unpickled, and the refusal says so.
    model = new()
    train(model, adamw(model), 0, END if finished else 9)
    if finished:
        model.base_model.rankallocator.finalize()
    model.save_pretrained(tmp_path, safe_serialization=False)
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), rtol=1e-5, atol=1e-6)
    other = new()
    before = logits(other)
    with one_line(ValueError, tmp_path / ADAPTER, "safetensors"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other), before)
