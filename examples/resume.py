"""A run that stops in the middle goes on from its checkpoint and ends as if nothing had happened."""

import torch
from peft import AdaLoraConfig, get_peft_model
from tiny import encoder, sentences, show
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_fast import AdaLoraCallback, fuse


class StopAt(TrainerCallback):
    """Stands for a machine that was taken away."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def trainer(folder: str, *callbacks: TrainerCallback) -> Trainer:
    """A new process would begin here, with a new model."""
    torch.manual_seed(1)
    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], init_r=8, target_r=3, total_step=10_000
    )
    model = fuse(get_peft_model(encoder(), config))
    settings = TrainingArguments(
        folder, max_steps=40, save_steps=16, learning_rate=5e-3, per_device_train_batch_size=16,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=sentences(), callbacks=[AdaLoraCallback(), *callbacks])


def ranks(run: Trainer) -> dict[str, int]:
    return run.model.base_model.rankallocator.ranks()


whole = trainer("runs/whole")
whole.train()
trainer("runs/stopped", StopAt(20)).train()
resumed = trainer("runs/stopped")
resumed.train(resume_from_checkpoint="runs/stopped/checkpoint-16")  # statistics and masks come with it

show(ranks(resumed))
assert ranks(resumed) == ranks(whole)
