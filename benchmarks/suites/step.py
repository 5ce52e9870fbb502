"""A whole training step: forward, backward, clipping, AdamW, importance, orthogonality, allocation.

Allocation takes place at every step, in the middle of the schedule. The baseline is the frozen model with
its head in training, whose backward goes down to the embeddings' output; LoRA has the rank that AdaLoRA ends
with.
"""

from functools import partial

import torch

from benchmarks.suites import Case, Contestant, Work
from benchmarks.suites import models as whole


def cases(scale: str, device: torch.device) -> list[Case]:
    return [
        Case(
            suite="step",
            name=setting.name,
            what=setting.what(),
            baseline="frozen",
            build=partial(_build, setting),
            contestants=whole.training_names(),
            dtype=setting.dtype,
        )
        for setting in whole.settings(scale, device)
    ]


def _build(setting: whole.Setting) -> Work:
    made: dict[str, whole.Training] = {}

    def make(name: str) -> Contestant:
        made[name] = whole.TRAINERS[name](setting)
        return Contestant([made[name]], capturable=False)  # a step has a number, which the host counts

    def gate(name: str) -> None:
        whole.check_losses(name, setting)
        whole.check_finite(name, made[name]())

    return Work({name: partial(make, name) for name in whole.training_names()}, gate)
