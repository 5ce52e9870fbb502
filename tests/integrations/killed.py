"""Trainer runs that are killed: ``python -m tests.integrations.killed FOLDER SIGHT:STEP ...``.

Every one runs in a process of its own, in FOLDER/STEP, until a SIGKILL at that step.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from adalora_fast import AdaLoraCallback
from tests.helpers.trainers import peft_model, trainer

OPTIONS = {"tinit": 4, "tfinal": 7, "deltaT": 3}  # the final mask is made at step 17 of 24


class Kill(TrainerCallback):
    """No chance to clean anything up: between the optimizer's step and the allocator's, or after both."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step = moment, step

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.moment == "between" and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.moment == "after" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make(folder: Path, *before: TrainerCallback, seed: int = 1) -> Trainer:
    """A run with a checkpoint every other step; ``before`` comes before the allocator's step."""
    run = trainer(
        peft_model(seed=seed),
        folder,
        callback=AdaLoraCallback(**OPTIONS),
        save_strategy="steps",
        save_steps=2,
    )
    for callback in before:
        run.callback_handler.callbacks.insert(0, callback)
    return run


def main(folder: str, *kills: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for kill in kills:
        moment, _, step = kill.partition(":")
        child = os.fork()
        if child == 0:
            make(Path(folder) / step, Kill(moment, int(step))).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill, status)


if __name__ == "__main__":
    main(*sys.argv[1:])
