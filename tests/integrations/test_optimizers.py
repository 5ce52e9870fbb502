"""Optimizers that keep their state in eight bits: the allocator follows, and resumed runs are exact."""

import shutil

import pytest
import torch

from adalora_fast import AdaLoraCallback
from tests.helpers.models import trainable
from tests.helpers.peft_models import same_weights
from tests.helpers.trainers import STEPS, Watch, peft_model, trainer

LAYERS = 13
OPTIONS = {"tinit": 4, "tfinal": 7, "deltaT": 3}


class EightBitMomentum(torch.optim.Optimizer):
    """SGD with a momentum of one byte per entry and one scale per tensor."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = parameter.grad.clone()
                if state:
                    momentum += 0.9 * (state["codes"].float() - 128) * state["scale"]
                state["scale"] = momentum.abs().max() / 127 + 1e-12
                state["codes"] = (momentum / state["scale"] + 128).round().to(torch.uint8)
                parameter -= group["lr"] * momentum


def eight_bit(parameters):
    return EightBitMomentum(parameters, lr=0.05)


def bitsandbytes_8bit(parameters):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=2e-2, min_8bit_size=16)


def bitsandbytes_paged(parameters):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=2e-2, min_8bit_size=16)


def run(folder, make, seed: int = 1):
    watch, model = Watch(), peft_model(seed=seed)
    arguments = {"save_strategy": "steps", "save_steps": 10}
    made = trainer(model, folder, watch, callback=AdaLoraCallback(**OPTIONS), **arguments)
    made.optimizer = make(trainable(model))
    return made, watch, model


@pytest.mark.parametrize("make", [eight_bit, bitsandbytes_8bit, bitsandbytes_paged])
def test_the_allocator_follows_and_resumes(make, tmp_path):
    whole, watch, model = run(tmp_path / "whole", make)
    whole.train()
    assert watch.steps == list(range(1, STEPS + 1))
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * LAYERS
    kept = [value for state in whole.optimizer.state.values() for value in state.values()]
    assert any(isinstance(value, torch.Tensor) and value.dtype == torch.uint8 for value in kept)
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "resumed" / "checkpoint-10")
    resumed, _, other = run(tmp_path / "resumed", make, seed=77)
    resumed.train(resume_from_checkpoint=True)
    assert other.base_model.rankallocator.rank_pattern() == model.base_model.rankallocator.rank_pattern()
    assert same_weights(other, model)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_the_trainers_own_names(name, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = peft_model()
    trainer(model, tmp_path, callback=AdaLoraCallback(**OPTIONS), optim=name).train()
    assert sum(model.base_model.rankallocator.ranks().values()) == 2 * LAYERS
