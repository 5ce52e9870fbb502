"""AdaLoraCallback under the Trainer: schedule, steps, log, label smoothing, compiled models, early end."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from adalora_fast import AdaLoraCallback, fuse
from adalora_fast.integrations.fused import is_fused
from adalora_fast.integrations.trainer import unwrap
from tests.helpers.models import bert, examples, trainable
from tests.helpers.peft_models import no_warning, one_line
from tests.helpers.trainers import STEPS, StopAt, Watch, peft_model, trainer

LAYERS = 13


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all defaults."""
    watch, model = Watch(), peft_model()
    trained = trainer(model, tmp_path_factory.mktemp("run"), watch)
    fused_early = is_fused(model)
    trained.train()
    return SimpleNamespace(watch=watch, model=model, trainer=trained, fused_early=fused_early)


def ranks(model) -> dict[str, int]:
    return model.base_model.rankallocator.ranks()


# -- schedule ----------------------------------------------------------------------------------


def test_the_model_is_fused_when_the_trainer_is_made(run):
    assert run.fused_early


def test_total_step_and_phases_come_from_the_run(run):
    config, schedule = run.model.peft_config["default"], run.model.base_model.rankallocator.schedule
    expected = {"total_step": STEPS, "tinit": 2, "tfinal": 7, "deltaT": 1}
    for name, value in expected.items():
        assert getattr(schedule, name) == getattr(config, name) == value, name


def test_one_allocator_step_per_optimizer_step(run):
    assert run.watch.steps == list(range(1, STEPS + 1))
    schedule = run.model.base_model.rankallocator.schedule
    assert run.watch.budgets == [schedule.budget(step) for step in range(STEPS)]


def test_the_final_budget_is_met(run):
    found = ranks(run.model)
    assert sum(found.values()) == 2 * LAYERS and len(set(found.values())) > 1
    values = torch.cat([p.flatten() for name, p in run.model.named_parameters() if "lora_E" in name])
    assert (values != 0).sum() == 2 * LAYERS
    assert run.model.base_model.rankallocator.is_over


def test_log_entries(run):
    entries = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [6, 12, 18, 24]
    budgets = [entry["adalora/budget"] for entry in entries]
    assert budgets == [run.watch.budgets[step - 1] for step in (6, 12, 18, 24)]
    assert budgets[0] > budgets[1] > budgets[2] == budgets[3] == 2 * LAYERS
    found = ranks(run.model).values()
    assert entries[-1]["adalora/rank_min"] == min(found) and entries[-1]["adalora/rank_max"] == max(found)
    assert all(0 <= entry["adalora/rank_min"] <= entry["adalora/rank_max"] <= 4 for entry in entries)


def test_a_finished_run_says_nothing(tmp_path):
    with no_warning():
        trainer(peft_model(), tmp_path, max_steps=6).train()


def test_gradient_accumulation_and_epochs(tmp_path):
    watch, model = Watch(), peft_model()
    run = trainer(
        model,
        tmp_path,
        watch,
        max_steps=-1,
        num_train_epochs=3,
        gradient_accumulation_steps=3,
        logging_steps=100,
    )
    run.train()  # 8 batches are 3 optimizer steps per epoch
    assert run.state.global_step == 9
    assert watch.steps == list(range(1, 10))
    assert model.peft_config["default"].total_step == 9
    assert sum(ranks(model).values()) == 2 * LAYERS


