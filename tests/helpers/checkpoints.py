"""Two checkpoints of one run, made once: from its middle (whole tensors) and from its end (cut down)."""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from adalora_fast import fuse
from tests.helpers.models import adapted, batch, bert
from tests.helpers.peft_models import adamw, logits

MIDDLE, END = 9, 20
CONFIG = {"total_step": END, "tinit": 2, "tfinal": 4}
STATE = "adalora_allocator.safetensors"
ADAPTER = "adapter_model.safetensors"
LAYERS = 13
_folder = TemporaryDirectory(prefix="adalora-fast-tests-")


def new(**overrides) -> PeftModel:
    """A fused model as at the start of the run."""
    return fuse(adapted("bert", **{**CONFIG, **overrides}))


def train(model: PeftModel, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps of the run; the pooler never gets a gradient, so that one layer ends with rank 0."""
    model.train()
    for step in range(start, stop):
        model(**batch(step % 8)).loss.backward()
        for parameter in model.base_model.model.bert.pooler.dense.parameters():
            parameter.grad = None
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


class Checkpoints:
    """``middle``, ``end``: folders; ``*_logits``: what the model computed; ``finished``: the last model."""

    def __init__(self, root: Path):
        self.middle, self.end = root / "middle", root / "end"
        model = new()
        optimizer = adamw(model)
        train(model, optimizer, 0, MIDDLE)
        model.save_pretrained(self.middle)
        self.middle_logits = logits(model)
        self._optimizer = copy.deepcopy(optimizer.state_dict())
        self.middle_state = model.base_model.rankallocator.state_dict()
        train(model, optimizer, MIDDLE, END)
        model.base_model.rankallocator.finalize()
        model.save_pretrained(self.end)
        self.end_logits = logits(model)
        self.ranks = model.base_model.rankallocator.ranks()
        self.finished = model

    def optimizer_of(self, model: PeftModel) -> torch.optim.Optimizer:
        """An AdamW for ``model`` with the state that the run's had at ``middle``."""
        optimizer = adamw(model)
        optimizer.load_state_dict(copy.deepcopy(self._optimizer))  # it takes the tensors themselves
        return optimizer


@cache
def checkpoints() -> Checkpoints:
    """Do not write into its folders."""
    return Checkpoints(Path(_folder.name))


def stored(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors in a checkpoint."""
    return load_file(folder / ADAPTER)


def loaded_by_peft(folder: Path, **options) -> PeftModel:
    """A plain PEFT model from the checkpoint."""
    return PeftModel.from_pretrained(bert(), folder, **options)
