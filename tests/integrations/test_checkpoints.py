"""Checkpoints: whole, with the allocator's state, during a run; cut down at its end; both load everywhere."""

import json
import warnings

import pytest
import torch

from adalora_fast import fuse
from adalora_fast.allocator.state import read_state
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.checkpoints import (
    ADAPTER,
    END,
    LAYERS,
    MIDDLE,
    STATE,
    checkpoints,
    loaded_by_peft,
    new,
    stored,
    train,
)
from tests.helpers.models import awake, trained_weights
from tests.helpers.peft_models import adamw, logits, no_warning, same_state, same_weights

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # cut-down products sum in another order


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pattern(folder) -> dict | None:
    return json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]


# -- what is written ---------------------------------------------------------------------------


def test_the_middle_of_a_run_keeps_whole_tensors_and_the_state():
    saved = checkpoints()
    assert names(saved.middle) == {"README.md", "adapter_config.json", ADAPTER, STATE}
    assert pattern(saved.middle) is None
    tensors = stored(saved.middle)
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_E")} == {4}
    state = read_state(saved.middle)
    assert state["config"]["t"] == MIDDLE and not state["config"]["is_final"]
    assert same_state(state, saved.middle_state)


def test_the_end_of_a_run_drops_pruned_triplets():
    saved = checkpoints()
    assert names(saved.end) == {"README.md", "adapter_config.json", ADAPTER, STATE}
    assert min(saved.ranks.values()) == 0 and sum(saved.ranks.values()) == 2 * LAYERS
    tensors = stored(saved.end)
    for name, rank in saved.ranks.items():
        prefix = f"base_model.model.{name}"
        assert tensors[f"{prefix}.lora_A"].shape[0] == tensors[f"{prefix}.lora_E"].shape[0] == rank
        assert tensors[f"{prefix}.lora_B"].shape[1] == rank
        assert sum(pattern(saved.end)[f"{name}.lora_E"]) == rank
    assert read_state(saved.end)["config"]["is_over"]


def test_saving_leaves_the_model_as_it_is(tmp_path):
    finished = checkpoints().finished
    weights, config = trained_weights(finished), finished.peft_config["default"]
    for folder in ("one", "two"):
        finished.save_pretrained(tmp_path / folder)
        assert config.rank_pattern is None and not config.inference_mode
    now = trained_weights(finished)
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    for name in (ADAPTER, STATE, "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_run_in_its_final_phase_still_keeps_whole_tensors(tmp_path):
    model = new()
    train(model, adamw(model), 0, END - 2)
    assert model.base_model.rankallocator.is_final
    model.save_pretrained(tmp_path)
    assert pattern(tmp_path) is None
    assert {t.shape[0] for name, t in stored(tmp_path).items() if name.endswith("lora_E")} == {4}


def test_a_model_without_one_allocator_step_warns_when_saved(tmp_path):
    model = new()
    optimizer = adamw(model)
    with no_warning():
        model.save_pretrained(tmp_path / "new")  # not trained at all: nothing to say
    model.train()(
        **{"input_ids": torch.ones(1, 2, dtype=torch.int64), "labels": torch.zeros(1).long()}
    ).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="without one allocator step"):
        model.save_pretrained(tmp_path / "trained")


def test_a_model_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    new().save_pretrained(tmp_path)
    assert "# Mine" in (tmp_path / "README.md").read_text()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    new().save_pretrained(tmp_path)
    assert names(tmp_path) == {"README.md", "adapter_config.json", ADAPTER, STATE, "notes.txt"}


# -- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["middle", "end"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("trainable", [False, True])
def test_plain_peft_loads_both(which, fused, trainable):
    saved = checkpoints()
    model = loaded_by_peft(getattr(saved, which), is_trainable=trainable)
    if fused:
        fuse(model)
    torch.testing.assert_close(logits(model), getattr(saved, f"{which}_logits"), **CLOSE)


def test_a_finished_model_that_is_loaded_again_stays_finished():
    saved = checkpoints()
    model = fuse(loaded_by_peft(saved.end, is_trainable=True))
    allocator = model.base_model.rankallocator
    assert allocator.is_final and allocator.is_over and allocator.ranks() == saved.ranks
    with no_warning():
        train(model, adamw(model), 0, 3)
    assert allocator.ranks() == saved.ranks


