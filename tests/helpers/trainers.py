"""Trainer runs on a tiny BERT."""

from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_fast import AdaLoraCallback
from tests.helpers.models import adapted, examples

STEPS = 24


class Watch(TrainerCallback):
    """Notes the allocator's step and budget after every optimizer step."""

    def __init__(self):
        self.steps: list[int] = []
        self.budgets: list[int] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "_orig_mod", model)
        self.steps.append(model.base_model.rankallocator.t)
        self.budgets.append(model.base_model.rankallocator.budget)


class StopAt(TrainerCallback):
    """Ends the training after ``step`` steps, as early stopping does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def peft_model(**config) -> PeftModel:
    """A model that PEFT made, with some number as its total_step."""
    return adapted("bert", **{"total_step": 10_000, "tinit": 0, "tfinal": 0, "lora_dropout": 0.1, **config})


def trainer(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    callback: AdaLoraCallback | None = None,
    **arguments,
) -> Trainer:
    """A Trainer of 24 steps on the CPU that writes nothing but checkpoints that are asked for.

    Without ``callback`` an AdaLoraCallback with all defaults is made; ``callbacks`` come after it.
    """
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 6,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=examples(),
        eval_dataset=examples(8, seed=6),
        callbacks=[callback or AdaLoraCallback(), *callbacks],
    )
