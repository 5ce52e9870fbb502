"""The memory that a training step takes.

On CUDA it is the peak of one step beyond what was allocated before the model was made: weights, gradients,
optimizer, statistics, and what the step itself needs. On a CPU, where nobody counts allocations, it is what
the forward keeps for the backward: the bytes of all storages that autograd holds, each once, without those of
parameters and buffers. That is the same on every machine.
"""

import gc
from functools import partial

import torch
from torch import Tensor

from benchmarks.suites import Case, Contestant, Work
from benchmarks.suites import models as whole

METRICS = {"cuda": "peak of a step", "cpu": "kept for the backward"}
WARM_UP = 2  # the first step makes the optimizer's state and compiles


def cases(scale: str, device: torch.device) -> list[Case]:
    return [
        Case(
            suite="memory",
            name=setting.name,
            what={**setting.what(), "metric": METRICS[device.type]},
            baseline="frozen",
            unit="bytes",
            build=partial(_build, setting),
            contestants=whole.training_names(),
            dtype=setting.dtype,
        )
        for setting in whole.settings(scale, device)
    ]


def _build(setting: whole.Setting) -> Work:
    count = peak_of_a_step if setting.device.type == "cuda" else kept_for_the_backward

    def make(name: str) -> Contestant:
        # The model is made within the call, so that nobody's memory is there while another's is measured.
        return Contestant([partial(count, name, setting)], capturable=False)

    contestants = {name: partial(make, name) for name in whole.training_names()}
    return Work(contestants, lambda name: whole.check_losses(name, setting))


def peak_of_a_step(name: str, setting: whole.Setting) -> int:
    """Bytes that CUDA's allocator holds at most during one step beyond those before the model was made."""
    whole.TRAINERS["frozen"](setting.tiny())()  # the libraries' own workspaces, which are nobody's
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    training = whole.TRAINERS[name](setting)
    for _ in range(WARM_UP):
        whole.check_finite(name, training())
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    loss = training()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    whole.check_finite(name, loss)
    return peak


def kept_for_the_backward(name: str, setting: whole.Setting) -> int:
    """Bytes of the storages that the forward saves for the backward, parameters and buffers left out."""
    training = whole.TRAINERS[name](setting)
    model = training.model
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # which autograd holds until the end, so that no address is given out twice

    with training.context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training.loss()
    whole.check_finite(name, loss)
    return sum(kept.values())
