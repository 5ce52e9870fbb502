"""Adapters that are worth exporting: large random factors, most λ pruned, ranks from 0 to the initial one."""

import json
import re

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from adalora_fast import fuse
from adalora_fast.integrations.layers import adapter_layers, factors_of
from tests.helpers.checkpoints import ADAPTER
from tests.helpers.models import adapted, awake

SCALE = 8 / (4 + 1e-5)  # lora_alpha / (init_r + 1e-5) of tests.helpers.models.adapt
KEPT = ([0, 2], [1], [], [0, 1, 2, 3])  # in turn, so that the mean is below the target of 2


def prune(model: PeftModel, adapter: str = "default") -> PeftModel:
    """Zero the λ of all triplets but :data:`KEPT`, layer by layer."""
    for index, layer in enumerate(adapter_layers(model).values()):
        kept = KEPT[index % len(KEPT)]
        with torch.no_grad():
            for triplet in set(range(4)) - set(kept):
                factors_of(layer, adapter).lora_E[triplet] = 0.0
    return model


def pruned(family: str = "bert", fused: bool = True, **config) -> PeftModel:
    """A tiny model as after its training, in evaluation."""
    model = prune(awake(adapted(family, **config)))
    return (fuse(model) if fused else model).eval()


def kept_of(index: int) -> list[int]:
    """The triplets that :func:`prune` kept in this layer."""
    return KEPT[index % len(KEPT)]


class Convolutions(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, (3, 2), padding=1)
        self.second = nn.Conv2d(5, 4, 1, stride=2)
        self.last = nn.Linear(4, 6)

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh().mean((2, 3)))


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest number."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def rules(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a saved adapter, after what every server asks for was checked."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / ADAPTER)
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    assert not (config["use_rslora"] or config["use_dora"] or config["lora_bias"])
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors.values())
    factors = [key for key in tensors if "lora_" in key]
    assert factors and all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in factors)
    for key in (key for key in factors if ".lora_A." in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = config["rank_pattern"].get(name, config["r"])
        assert tensors[key].shape[0] == tensors[key.replace("lora_A", "lora_B")].shape[1] == rank > 0
    return config, tensors


def ranks_of(lora: PeftModel) -> dict[str, int]:
    modules = lora.base_model.model.named_modules()
    return {name: module.r["default"] for name, module in modules if hasattr(module, "lora_A")}
