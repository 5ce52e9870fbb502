"""load_best_model_at_end and auto_find_batch_size: runs that go back end with one model and one budget."""

import warnings

import pytest
import torch

from adalora_fast import AdaLoraCallback
from tests.helpers.checkpoints import ADAPTER, loaded_by_peft, stored
from tests.helpers.peft_models import logits
from tests.helpers.trainers import Watch, peft_model, trainer

LAYERS = 13
OPTIONS = {"tinit": 4, "tfinal": 7, "deltaT": 3}  # the final mask is made at step 17 of 24
BEST = {"before the decrease": 4, "in the decrease": 12, "just final": 20, "the end": 24}


def run_with_best(folder, step: int):
    """A run that evaluates every four steps and finds the evaluation at ``step`` the best."""
    model = peft_model()
    run = trainer(
        model,
        folder,
        callback=AdaLoraCallback(**OPTIONS),
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="order",
        greater_is_better=True,
    )
    run.compute_metrics = lambda prediction: {"order": float(run.state.global_step == step)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return run, [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.parametrize("phase", BEST)
def test_the_best_checkpoint_with_the_final_budget(phase, tmp_path):
    step = BEST[phase]
    run, messages = run_with_best(tmp_path, step)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert any("pruned" in message for message in messages) if step < 17 else not messages, messages
    allocator, saved = run.model.base_model.rankallocator, stored(tmp_path / f"checkpoint-{step}")
    assert allocator.is_over and sum(allocator.ranks().values()) == 2 * LAYERS
    for name, kept in allocator.rank_pattern().items():
        layer, prefix = run.model.base_model.model.get_submodule(name), f"base_model.model.{name}"
        found = layer.lora_E["default"].detach().flatten()
        whole = saved[f"{prefix}.lora_E"].flatten()
        assert torch.equal(found, torch.where(torch.tensor(kept), whole, 0.0)), name
        assert torch.equal(layer.lora_A["default"], saved[f"{prefix}.lora_A"]), name
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / ADAPTER).is_file()
    torch.testing.assert_close(
        logits(loaded_by_peft(tmp_path / "saved")), logits(run.model), rtol=1e-5, atol=1e-6
    )


def test_auto_find_batch_size(tmp_path):
    """Batches that are too large fail after some steps; the run that fits is the whole run."""
    watch, model = Watch(), peft_model()
    run = trainer(
        model,
        tmp_path,
        watch,
        callback=AdaLoraCallback(**OPTIONS),
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
    )
    forward, calls = type(model).forward, []

    def forward_in_little_memory(*args, **kwargs):
        size = len(kwargs["input_ids"])
        calls.append(size)
        if size > 4 and calls.count(size) == 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate too much.")
        return forward(model, *args, **kwargs)

    model.forward = forward_in_little_memory
    run.train()
    tried = sorted(set(calls), reverse=True)
    assert tried[0] == 8 and tried[-1] <= 4, tried
    failed = len([size for size in calls if size > 4])
    budgets = watch.budgets[-24:]
    assert watch.steps[-24:] == list(range(1, 25)) and failed >= 6
    schedule = model.base_model.rankallocator.schedule
    assert budgets == [schedule.budget(t) for t in range(24)]
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * LAYERS
    assert model.base_model.rankallocator.t == 24
