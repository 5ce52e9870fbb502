"""Trainer runs that are interrupted and resumed, restarted, or end with their best checkpoint."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from adalora_fast import AdaLoraCallback, fuse
from adalora_fast.allocator.state import read_state
from tests.helpers.checkpoints import ADAPTER, STATE, loaded_by_peft, stored
from tests.helpers.models import examples
from tests.helpers.peft_models import logits, no_warning, one_line, same_state, same_weights
from tests.helpers.trainers import STEPS, Watch, peft_model, trainer

LAYERS = 13
OPTIONS = {"tinit": 4, "tfinal": 7, "deltaT": 3}  # the final mask is made at step 17
PHASES = {"warm-up": 2, "budget": 10, "final": 20}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted, with a checkpoint every other step."""
    folder, watch, model = tmp_path_factory.mktemp("whole"), Watch(), peft_model()
    run = trainer(
        model,
        folder,
        watch,
        callback=AdaLoraCallback(**OPTIONS),
        save_strategy="steps",
        save_steps=2,
        logging_steps=2,
    )
    run.train()
    return SimpleNamespace(folder=folder, model=model, watch=watch, trainer=run)


def resumed(whole, folder, step: int, late: bool = False, fused: bool = False) -> SimpleNamespace:
    """The same run in a new process, so to speak, from the checkpoint of ``step``."""
    shutil.copytree(whole.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    watch, model = Watch(), peft_model(seed=77)  # another initialisation: all must come from the checkpoint
    if fused:
        fuse(model)
    run = trainer(model, folder, watch, callback=AdaLoraCallback(**OPTIONS), logging_steps=2)
    if late:
        model = peft_model(seed=77)
        run = Trainer(model=model, args=run.args, train_dataset=examples(), callbacks=[watch])
        run.add_callback(AdaLoraCallback(**OPTIONS))
        run.remove_callback(watch)
        run.add_callback(watch)  # after the allocator's step
    return SimpleNamespace(trainer=run, model=model, watch=watch)


def test_checkpoints_keep_whole_tensors_until_the_end(whole):
    for step in range(2, STEPS + 1, 2):
        folder = whole.folder / f"checkpoint-{step}"
        assert read_state(folder)["config"]["t"] == step
        assert {t.shape[0] for name, t in stored(folder).items() if name.endswith("lora_E")} == {4}
    state = read_state(whole.folder / f"checkpoint-{PHASES['final']}")["config"]
    assert state["is_final"] and not state["is_over"]


@pytest.mark.parametrize("late", [False, True], ids=["callback from the start", "callback added later"])
@pytest.mark.parametrize("phase", PHASES)
def test_resumes_exactly(whole, phase, late, tmp_path):
    step = PHASES[phase]
    run = resumed(whole, tmp_path, step, late=late)
    with no_warning():
        run.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert run.watch.steps == list(range(step + 1, STEPS + 1))
    assert run.watch.budgets == whole.watch.budgets[step:]
    ours, theirs = run.model.base_model.rankallocator, whole.model.base_model.rankallocator
    assert ours.rank_pattern() == theirs.rank_pattern()
    assert same_weights(run.model, whole.model)
    assert ours.schedule == theirs.schedule
    assert run.model.peft_config["default"].total_step == STEPS
    assert same_state(ours.state_dict(), theirs.state_dict())
    losses = [
        [entry["loss"] for entry in history if "loss" in entry and entry["step"] > step]
        for history in (run.trainer.state.log_history, whole.trainer.state.log_history)
    ]
    assert losses[0] == losses[1]


def test_resumes_a_model_that_was_fused_by_hand(whole, tmp_path):
    run = resumed(whole, tmp_path, 10, fused=True)
    run.trainer.train(resume_from_checkpoint=True)
    assert same_weights(run.model, whole.model)


@pytest.mark.parametrize("late", [False, True])
def test_a_checkpoint_without_state_is_refused(whole, late, tmp_path):
    run = resumed(whole, tmp_path, 10, late=late)
    (tmp_path / "checkpoint-10" / STATE).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with one_line(ValueError, "step 10", "no state"):
            run.trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_score_is_refused(whole, tmp_path):
    shutil.copytree(whole.folder / "checkpoint-10", tmp_path / "checkpoint-10")
    run = trainer(peft_model(), tmp_path, callback=AdaLoraCallback(score="fisher", **OPTIONS))
    with one_line(ValueError, "sensitivity", "fisher"):
        run.train(resume_from_checkpoint=True)


def test_the_run_is_saved_cut_down(whole, tmp_path):
    whole.trainer.save_model(str(tmp_path))
    ranks = whole.model.base_model.rankallocator.ranks()
    assert sum(ranks.values()) == 2 * LAYERS
    for name, rank in ranks.items():
        assert stored(tmp_path)[f"base_model.model.{name}.lora_A"].shape[0] == rank
    expected = logits(whole.model)
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), expected, rtol=1e-5, atol=1e-6)


def test_trained_twice_after_a_reset_runs_the_schedule_twice(tmp_path):
    watch, model = Watch(), peft_model()
    run = trainer(model, tmp_path, watch, max_steps=8)
    run.train()
    model.base_model.rankallocator.reset()
    with no_warning():
        run.train()
    assert watch.steps == [*range(1, 9), *range(1, 9)]
    assert watch.budgets[:8] == watch.budgets[8:]
    assert watch.budgets[0] == 4 * LAYERS
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * LAYERS


def best(folder, first: bool) -> SimpleNamespace:
    """A run that ends with its first, or its last, evaluation as the best one."""
    calls = []

    def metric(prediction) -> dict[str, float]:
        calls.append(1)
        return {"order": -len(calls) if first else len(calls)}

    model = peft_model()
    run = trainer(
        model,
        folder,
        callback=AdaLoraCallback(**OPTIONS),
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="order",
        greater_is_better=True,
    )
    run.compute_metrics = metric
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    return SimpleNamespace(model=model, trainer=run, messages=messages)


def test_the_best_model_is_a_finished_one(tmp_path):
    run = best(tmp_path, first=False)
    assert run.trainer.state.best_model_checkpoint.endswith("checkpoint-24")
    assert not run.messages
    assert sum(run.model.base_model.rankallocator.ranks().values()) == 2 * LAYERS


def test_the_best_model_is_from_the_middle_of_the_run(tmp_path):
    run = best(tmp_path, first=True)
    folder = tmp_path / "checkpoint-8"
    assert run.trainer.state.best_model_checkpoint == str(folder)
    # it is that checkpoint, pruned to the final budget, with a warning
    assert any("8 of 24" in message and "final allocation" in message for message in run.messages), (
        run.messages
    )
    assert all("\n" not in message for message in run.messages)
    allocator, saved = run.model.base_model.rankallocator, stored(folder)
    assert allocator.is_over and sum(allocator.ranks().values()) == 2 * LAYERS
    for name, kept in allocator.rank_pattern().items():
        layer = run.model.base_model.model.get_submodule(name)
        prefix = f"base_model.model.{name}"
        assert torch.equal(layer.lora_A["default"], saved[f"{prefix}.lora_A"])
        assert torch.equal(layer.lora_B["default"], saved[f"{prefix}.lora_B"])
        values = saved[f"{prefix}.lora_E"].flatten() * torch.tensor(kept)
        assert torch.equal(layer.lora_E["default"].flatten(), values)
    run.trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / ADAPTER).is_file()
    expected = logits(run.model)
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path / "saved")), expected, rtol=1e-5, atol=1e-6)