@pytest.mark.parametrize("changed", [False, True], ids=["new model", "trained model"])
def test_load_adapter_resumes_exactly(changed):
    saved = checkpoints()
    model = new()
    if changed:
        train(model, adamw(model), 0, 13)
    with no_warning():
        model.load_adapter(saved.middle, "default", is_trainable=True)
    allocator = model.base_model.rankallocator
    assert same_state(allocator.state_dict(), saved.middle_state)
    assert torch.equal(logits(model), saved.middle_logits)
    train(model, saved.optimizer_of(model), MIDDLE, END)
    allocator = model.base_model.rankallocator
    allocator.finalize()
    assert same_weights(model, saved.finished)
    assert same_state(allocator.state_dict(), saved.finished.base_model.rankallocator.state_dict())


def test_an_attached_allocator_stays_attached_when_a_checkpoint_is_loaded():
    saved = checkpoints()
    model = new()
    optimizer = adamw(model)
    model.base_model.rankallocator.attach(optimizer)
    model.load_adapter(saved.middle, "default", is_trainable=True)
    model.train()(
        **{"input_ids": torch.ones(1, 2, dtype=torch.int64), "labels": torch.zeros(1).long()}
    ).loss.backward()
    optimizer.step()
    assert model.base_model.rankallocator.t == MIDDLE + 1


def test_cut_down_into_whole():
    saved = checkpoints()
    model = awake(new())
    model.load_adapter(saved.end, "default", is_trainable=True)
    torch.testing.assert_close(logits(model), saved.end_logits, **CLOSE)
    allocator = model.base_model.rankallocator
    assert allocator.is_over and allocator.ranks() == saved.ranks
    assert {
        name: layer.lora_E["default"].shape[0]
        for name, layer in adapter_layers(model.base_model.model).items()
    } == (saved.ranks)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_A.default" in name)


@pytest.mark.parametrize("origin", ["load_adapter", "from_pretrained"])
def test_whole_into_cut_down(origin):
    saved = checkpoints()
    if origin == "load_adapter":
        model = new()
        model.load_adapter(saved.end, "default", is_trainable=True)
    else:
        model = fuse(loaded_by_peft(saved.end, is_trainable=True))
    model.load_adapter(saved.middle, "default", is_trainable=True)
    torch.testing.assert_close(logits(model), saved.middle_logits, **CLOSE)
    allocator = model.base_model.rankallocator
    assert not allocator.is_final and allocator.t == MIDDLE
    scales = {name: layer.ranknum["default"].item() for name, layer in adapter_layers(model).items()}
    assert set(scales.values()) == {4.0}, (
        scales
    )  # the scale is that of the initial rank, in layers of rank 0 too
    train(model, saved.optimizer_of(model), MIDDLE, END)
    assert model.base_model.rankallocator.ranks() == saved.ranks


def test_a_cut_down_model_is_saved_again(tmp_path):
    saved = checkpoints()
    model = new()
    model.load_adapter(saved.end, "default", is_trainable=True)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), saved.end_logits, **CLOSE)
    again = new()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(again), saved.end_logits, **CLOSE)
    assert again.base_model.rankallocator.ranks() == saved.ranks


@pytest.mark.parametrize("which", ["middle", "end"])
def test_a_checkpoint_as_a_second_adapter(which):
    saved = checkpoints()
    model = new()
    state = model.base_model.rankallocator.state_dict()
    model.load_adapter(getattr(saved, which), "second")
    assert same_state(model.base_model.rankallocator.state_dict(), state)
    model.base_model.set_adapter("second", inference_mode=True)
    torch.testing.assert_close(logits(model), getattr(saved, f"{which}_logits"), **CLOSE)


def test_an_unfinished_checkpoint_for_inference_warns_with_its_budget():
    saved = checkpoints()
    budget = saved.middle_state["config"]["budget"]
    assert 2 * LAYERS < budget < 4 * LAYERS
    model = new()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_adapter(saved.middle, "default")
    found = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(found) == 1 and "\n" not in found[0]
    assert all(str(piece) in found[0] for piece in (f"step {MIDDLE}", budget, 2 * LAYERS, "finalize()"))
    with no_warning():
        new().load_adapter(saved.end, "default")


def test_a_checkpoint_of_peft_itself_warns_of_empty_statistics(tmp_path):
    saved = checkpoints()
    loaded_by_peft(saved.middle).save_pretrained(tmp_path)
    assert not (tmp_path / STATE).exists()
    model = new()
    with pytest.warns(UserWarning, match="empty statistics"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(model), saved.middle_logits, **CLOSE)
    assert model.base_model.rankallocator.t == 0
    train(model, adamw(model), 0, END)
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * LAYERS
