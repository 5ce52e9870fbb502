"""Models that carry AdaLoRA without a PeftModel at the top, and a PeftModel that computes the same."""

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from adalora_fast import fuse
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.models import TARGETS, adapted, batch, bert, trainable

END = 20
LAYERS = 13


def config(**overrides) -> AdaLoraConfig:
    """Rank 4 to mean 2 over 20 steps."""
    settings = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "total_step": END, "lora_alpha": 8}
    return AdaLoraConfig(**{**settings, "target_modules": TARGETS["bert"], **overrides})


def added(**overrides) -> nn.Module:
    """A BERT after transformers' ``add_adapter``."""
    model = bert()
    torch.manual_seed(1)
    model.add_adapter(config(**overrides))
    return model


def injected(**overrides) -> nn.Module:
    """A BERT after PEFT's ``inject_adapter_in_model``."""
    model = bert()
    torch.manual_seed(1)
    return inject_adapter_in_model(config(**overrides), model)


def twin(**overrides) -> PeftModel:
    """A PeftModel with the same weights, whose forward goes through the tuner and which trains no head."""
    model = bert()
    torch.manual_seed(1)
    return get_peft_model(model, config(task_type="FEATURE_EXTRACTION", **overrides))


MAKERS = {"add_adapter": added, "inject_adapter_in_model": injected}


class Wrapped(nn.Module):
    """A value head's shape: the adapted model inside, a head of its own beside it."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.pretrained_model = adapted("bert", lora_dropout=0.1) if inner is None else inner
        torch.manual_seed(2)
        self.v_head = nn.Linear(3, 1)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).logits
        value = self.v_head(logits).squeeze(-1)
        return {"loss": (value - labels.float()).square().mean(), "logits": logits}


class Towers(nn.Module):
    """Two adapted models; the loss compares what they compute."""

    def __init__(self, **second) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"a": adapted("bert"), "b": adapted("bert", seed=4, **second)})

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        left, right = (tower(**inputs).logits for tower in self.towers.values())
        target = nn.functional.one_hot(labels, 3).float()
        return {"loss": (left - target).square().mean() + (right + target).square().mean(), "logits": left}


def run_steps(model: nn.Module, allocator, start: int = 0, stop: int = END, optimizer=None):
    """Training steps by hand in the order of the documentation; returns the optimizer."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=2e-2)
    model.train()
    for step in range(start, stop):
        outputs = model(**batch(step % 8))
        (outputs["loss"] if isinstance(outputs, dict) else outputs.loss).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """What the model computes in evaluation."""
    inputs = batch(99)
    outputs = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return outputs.logits


def kept_triplets(model: nn.Module) -> int:
    """Those with a λ that is not zero."""
    return sum(int((layer.lora_E["default"] != 0).sum()) for layer in adapter_layers(model).values())


def finished_run() -> nn.Module:
    """A fused model after ``add_adapter``, at the end of a run by hand."""
    model = fuse(added())
    run_steps(model, model.rankallocator)
    model.rankallocator.finalize()
    return model