SCHEDULES = {
    "fractions": ({"tinit": 0.25, "tfinal": 0.5, "deltaT": 2}, {}, (6, 12, 2)),
    "steps": ({"tinit": 5, "tfinal": 9}, {}, (5, 9, 1)),
    "zero": ({"tinit": 0, "tfinal": 0}, {}, (0, 0, 1)),
    "the config's own": (
        {"total_step": None},
        {"total_step": 24, "tinit": 3, "tfinal": 8, "deltaT": 4},
        (3, 8, 4),
    ),
    "a number that fits": ({"total_step": 24}, {"tinit": 3, "tfinal": 8}, (3, 8, 1)),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules(case, tmp_path):
    options, config, (tinit, tfinal, deltaT) = SCHEDULES[case]
    model = peft_model(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run is stopped early
        trainer(model, tmp_path, StopAt(2), callback=AdaLoraCallback(**options)).train()
    schedule = model.base_model.rankallocator.schedule
    assert (schedule.tinit, schedule.tfinal, schedule.deltaT, schedule.total_step) == (
        tinit,
        tfinal,
        deltaT,
        STEPS,
    )


@pytest.mark.parametrize("where", ["callback", "config"])
def test_a_total_step_that_does_not_fit(where, tmp_path):
    callback = AdaLoraCallback(total_step=1000 if where == "callback" else None)
    model = peft_model(total_step=1000)
    run = trainer(model, tmp_path, callback=callback)
    with one_line(ValueError, 1000, STEPS, f"total_step={STEPS}", 'total_step="auto"'):
        run.train()


def test_phases_longer_than_the_run(tmp_path):
    run = trainer(peft_model(), tmp_path, callback=AdaLoraCallback(tinit=20, tfinal=10))
    with one_line(ValueError, 20, 10, STEPS, "train longer"):
        run.train()


@pytest.mark.parametrize("options", [{"total_step": "all"}, {"tinit": 1.5}, {"tfinal": -0.25}])
def test_arguments_out_of_range(options):
    (value,) = options.values()
    with one_line(ValueError, next(iter(options)), value):
        AdaLoraCallback(**options)


# -- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["plain", "lora"])
def test_models_without_adalora(model, tmp_path):
    made = (
        bert()
        if model == "plain"
        else get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    )
    with one_line(TypeError, "BertForSequenceClassification" if model == "plain" else "LoraModel", "AdaLora"):
        trainer(made, tmp_path).train()


def test_a_model_fused_before(tmp_path):
    model = fuse(peft_model(), score="fisher")
    trainer(model, tmp_path, callback=AdaLoraCallback(score="fisher"), max_steps=8).train()
    assert model.base_model.rankallocator.score.name == "fisher"
    assert sum(ranks(model).values()) == 2 * LAYERS


def test_a_model_fused_with_another_score(tmp_path):
    with one_line(ValueError, "gsnr", "fisher", "one of them"):
        trainer(fuse(peft_model(), score="fisher"), tmp_path, callback=AdaLoraCallback(score="gsnr"))


def test_the_callbacks_options_reach_fuse(tmp_path):
    model = peft_model()
    callback = AdaLoraCallback(score="movement", smoothing="sum", orth_penalty="squared", precision="highest")
    trainer(model, tmp_path, callback=callback)
    allocator = model.base_model.rankallocator
    assert (allocator.score.name, allocator.smoothing) == ("movement", "sum")
    fused_with = model.base_model.fused_with
    assert (fused_with.orth_penalty, fused_with.precision) == ("squared", "highest")


def test_a_callback_that_is_added_later(tmp_path, run):
    model = peft_model()
    late = trainer(model, tmp_path)
    late.pop_callback(AdaLoraCallback)
    model = peft_model()
    late = Trainer(model=model, args=late.args, train_dataset=examples())
    late.add_callback(AdaLoraCallback())
    assert not is_fused(model)
    late.train()
    assert ranks(model) == ranks(run.model)
    for (name, expected), found in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_compiled_and_wrapped_models_are_unwrapped():
    model = peft_model()
    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(SimpleNamespace(module=torch.compile(model, backend="eager"))) is model
    with one_line(TypeError, "Linear", "get_peft_model"):
        unwrap(torch.nn.Linear(2, 2))
    with one_line(TypeError, "NoneType", "get_peft_model"):
        unwrap(None)


def test_a_compiled_run(tmp_path):
    torch.compiler.reset()
    model = peft_model(lora_dropout=0.0, target_modules=["query", "value"])
    trainer(
        model,
        tmp_path,
        max_steps=6,
        torch_compile=True,
        torch_compile_backend="eager",
        dataloader_drop_last=True,
    ).train()
    assert is_fused(model) and sum(ranks(model).values()) == 2 * len(ranks(model))


# -- the orthogonality term --------------------------------------------------------------------


def gradients_of_first_step(folder, **arguments) -> dict[str, torch.Tensor]:
    """The gradients with which the first optimizer step is made."""
    found = {}

    class Spy(Watch):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and not found}
            )

    weight = arguments.pop("orth_reg_weight", 0.5)
    model = peft_model(lora_dropout=0.0, orth_reg_weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(model, folder, Spy(), StopAt(1), max_grad_norm=0.0, **arguments).train()
    return found


def test_label_smoothing_keeps_the_orthogonality_gradient(tmp_path):
    # The smoothed loss is made from the logits; the model's own, and γ R with it, is never differentiated.
    plain = gradients_of_first_step(tmp_path / "a", orth_reg_weight=0.5)
    plain_without = gradients_of_first_step(tmp_path / "b", orth_reg_weight=0.0)
    smoothed = gradients_of_first_step(tmp_path / "c", orth_reg_weight=0.5, label_smoothing_factor=0.1)
    smoothed_without = gradients_of_first_step(
        tmp_path / "d", orth_reg_weight=0.0, label_smoothing_factor=0.1
    )
    for name in plain:
        expected = plain[name] - plain_without[name]
        found = smoothed[name] - smoothed_without[name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
        assert bool(expected.abs().max() > 1e-4) == ("lora_A" in name or "lora_B" in name), name


def test_label_smoothing_with_accumulation_adds_the_term_once(tmp_path):
    arguments = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    smoothed = gradients_of_first_step(tmp_path / "a", **arguments)
    without = gradients_of_first_step(tmp_path / "b", orth_reg_weight=0.0, **arguments)
    once = gradients_of_first_step(tmp_path / "c", label_smoothing_factor=0.1)
    once_without = gradients_of_first_step(tmp_path / "d", label_smoothing_factor=0.1, orth_reg_weight=0.0)
    for name in smoothed:
        torch.testing.assert_close(
            smoothed[name] - without[name], once[name] - once_without[name], rtol=1e-4, atol=1e-6, msg=name
        )


def test_evaluation_in_the_middle_of_a_run_does_not_switch_the_term_off(tmp_path):
    arguments = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 100}
    with_term, without_evaluation = peft_model(lora_dropout=0.0), peft_model(lora_dropout=0.0)
    trainer(with_term, tmp_path / "a", **arguments).train()
    trainer(without_evaluation, tmp_path / "b", max_steps=4, logging_steps=100).train()
    for a, b in zip(trainable(with_term), trainable(without_evaluation), strict=True):
        assert torch.equal(a, b)


# -- an early end ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 9])
def test_a_run_that_stops_early_is_pruned_to_the_final_budget(step, tmp_path):
    model = peft_model()
    run = trainer(model, tmp_path, StopAt(step))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    found = [str(w.message) for w in caught if "final allocation" in str(w.message)]
    assert len(found) == 1 and "\n" not in found[0]
    assert f"{step} of {STEPS}" in found[0] and str(2 * LAYERS) in found[0]
    assert sum(ranks(model).values()) == 2 * LAYERS
    values = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_E" in name])
    assert (values != 0).sum() == 2 * LAYERS
