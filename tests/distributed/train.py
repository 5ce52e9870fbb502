"""A Trainer run for ``torchrun`` and ``accelerate launch``: each process leaves what it ended with.

torchrun --nproc-per-node 2 -m tests.distributed.train FOLDER BATCH [RESUME]
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from adalora_fast import AdaLoraCallback
from tests.helpers.models import trained_weights
from tests.helpers.trainers import peft_model, trainer
from tests.integrations.test_orthogonality_once import share_of_r

OPTIONS = {"tinit": 4, "tfinal": 7, "deltaT": 3}  # the final mask is made at step 17 of 24
SAVED = 10


class Masks(TrainerCallback):
    """Notes the mask after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[list[bool]] = []

    def on_step_end(self, args, state, control, model: nn.Module = None, **kwargs) -> None:
        model = getattr(model, "module", model)
        self.seen.append(model.base_model.rankallocator._mask.tolist())


def make(folder: Path, size: int) -> tuple[Trainer, Masks]:
    """A run in float64 with ``size`` examples per process and step."""
    masks = Masks()
    run = trainer(
        peft_model(lora_dropout=0.0).double(),
        folder,
        masks,
        callback=AdaLoraCallback(**OPTIONS),
        per_device_train_batch_size=size,
        train_sampling_strategy="sequential",
        average_tokens_across_devices=False,  # it multiplies the loss of a BERT by the number of processes
        save_strategy="steps",
        save_steps=SAVED,
    )
    return run, masks


class ShareOfTerm(TrainerCallback):
    """How many times γ ∇R the gradients of lora_A and lora_B hold in the first step, where λ is zero."""

    def on_optimizer_step(self, args, state, control, model: nn.Module = None, **kwargs) -> None:
        self.share = share_of_r(getattr(model, "module", model))


def shares_of_term(folder: Path) -> dict[str, float]:
    """Of one step over four batches in a loss that the Trainer multiplies by the number of processes."""
    found = {}
    for name, limit in (("free", 0.0), ("clipped", 1e-3)):
        watch = ShareOfTerm()
        options = {"learning_rate": 0.0, "max_steps": 1, "gradient_accumulation_steps": 4}
        sizes = {"per_device_train_batch_size": 1, "max_grad_norm": limit}
        trainer(peft_model(lora_dropout=0.0).double(), folder, watch, **options, **sizes).train()
        found[name] = watch.share
    return found


def result(run: Trainer, masks: Masks) -> dict:
    """What is compared."""
    state = run.model.base_model.rankallocator.state_dict()
    return {"masks": masks.seen, "weights": trained_weights(run.model), "state": state["tensors"]}


def main(folder: str, size: str, resume: str | None = None) -> None:
    torch.set_num_threads(1)
    run, masks = make(Path(folder), int(size))
    run.train(resume_from_checkpoint=resume)
    left = result(run, masks) | {"shares": {} if resume else shares_of_term(Path(folder) / "shares")}
    torch.save(left, Path(folder) / f"rank{run.args.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
